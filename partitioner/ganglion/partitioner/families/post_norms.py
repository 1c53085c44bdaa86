"""Norms of what a half of a layer adds to the residual, after the sum over devices."""

from __future__ import annotations

from dataclasses import replace

from ganglion.partitioner.families.base import head, layer_norm_names, norm
from ganglion.partitioner.families.model import Model, Split
from ganglion.partitioner.families.plans import SegmentPlan


def with_post_norm(plan: SegmentPlan, model: Model, name: str) -> SegmentPlan:
    """The segment with a norm of what the sum before it adds to the residual."""
    return replace(plan, entry=replace(plan.entry, post=norm(model, name, slot="post_norm")))


def post_normed(model: Model, layer: int, first: SegmentPlan, *others: SegmentPlan) -> tuple[SegmentPlan, ...]:
    """A layer's segments with norms after attention and after the MLP, which is the last segment.

    The norm after the MLP is the entry of the next layer's first segment, or of the head; layer 0 has none before it.
    """
    *between, last = others
    if layer:
        first = with_post_norm(first, model, f"model.layers.{layer - 1}.post_feedforward_layernorm")
    else:
        first = replace(first, kind=f"{first.kind}-first")
    return (first, *between, with_post_norm(last, model, layer_norm_names("post_attention_layernorm")))


def post_normed_head(model: Model, split: Split) -> SegmentPlan:
    """The head after a layer with `post_normed` segments."""
    return with_post_norm(head(model, split), model, f"model.layers.{model.layers - 1}.post_feedforward_layernorm")
