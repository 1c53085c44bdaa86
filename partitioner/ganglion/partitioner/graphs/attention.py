"""Graphs of attention: rotary attention over the key-value cache of the share's heads.

A segment that attends is three graphs: rows to queries, keys and values; attention; the output matrix. The first and
the last run once for the rows of every session in a step, the one between them for each session. It has no weights but
sinks, so that layers share it.

Exact classes at head dimensions above 128, measured on ONNX Runtime 1.31.1 up to 256: MLAS adds queries times keys in
blocks of 128 dimensions wherever it has more than 64 keys, in larger blocks for fewer. So a row's bits would depend on
the number of keys: of the whole cache at its first 64 positions, and of every block of keys in the kernel's blocked
path. Hence two things: rows are padded until there are 65 positions, and every head gets a sink whose weight is zero,
because with sinks the kernel takes its other path, which multiplies with all keys at once.
"""

from __future__ import annotations

from typing import Any, Final

from onnx import TensorProto

from ganglion.partitioner.families.model import ONE_BLOCK_HEAD_DIM
from ganglion.partitioner.families.plans import Attention, Projection
from ganglion.partitioner.graphs.builder import MICROSOFT, Builder
from ganglion.wire.nouns import EXACT_POSITIONS

NO_SINK: Final = -1e30  # a logit so low that its weight is exactly zero


def build_attention(builder: Builder, core: Attention) -> None:
    """Project to queries, keys and values, attend, and leave the partial sum of the output matrix."""
    queries, keys = builder.count * core.queries, builder.count
    widths = [queries * core.head_dim, keys * core.head_dim, keys * core.head_dim]
    if builder.plan.entry.mode == "carry":
        projected = _all_normed(builder, core, widths)
    else:
        projected = builder.joined(builder.entry())
    builder.summed(attend(builder, core, projected, widths))


def attend(builder: Builder, core: Attention, projected: str, widths: list[int]) -> str:
    """Attention over rows [S, q | k | v] of these widths, over state inputs and outputs: [S, q]."""
    head_dim, keys = core.head_dim, widths[1] // core.head_dim
    total, seqlens, rows = "total", "seqlens_k", ""
    if core.head_norm in ("rms", "layer"):
        query, key, value = builder.split(projected, widths)
        query = _head_norm(builder, core, query, "q_norm", widths[0] // head_dim)
        key = _head_norm(builder, core, key, "k_norm", keys)
        projected = builder.node("Concat", [query, key, value], axis=-1)[0]
    projected = builder.seam(projected, "projected", sum(widths))
    declare_state(builder, core, keys)
    one_block = head_dim <= ONE_BLOCK_HEAD_DIM
    if builder.exact:
        projected, total, seqlens, rows = _even(builder, projected, 0 if one_block else EXACT_POSITIONS - 1)
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
    inputs = [
        builder.reshape(projected, [1, -1, sum(widths)]),
        "",
        "",
        "past_key",
        "past_value",
        seqlens,
        total,
        *tables,
    ]
    if core.sinks:
        inputs += ["", "", builder.weight("sinks", [widths[0] // head_dim])]
    elif builder.exact and not one_block:
        inputs += ["", "", builder.constants([NO_SINK] * (widths[0] // head_dim))]
    builder.node_to(
        ["by_row", "present_key", "present_value"], "GroupQueryAttention", inputs, domain=MICROSOFT, **attributes
    )
    attended = builder.reshape("by_row", [-1, widths[0]])
    if rows:
        zero = builder.shape([0])
        attended = builder.node("Slice", [attended, zero, rows, zero])[0]
    return builder.seam(attended, "attended", widths[0])


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


def _even(builder: Builder, projected: str, positions: int) -> tuple[str, str, str, str]:
    """Pad with zero rows to an even number of rows and at least `positions` positions.

    Returns the padded rows, their total and seqlens_k, and the number of rows before. The rows' keys and values go to
    positions beyond the others, where the session's next rows overwrite them.
    """
    rows = builder.node("Shape", [projected], start=0, end=1)[0]
    two, added = builder.shape([2]), builder.shape([0])
    if positions:
        total = builder.node("Cast", ["total"], to=TensorProto.INT64)[0]
        missing = builder.node("Sub", [builder.shape([positions]), total])[0]
        added = builder.node("Max", [missing, added])[0]
    odd = builder.node("Mod", [builder.node("Add", [rows, added])[0], two])[0]
    added = builder.node("Add", [added, odd])[0]
    pads = builder.node("Concat", [builder.shape([0, 0]), added, builder.shape([0])], axis=0)[0]
    padded = builder.node("Pad", [projected, pads])[0]
    narrow = builder.node("Cast", [added], to=TensorProto.INT32)[0]
    padded_total = builder.node("Add", ["total", narrow])[0]
    return padded, padded_total, builder.node("Add", ["seqlens_k", narrow])[0], rows


def _head_norm(builder: Builder, core: Attention, rows: str, slot: str, heads: int) -> str:
    dim, epsilon = core.head_dim, builder.model.epsilon
    by_head = builder.reshape(rows, [-1, heads, dim])
    if core.head_norm == "rms":
        scale = builder.weight(slot, [dim])
        normed = builder.node("SimplifiedLayerNormalization", [by_head, scale], axis=-1, epsilon=epsilon)[0]
    else:
        ones = builder.constants([1.0] * dim)
        plain = builder.node("LayerNormalization", [by_head, ones], axis=-1, epsilon=epsilon)[0]
        normed = builder.node("Mul", [plain, builder.weight(slot, [heads, dim])])[0]
    return builder.reshape(normed, [-1, heads * dim])
