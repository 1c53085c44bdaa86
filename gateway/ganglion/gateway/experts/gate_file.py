"""A gate on disk: `gate.onnx`, which ONNX Runtime runs, and `gate.json`, which says of whom it speaks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ganglion.gateway.experts.encoder import BUCKETS, features
from ganglion.gateway.experts.gate_training import Example, GateWeights, run
from ganglion.gateway.experts.profile import Profile
from ganglion.wire.errors import Corrupt, Unsupported

GRAPH_FILE: Final = "gate.onnx"
FACTS_FILE: Final = "gate.json"
GRAPH_BYTES: Final = 64 << 20
FACTS_BYTES: Final = 1 << 20
EXPERTS: Final = 64


class GateFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `gate.json` holds. shares, quality: its view of the kinds of prompts, as in `Profile.kinds`."""

    format: int
    buckets: int
    experts: tuple[str, ...]
    examples: int
    shares: tuple[float, ...]
    quality: tuple[tuple[float, ...], ...]


class GateFile:
    """A gate that was read from its folder; `weigh` runs it."""

    def __init__(self, folder: Path) -> None:
        """Raises FileNotFoundError without files, Corrupt for files that are not a gate's."""
        self.facts = _read_facts(folder / FACTS_FILE)
        graph = folder / GRAPH_FILE
        if graph.stat().st_size > GRAPH_BYTES:
            raise Corrupt(f"{graph} has {graph.stat().st_size} bytes, a gate has at most {GRAPH_BYTES}")
        try:
            self._session: Any = _session(graph.read_bytes())
        except Exception as error:
            raise Corrupt(f"{graph} is no graph that ONNX Runtime loads: {error}") from error
        ends = ([one.name for one in self._session.get_inputs()], [one.name for one in self._session.get_outputs()])
        if ends != (["buckets", "weights"], ["logits", "quality"]):
            raise Corrupt(f"{graph}: inputs and outputs {ends} are not a gate's")

    def run(self, text: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits of the weights, and quality from 0 to 1, of every expert of `facts`."""
        found = features(text)
        logits, quality = self._session.run(None, {"buckets": found.buckets, "weights": found.weights})
        if (
            logits.shape != (len(self.facts.experts),)
            or not np.isfinite(logits).all()
            or not np.isfinite(quality).all()
        ):
            raise Corrupt(f"the gate gives {logits.shape} numbers for {len(self.facts.experts)} experts")
        return logits, quality


def _session(graph: bytes) -> Any:
    """Of one thread. From bytes: a graph that names other files finds none."""

    def begun(*, own_threads: bool) -> Any:
        options = ort.SessionOptions()
        options.use_per_session_threads = own_threads
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return ort.InferenceSession(graph, options, ["CPUExecutionProvider"], enable_fallback=0)  # it says so on stdout

    try:
        return begun(own_threads=True)
    except RuntimeError as error:
        if "global thread pool" not in str(error):
            raise
        return begun(own_threads=False)  # an agent runs in this process: its pool serves everybody


def write_gate(folder: Path, gate: GateWeights, examples: Sequence[Example]) -> None:
    """Write both files of a gate that was trained on `examples`; raises Unsupported without the package onnx.

    A gateway that reads the folder finds the gate before or this one.
    """
    graph = _graph(gate)
    profile = Profile()
    for example in examples:
        profile.add(dict(zip(gate.experts, map(float, run(gate, example.text)[1]), strict=True)), gate.experts)
    kinds = profile.kinds()
    facts = GateFacts(
        format=1,
        buckets=BUCKETS,
        experts=gate.experts,
        examples=len(examples),
        shares=tuple(round(share, 6) for share, _ in kinds),
        quality=tuple(tuple(round(one, 6) for one in quality.values()) for _, quality in kinds),
    )
    _put(folder, graph, msgspec.json.format(msgspec.json.encode(facts), indent=1))


def copy_gate(source: Path, folder: Path) -> GateFacts:
    """Put the gate of one folder into another; what it says of itself. Raises as GateFile does, and leaves it then."""
    facts = GateFile(source).facts
    _put(folder, (source / GRAPH_FILE).read_bytes(), (source / FACTS_FILE).read_bytes())
    return facts


def _put(folder: Path, graph: bytes, facts: bytes) -> None:
    """The facts last: by their time a reader sees that there is another gate."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((GRAPH_FILE, graph), (FACTS_FILE, facts)):
        fresh = folder / f".{name}.new"
        fresh.write_bytes(content)
        fresh.replace(folder / name)


def _read_facts(path: Path) -> GateFacts:
    try:
        if path.stat().st_size > FACTS_BYTES:
            raise Corrupt(f"{path} has {path.stat().st_size} bytes, at most {FACTS_BYTES}")
        facts = msgspec.json.decode(path.read_bytes(), type=GateFacts)
    except msgspec.MsgspecError as error:
        raise Corrupt(f"{path}: {error}") from None
    if (facts.format, facts.buckets) != (1, BUCKETS):
        raise Corrupt(
            f"{path}: format {facts.format} with {facts.buckets} buckets; this release reads 1 with {BUCKETS}"
        )
    widths = {len(row) for row in facts.quality} | {len(facts.experts)}
    if not 1 <= len(facts.experts) <= EXPERTS or len(widths) != 1 or len(facts.shares) != len(facts.quality):
        raise Corrupt(f"{path}: {len(facts.experts)} experts with a profile of {sorted(widths)} columns")
    return facts


def _graph(gate: GateWeights) -> bytes:
    """The gate as one ONNX graph; the embedding in 16 bits."""
    try:
        import onnx
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        raise Unsupported("a gate is written with the package onnx: pip install ganglion-ai[partitioner]") from None
    constants = {
        "embedding": gate.embedding.astype(np.float16),
        "hidden": gate.hidden,
        "hidden_bias": gate.hidden_bias,
        "weight": gate.weight,
        "weight_bias": gate.weight_bias,
        "quality_weight": gate.quality,
        "quality_bias": gate.quality_bias,
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "buckets"], ["halves"]),
        helper.make_node("Cast", ["halves"], ["rows"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["weights", "rows"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "hidden"], ["multiplied"]),
        helper.make_node("Add", ["multiplied", "hidden_bias"], ["moved"]),
        helper.make_node("Tanh", ["moved"], ["state"]),
        helper.make_node("MatMul", ["state", "weight"], ["weighed"]),
        helper.make_node("Add", ["weighed", "weight_bias"], ["logits"]),
        helper.make_node("MatMul", ["state", "quality_weight"], ["judged"]),
        helper.make_node("Add", ["judged", "quality_bias"], ["judgement"]),
        helper.make_node("Sigmoid", ["judgement"], ["quality"]),
    ]
    count = len(gate.experts)
    graph = helper.make_graph(
        nodes,
        "gate",
        [
            helper.make_tensor_value_info("buckets", TensorProto.INT64, ["n"]),
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["n"]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [count]) for name in ("logits", "quality")],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()
