"""Small graphs of experts, made as the partitioner makes them: rows and the place of each row's expert in, rows out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from ganglion.agent.executor.loader import _session, start_runtime
from ganglion.agent.paging.parts import GRAPH_FILE, PagedExperts, Skeleton, make_part, make_skeleton
from ganglion.wire.nouns import WEIGHTS_FILE

BLOCK = 32


@dataclass(frozen=True)
class Shape:
    bits: int  # 0: float32
    experts: int = 8
    hidden: int = 128
    inner: int = 64

    def tensors(self) -> list[tuple[str, int, list[int]]]:
        e, h, i, bits = self.experts, self.hidden, self.inner, self.bits
        if not bits:
            return [("in", TensorProto.FLOAT, [e, 2 * i, h]), ("out", TensorProto.FLOAT, [e, h, i])]
        return [
            ("in", TensorProto.UINT8, [e, 2 * i, h * bits // 8]),
            ("in_scales", TensorProto.FLOAT, [e, 2 * i, h // BLOCK]),
            ("out", TensorProto.UINT8, [e, h, i * bits // 8]),
            ("out_scales", TensorProto.FLOAT, [e, h, i // BLOCK]),
        ]


def experts_graph(shape: Shape) -> tuple[bytes, int]:
    """The ONNX file of a layer's experts, and the bytes of its weights."""
    initializers, offset = [], 0
    for name, dtype, dims in shape.tensors():
        size = int(np.prod(dims)) * (1 if dtype == TensorProto.UINT8 else 4)
        tensor = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
        offset += size
    initializers += [
        helper.make_tensor("depth", TensorProto.INT64, [1], [shape.experts]),
        helper.make_tensor("values", TensorProto.FLOAT, [2], [-1e4, 0.0]),
    ]
    attributes: dict[str, Any] = {
        "k": 1,
        "normalize_routing_weights": 1,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
    }
    if shape.bits:
        attributes |= {"expert_weight_bits": shape.bits, "block_size": BLOCK, "accuracy_level": 4}
    operands = ["in", "in_scales", "", "out", "out_scales", ""] if shape.bits else ["in", "", "out", ""]
    nodes = [
        helper.make_node("OneHot", ["index", "depth", "values"], ["logits"], axis=-1),
        helper.make_node(
            "QMoE" if shape.bits else "MoE",
            ["rows", "logits", *operands],
            ["given"],
            domain="com.microsoft",
            **attributes,
        ),
    ]
    ends = [
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["R", shape.hidden]),
        helper.make_tensor_value_info("index", TensorProto.INT64, ["R"]),
        helper.make_tensor_value_info("given", TensorProto.FLOAT, ["R", shape.hidden]),
    ]
    graph = helper.make_graph(nodes, "experts", ends[:2], ends[2:], initializer=initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    return model.SerializeToString(), offset


def write_source(shape: Shape, folder: Path, seed: int) -> Path:
    """The graph and random weights in `folder`; returns the graph's path."""
    graph, size = experts_graph(shape)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / GRAPH_FILE).write_bytes(graph)
    with (folder / WEIGHTS_FILE).open("wb") as file:
        for _, dtype, dims in shape.tensors():
            if dtype == TensorProto.UINT8:
                file.write(rng.integers(0, 256, dims, np.uint8).tobytes())
            else:
                file.write((rng.standard_normal(dims) * 0.02).astype(np.float32).tobytes())
    assert (folder / WEIGHTS_FILE).stat().st_size == size
    return folder / GRAPH_FILE


@dataclass
class Layers:
    """Paged layers of one shape, their parts' folders, and of each layer a plain session that has all its experts."""

    shape: Shape
    skeleton: Skeleton
    parts: list[Path]
    plain: list[Any]

    def open(self) -> list[PagedExperts]:
        return [
            PagedExperts(place, self.skeleton, _session, f"layer {number}") for number, place in enumerate(self.parts)
        ]

    def want(self, layer: int, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        return self.plain[layer].run(["given"], {"rows": rows, "index": index})[0]


def make_layers(shape: Shape, folder: Path, count: int) -> Layers:
    start_runtime(1)
    graph, size = experts_graph(shape)
    skeleton = make_skeleton(graph, size, shape.experts, folder / "kind", _session)
    parts, plain = [], []
    for layer in range(count):
        source = write_source(shape, folder / f"source-{layer}", layer)
        place = folder / f"part-{layer}"
        place.mkdir(parents=True)
        make_part(source, skeleton, place, _session)
        parts.append(place)
        plain.append(_session(source, None))
    return Layers(shape, skeleton, parts, plain)
