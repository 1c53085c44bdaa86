"""Attention over a session's kept keys and values, from the one GroupQueryAttention of a segment's second graph.

Query heads of a group are rows beside each other, so that grouped heads need no copy of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ganglion.agent.torch_executor.graph import Graph
from ganglion.wire.errors import Corrupt

# The other operators of such a graph pad rows for ONNX Runtime's kernel and cut them off again.
_PADDING = frozenset({"Shape", "Sub", "Max", "Mod", "Add", "Concat", "Pad", "Cast", "Slice", "Reshape", "Identity"})
_NO_SINK = -1e29  # a sink of less has no weight


@dataclass(frozen=True, slots=True)
class Attention:
    """heads, groups: of this share. window: positions that a row sees, 0 for all before it. scale: of scores."""

    heads: int
    groups: int
    head_dim: int
    rotary: bool
    interleaved: bool
    window: int
    scale: float
    softcap: float
    sinks: Tensor | None

    @property
    def projected(self) -> int:
        """Numbers a row that it takes."""
        return (self.heads + 2 * self.groups) * self.head_dim


def read_attention(graph: Graph, weights: memoryview, head_dim: int, device: torch.device) -> Attention:
    """What a segment's second graph computes; raises Corrupt when that is not one attention."""
    found = [node for node in graph.nodes if node.op == "GroupQueryAttention"]
    if len(found) != 1 or any(node.op not in _PADDING for node in graph.nodes if node is not found[0]):
        raise Corrupt(f"graph: {len(found)} attentions, expected 1 and nothing beside it")
    node = found[0]
    said = node.attributes
    sinks = None
    if len(node.inputs) > 11 and node.inputs[11]:
        values = graph.tensors[node.inputs[11]].read(weights)
        if np.any(values > _NO_SINK):
            sinks = torch.from_numpy(values.astype(np.float32)).to(device)
    return Attention(
        heads=said["num_heads"],
        groups=said["kv_num_heads"],
        head_dim=head_dim,
        rotary=bool(said.get("do_rotary", 0)),
        interleaved=bool(said.get("rotary_interleaved", 0)),
        window=max(0, said.get("local_window_size", 0)),
        scale=said.get("scale") or head_dim**-0.5,
        softcap=said.get("softcap", 0.0),
        sinks=sinks,
    )


def turned(rows: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding of the first dimensions of rows [S, heads, head_dim] by cos, sin [S, half] float32."""
    half = cos.shape[-1]
    wide = rows[..., : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        both = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = wide[..., :half], wide[..., half:]
        both = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    both = both.to(rows.dtype)
    return both if 2 * half == rows.shape[-1] else torch.cat((both, rows[..., 2 * half :]), dim=-1)


def mask(
    start: int, count: int, first: int, one: Attention, *, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """What rows start..start+count-1 see of positions first..start+count-1: [queries of a group * count, positions].

    0 or -inf; None when they see everything.
    """
    if count == 1 and not (one.window and start - first >= one.window):
        return None
    rows = torch.arange(start, start + count, device=device).unsqueeze(1)
    places = torch.arange(first, start + count, device=device).unsqueeze(0)
    seen = places <= rows
    if one.window:
        seen &= places > rows - one.window
    added = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return added.repeat(one.heads // one.groups, 1)


def attend(one: Attention, queries: Tensor, keys: Tensor, values: Tensor, added: Tensor | None) -> Tensor:
    """queries [S, heads, head_dim], keys and values [groups, positions, head_dim] -> [S, heads * head_dim]."""
    count, each = queries.shape[0], one.heads // one.groups
    rows = queries.reshape(count, one.groups, each, one.head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(one.groups, each * count, one.head_dim)
    if one.sinks is None and not one.softcap:
        found = F.scaled_dot_product_attention(
            rows.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), attn_mask=added, scale=one.scale
        )[0]
    else:
        found = _by_hand(one, rows, keys, values, added)
    return found.reshape(one.groups, each, count, one.head_dim).permute(2, 0, 1, 3).reshape(count, -1)


def _by_hand(one: Attention, rows: Tensor, keys: Tensor, values: Tensor, added: Tensor | None) -> Tensor:
    """With what the fused kernels do not know: soft caps and sinks."""
    scores = torch.matmul(rows, keys.transpose(1, 2)).float() * one.scale
    if one.softcap:
        scores = torch.tanh(scores / one.softcap) * one.softcap
    if added is not None:
        scores = scores + added
    if one.sinks is None:
        return torch.matmul(torch.softmax(scores, -1).to(values.dtype), values)
    each = one.heads // one.groups
    sinks = one.sinks.reshape(one.groups, each, 1).expand(-1, -1, rows.shape[1] // each).reshape(one.groups, -1, 1)
    weights = torch.softmax(torch.cat((scores, sinks), dim=-1), -1)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)
