"""ONNX graphs of segments: pure functions of plan, counts and numeric class. Weights lie outside.

Built fused, so the optimizer has nothing to add (`SkipSimplifiedLayerNormalization`, `GroupQueryAttention`,
`MatMulNBits`). Inputs and outputs are those of `Manifest`'s docstring.

Bit-equality of the exact classes, measured on ONNX Runtime 1.31.1 (tests/partitioner/test_exact.py holds it): a product
whose outputs are joined equals the groups' own products, for fp32 and for products of integers at any width, for
MatMulNBits at widths that are multiples of 4; all give a row the same bits alone and in any batch (MatMulNBits at
blocks of at most 32). Only sums over inputs depend on the split, so
there each group is its own product, and products are added in float64. GroupQueryAttention works through the rows in
blocks of an even size (twice the head dimension, less where the second-level cache is small); a row that is alone in
its block gets other bits, so exact graphs give attention an even number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ganglion.partitioner.families.experts import Mixture
from ganglion.partitioner.families.latent import Latent
from ganglion.partitioner.families.model import Model
from ganglion.partitioner.families.plans import Attention, GatedMlp, Head, Projection, SegmentPlan
from ganglion.partitioner.graphs.attention import build_attention, build_projection
from ganglion.partitioner.graphs.builder import OPSET, Builder
from ganglion.partitioner.graphs.dense import build_head, build_mlp
from ganglion.partitioner.graphs.latent import build_latent
from ganglion.partitioner.graphs.mixture import build_mixture, build_routing
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.wire.nouns import Segment
from ganglion.wire.shares import Groups

__all__ = ["OPSET", "build_graphs"]

BUILDERS: Final[dict[type, Callable[[Builder, Any], None]]] = {
    Attention: build_attention,
    Projection: build_projection,
    GatedMlp: build_mlp,
    Head: build_head,
    Latent: build_latent,
    Mixture: build_mixture,
}


def build_graphs(plan: SegmentPlan, segment: Segment, share: Groups, model: Model, recipe: Recipe) -> tuple[bytes, ...]:
    """The graphs of a share of these groups, as ONNX bytes; equal arguments give equal bytes.

    They depend on how many groups they are only, of experts of two formats on how many are of each. Three where it
    attends, two where its groups are experts.

    Without a group: what a device does that has no group of the segment: it keeps the residual as the others have it,
    and leaves zeros (or, in mode keep, what it has not yet exchanged); of experts it chooses all the same.
    """
    builder = Builder(plan, segment, share, model, recipe)
    if builder.count:
        BUILDERS[type(plan.core)](builder, plan.core)
    elif isinstance(plan.core, Mixture) and plan.axis == "experts":
        build_routing(builder, plan.core)
    else:
        builder.empty()
    return builder.finish()
