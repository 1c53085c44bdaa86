"""Graphs of latent attention: keys and values of every head from one latent row, which each device makes for itself.

The kernel sees plain heads: of queries and keys the turned part first, as its rotary embedding takes the first
dimensions, and values with zeros up to the keys' dimension, which are cut off again. The key-value cache holds heads,
not latents: a share's cache is that of its heads.
"""

from __future__ import annotations

from onnx import TensorProto

from ganglion.partitioner.families.latent import Latent
from ganglion.partitioner.graphs.attention import attend
from ganglion.partitioner.graphs.builder import Builder


def build_latent(builder: Builder, core: Latent) -> None:
    """Latents, queries, keys and values; attention; the partial sum of the output matrix."""
    heads, head_dim = builder.count, core.head_dim
    rows = builder.entry()
    replicated = {matrix.slot: matrix for matrix in builder.plan.replicated}
    joined = {matrix.slot: matrix for matrix in builder.plan.joined}
    latent, turned = builder.split(builder.replicated(rows, replicated["latent"]), [core.rank, core.turned])
    latent = _normed(builder, core, latent, "latent_norm", core.rank)
    if core.query_rank:
        inner = builder.replicated(rows, replicated["query_latent"])
        rows = _normed(builder, core, inner, "query_norm", core.query_rank)
    query = builder.reshape(builder.joined(rows, (joined["q"],)), [-1, heads, head_dim])
    plain, turning = builder.split(query, [core.plain, core.turned])
    query = builder.node("Concat", [turning, plain], axis=-1)[0]
    both = builder.reshape(builder.joined(latent, (joined["kv"],)), [-1, heads, core.plain + core.value])
    plain, value = builder.split(both, [core.plain, core.value])
    every = builder.node("Expand", [builder.reshape(turned, [-1, 1, core.turned]), builder.shape([1, heads, 1])])[0]
    key = builder.node("Concat", [every, plain], axis=-1)[0]
    if core.value < head_dim:
        value = builder.node("Pad", [value, builder.shape([0, 0, 0, 0, 0, head_dim - core.value])])[0]
    width = heads * head_dim
    packed = builder.node("Concat", [builder.reshape(one, [-1, width]) for one in (query, key, value)], axis=-1)[0]
    attended = attend(builder, core.attention, packed, [width] * 3)
    if core.value < head_dim:
        by_head = builder.reshape(attended, [-1, heads, head_dim])
        by_head = builder.split(by_head, [core.value, head_dim - core.value])[0]
        attended = builder.reshape(by_head, [-1, heads * core.value])
    builder.summed(attended)


def _normed(builder: Builder, core: Latent, rows: str, slot: str, length: int) -> str:
    weight = builder.external(slot, TensorProto.FLOAT, [length], builder.offsets[slot])
    return builder.node("SimplifiedLayerNormalization", [rows, weight], axis=-1, epsilon=core.epsilon)[0]
