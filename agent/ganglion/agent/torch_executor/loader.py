"""Puts a share's weights on the device: reads pieces, dequantizes, and makes the programs of every segment."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import psutil
import torch

from ganglion.agent.executor.choice import ExecutorChoice
from ganglion.agent.executor.graph_file import check_graph
from ganglion.agent.executor.parts import Part, ends_of, parts_of
from ganglion.agent.torch_executor.attention import Attention, read_attention
from ganglion.agent.torch_executor.graph import Graph, read_graph
from ganglion.agent.torch_executor.program import Compiler, Program
from ganglion.wire.errors import Corrupt, DoesNotFit, InvalidDocument, Unsupported
from ganglion.wire.nouns import Manifest, PieceRef, Plan, Segment, Share, Stage
from ganglion.wire.shares import OpenPiece, graph_name, only_experts, write_weights

_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class TorchSettings:
    """Where and in what torch computes; `name` is for classes and messages."""

    device: torch.device
    dtype: torch.dtype
    name: str


def settle(choice: ExecutorChoice, threads: int) -> TorchSettings:
    """What a choice comes to on this machine; `threads` of the processor. Raises Unsupported without the device."""
    device = choice.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unsupported(
            f"--executor {choice.text}: torch {torch.__version__} finds no CUDA device here; use torch:cpu, or ort",
            param="executor",
        )
    dtype = choice.dtype or ("bf16" if device == "cuda" else "fp32")
    if device == "cpu":
        torch.set_num_threads(max(1, threads))
    return TorchSettings(torch.device(device), _DTYPES[dtype], f"torch-{device}-{dtype}")


@dataclass(frozen=True, slots=True)
class TorchSegment:
    """A segment of this device: what runs first, attention where it attends, and what runs after that.

    Of whole experts what routes runs first, and last those that are held (`held`, by rising number). layer: of the
    model.
    """

    segment: Segment
    groups: int
    first: Program | None
    attention: Attention | None = None
    last: Program | None = None
    layer: int = 0
    held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TorchShard:
    """What the device runs; `prompt`: the segments of prompt tokens where the class mixes formats, else the same."""

    segments: tuple[TorchSegment, ...]
    prompt: tuple[TorchSegment, ...]
    head: TorchSegment | None
    weights_bytes: int
    shares: int  # of the stage that sum; with others its sums are exchanged


def load_torch_shard(
    manifest: Manifest,
    plan: Plan,
    stage: Stage,
    share: Share,
    settings: TorchSettings,
    *,
    open_piece: OpenPiece,
    progress: Callable[[int, int], None],
) -> TorchShard:
    """Dequantize every weight onto the device, `progress(done_bytes, total_bytes)` of what is read.

    Raises DoesNotFit with both figures before anything is loaded; Corrupt, NotFound and InvalidDocument as `load_shard`
    does; Unsupported for an operator that torch is not taught.
    """
    parts = list(parts_of(manifest, stage, share))
    loader = _Loader(manifest, settings, open_piece)
    _check_memory(sum(map(loader.numbers, parts)), plan, manifest, share, settings)
    total, done, loaded = sum(part.size for part in parts), 0, []
    with torch.inference_mode():
        for part in parts:
            loaded.append(loader.load(part))
            done += part.size
            progress(done, total)
    head = loaded.pop()
    own = len(loaded) // 2 if manifest.prompt_layers else len(loaded)
    held = sum(
        one.weights_bytes for segment in (*loaded, head) for one in (segment.first, segment.last) if one is not None
    )
    segments, prompt = tuple(loaded[:own]), tuple(loaded[own:])
    shares = sum(not only_experts(one) for one in stage.shares)
    return TorchShard(segments, prompt or segments, head if head.first is not None else None, held, shares)


def _check_memory(numbers: int, plan: Plan, manifest: Manifest, share: Share, settings: TorchSettings) -> None:
    """The planner counts weights as they are stored; here they are dequantized, so the device itself is asked."""
    size = torch.empty(0, dtype=settings.dtype).element_size()
    layers = sum(stage.layers.count for stage in plan.stages if share in stage.shares)
    tokens = plan.kv_tokens + plan.prefix_tokens
    state = 2 * manifest.geometry.head_dim * share.heads.count * layers * tokens * size
    if settings.device.type == "cuda":
        free = torch.cuda.mem_get_info(settings.device)[0]
    else:
        free = psutil.virtual_memory().available
    wanted = numbers * size + state
    if wanted > free:
        raise DoesNotFit(
            f"{manifest.name} in {settings.name}: {numbers * size} bytes of weights and {state} of key-value state,"
            f" {free} are free on {settings.device.type}; choose 16 bits, ort, or fewer --sessions"
        )


class _Loader:
    def __init__(self, manifest: Manifest, settings: TorchSettings, open_piece: OpenPiece) -> None:
        self._manifest, self._settings, self._open_piece = manifest, settings, open_piece
        self._graphs: dict[str, Graph] = {}

    def numbers(self, part: Part) -> int:
        """How many numbers its weights are, whatever format they are stored in."""
        if not part.runs:
            return 0
        found = 0
        for graph in self._read(part):
            packed = {node.inputs[at]: node.attributes[bits] for node in graph.nodes for at, bits in _packed(node.op)}
            for name, tensor in graph.tensors.items():
                if tensor.value is None:
                    found += tensor.length // tensor.dtype.itemsize * (8 // packed.get(name, 8))
        return found

    def load(self, part: Part) -> TorchSegment:
        """The programs of a part's graphs."""
        if not part.runs:
            return TorchSegment(part.segment, part.count, None, layer=part.layer)
        weights = io.BytesIO(bytes(part.size))
        write_weights(part.segment, part.share, self._open_piece, weights)
        view = weights.getbuffer()
        if view.nbytes != part.size:
            raise Corrupt(f"weights of {part.name}: {view.nbytes} bytes, expected {part.size}")
        graphs, settings = self._read(part), self._settings
        if part.segment.axis == "experts":
            first = self._compiled(graphs[0], view) if part.routes else None
            last = self._compiled(graphs[1], view) if part.held else None
            return TorchSegment(part.segment, part.count, first, None, last, part.layer, part.held)
        if len(graphs) == 1:
            return TorchSegment(part.segment, part.count, self._compiled(graphs[0], view))
        first_graph, attends, last_graph = graphs
        return TorchSegment(
            part.segment,
            part.count,
            self._compiled(first_graph, view),
            read_attention(attends, view, self._manifest.geometry.head_dim, settings.device),
            self._compiled(last_graph, view),
        )

    def _compiled(self, graph: Graph, weights: memoryview) -> Program:
        return Compiler(graph, weights, self._settings.device, self._settings.dtype).compile()

    def _read(self, part: Part) -> list[Graph]:
        name = graph_name(part.segment, part.share)
        pieces = self._manifest.graphs.get(name, ())
        expected = len(ends_of(part))
        if len(pieces) != expected:
            raise InvalidDocument(f"manifest {self._manifest.name}: {len(pieces)} graphs {name!r}, expected {expected}")
        return [self._graph(piece, part) for piece in pieces]

    def _graph(self, piece: PieceRef, part: Part) -> Graph:
        found = self._graphs.get(piece.digest)
        if found is None:
            data = self._open_piece(piece.digest)
            check_graph(data, part.size)
            found = self._graphs[piece.digest] = read_graph(data)
        return found


def _packed(op: str) -> tuple[tuple[int, str], ...]:
    """Which inputs of an operator hold packed numbers, and the attribute with their bits."""
    if op == "MatMulNBits":
        return ((1, "bits"),)
    return ((2, "expert_weight_bits"), (5, "expert_weight_bits")) if op == "QMoE" else ()
