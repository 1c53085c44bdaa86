"""Graphs of attention: rotary attention over the key-value cache of the share's heads."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto

from ganglion.partitioner.families.plans import Attention, Projection
from ganglion.partitioner.graphs.builder import MICROSOFT, Builder


def build_attention(builder: Builder, core: Attention) -> None:
    """Project to queries, keys and values, attend, and leave the partial sum of the output matrix."""
    queries, keys = builder.count * core.queries, builder.count
    widths = [queries * core.head_dim, keys * core.head_dim, keys * core.head_dim]
    if builder.plan.entry.mode == "carry":
        projected = _all_normed(builder, core, widths)
    else:
        projected = builder.joined(builder.entry())
    attend(builder, core, projected, widths)


def attend(builder: Builder, core: Attention, projected: str, widths: list[int]) -> None:
    """Attention over rows [S, q | k | v] of these widths; builds state inputs and outputs, and the partial sum."""
    head_dim, keys = core.head_dim, widths[1] // core.head_dim
    total, seqlens, rows = "total", "seqlens_k", ""
    declare_state(builder, core, keys)
    if builder.exact:
        projected, total, seqlens, rows = _even(builder, projected)
    if core.head_norm in ("rms", "layer"):
        query, key, value = builder.split(projected, widths)
        query = _head_norm(builder, core, query, "q_norm", widths[0] // head_dim)
        key = _head_norm(builder, core, key, "k_norm", keys)
        operands = [query, key, builder.reshape(value, [1, -1, widths[2]])]
    else:
        operands = [builder.reshape(projected, [1, -1, sum(widths)]), "", ""]
    attributes: dict[str, Any] = {"num_heads": widths[0] // head_dim, "kv_num_heads": keys}
    if core.rope:
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(core.interleaved)}
    if core.window:
        attributes["local_window_size"] = core.window
    if core.scale is not None:
        attributes["scale"] = core.scale
    if core.softcap:
        attributes["softcap"] = core.softcap
    tables = ["cos", "sin"] if core.rope else ["", ""]
    inputs = [*operands, "past_key", "past_value", seqlens, total, *tables]
    if core.sinks:
        inputs += ["", "", builder.weight("sinks", [widths[0] // head_dim])]
    builder.node_to(
        ["attended", "present_key", "present_value"], "GroupQueryAttention", inputs, domain=MICROSOFT, **attributes
    )
    attended = builder.reshape("attended", [-1, widths[0]])
    if rows:
        zero = builder.shape([0])
        attended = builder.node("Slice", [attended, zero, rows, zero])[0]
    builder.summed(attended)


def declare_state(builder: Builder, core: Attention, keys: int) -> None:
    """The inputs and outputs that hold the key-value state of `keys` heads."""
    cache = [1, keys, "capacity", core.head_dim]
    for name in ("past_key", "past_value"):
        builder.input(name, cache)
    for name in ("seqlens_k", "total"):
        builder.input(name, [1], TensorProto.INT32)
    if core.rope:
        for name in ("cos", "sin"):
            builder.input(name, ["positions", "half"])
    for name in ("present_key", "present_value"):
        builder.output(name, cache)


def build_projection(builder: Builder, core: Projection) -> None:
    """Carry q, k and v; leave the sums of squares of each group's queries and keys."""
    widths = [builder.count * matrix.width for matrix in builder.plan.joined]
    projected = builder.joined(builder.entry())
    builder.rename(projected, "carry")
    builder.output("carry", ["S", sum(widths)])
    squares = []
    for rows, matrix in zip(builder.split("carry", widths)[:2], builder.plan.joined, strict=False):
        by_group = builder.reshape(rows, [-1, builder.count, matrix.width])
        of_group = builder.node("ReduceSumSquare", [by_group, builder.shape([2])], keepdims=0)[0]
        squares.append(builder.node("ReduceSum", [builder.widen(of_group), builder.shape([1])], keepdims=1)[0])
    builder.leave([builder.node("Concat", squares, axis=-1)[0]])


def _all_normed(builder: Builder, core: Attention, widths: list[int]) -> str:
    """The carried rows, queries and keys divided by the root mean square over all heads, times their weights."""
    model = builder.model
    carried = builder.carried(sum(widths) // builder.count)
    builder.input("delta", ["S", 2], builder.wide)
    parts = builder.split(carried, widths)
    sums = builder.split(builder.narrow("delta"), [1, 1])
    for index, (slot, heads) in enumerate((("q_norm", model.heads), ("k_norm", model.kv_heads))):
        mean = builder.node("Mul", [sums[index], builder.constant(1.0 / (heads * core.head_dim))])[0]
        root = builder.node("Sqrt", [builder.node("Add", [mean, builder.constant(model.epsilon)])[0]])[0]
        normed = builder.node("Div", [parts[index], root])[0]
        parts[index] = builder.node("Mul", [normed, builder.weight(slot, [widths[index]])])[0]
    return builder.node("Concat", parts, axis=-1)[0]


def _even(builder: Builder, projected: str) -> tuple[str, str, str, str]:
    """Pad an odd number of rows with a zero row: (padded rows, its total and seqlens_k, the number before).

    The row's key and value go one position beyond the others, where the session's next row overwrites them.
    """
    rows = builder.node("Shape", [projected], start=0, end=1)[0]
    odd = builder.node("Mod", [rows, builder.shape([2])])[0]
    pads = builder.node("Concat", [builder.shape([0, 0]), odd, builder.shape([0])], axis=0)[0]
    padded = builder.node("Pad", [projected, pads])[0]
    added = builder.node("Cast", [odd], to=TensorProto.INT32)[0]
    total = builder.node("Add", ["total", added])[0]
    return padded, total, builder.node("Add", ["seqlens_k", added])[0], rows


def _head_norm(builder: Builder, core: Attention, rows: str, slot: str, heads: int) -> str:
    dim, epsilon = core.head_dim, builder.model.epsilon
    by_head = builder.reshape(rows, [-1, heads, dim])
    if core.head_norm == "rms":
        scale = builder.weight(slot, [dim])
        normed = builder.node("SimplifiedLayerNormalization", [by_head, scale], axis=-1, epsilon=epsilon)[0]
    else:
        ones = builder.ones(dim)
        plain = builder.node("LayerNormalization", [by_head, ones], axis=-1, epsilon=epsilon)[0]
        normed = builder.node("Mul", [plain, builder.weight(slot, [heads, dim])])[0]
    return builder.reshape(normed, [1, -1, heads * dim])
