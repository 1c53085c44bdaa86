"""The usual segments of a dense decoder; a family's file changes what it does differently."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ganglion.partitioner.families.model import (
    Model,
    Split,
)
from ganglion.partitioner.families.plans import (
    Attention,
    Entry,
    GatedMlp,
    Head,
    HeadNorm,
    Linear,
    Norm,
    SegmentPlan,
    Vector,
)

ATTENTION: Final = "model.layers.{layer}.self_attn."
MLP: Final = "model.layers.{layer}.mlp."


# The usual segments. A family's file changes what it does differently with `dataclasses.replace`.


def norm(model: Model, name: str, *, slot: str = "norm") -> Norm:
    """The model's kind of norm over a row, with the tensor `name` (without ".weight")."""
    return Norm(Vector(slot, f"{name}.weight", model.hidden, model.norm_add), model.norm_kind)


def layer_norm_names(name: str) -> str:
    """The tensor of a layer's norm."""
    return "model.layers.{layer}." + name


def attention(model: Model, split: Split, layer: int) -> SegmentPlan:
    """Attention of dense decoders: groups are key-value heads with the query heads that read them."""
    queries = model.queries * model.head_dim
    sizes = {"q": queries, "k": model.head_dim, "v": model.head_dim}
    window, rope = model.windows[layer], model.layer_ropes[layer]
    turned = "" if rope == "default" else f"-{rope or 'norope'}"
    return SegmentPlan(
        kind="attention" + (f"-window{window}" if window else "") + turned,
        axis="heads",
        groups=split.geometry.head_groups,
        entry=Entry(norm=norm(model, layer_norm_names("input_layernorm")), scale=model.residual_scale),
        core=Attention(
            queries=model.queries,
            head_dim=model.head_dim,
            rope=rope,
            interleaved=model.rope_interleaved,
            window=window,
            scale=model.attention_scale,
            softcap=model.attention_softcap,
        ),
        joined=tuple(
            Linear(name, f"{ATTENTION}{name}_proj", size * model.kv_heads, model.hidden, size, model.query_bias)
            for name, size in sizes.items()
        ),
        summed=Linear("o", f"{ATTENTION}o_proj", model.hidden, queries * model.kv_heads, queries, model.output_bias),
    )


def mlp(model: Model, split: Split) -> SegmentPlan:
    """Gated MLP: groups are runs of columns, padded with zero columns where the intermediate size does not divide."""
    width = split.column_width
    return SegmentPlan(
        kind="mlp",
        axis="columns",
        groups=split.geometry.column_groups,
        entry=Entry(norm=norm(model, layer_norm_names("post_attention_layernorm")), scale=model.residual_scale),
        core=GatedMlp(model.activation),
        joined=tuple(
            Linear(name, f"{MLP}{name}_proj", model.intermediate, model.hidden, width, model.mlp_bias)
            for name in ("gate", "up")
        ),
        summed=Linear("down", f"{MLP}down_proj", model.hidden, model.intermediate, width, model.mlp_bias),
    )


def head(model: Model, split: Split) -> SegmentPlan:
    """The final norm and the output matrix (the embedding's own when they are tied), by runs of vocabulary rows."""
    tensor = "model.embed_tokens" if model.tied else "lm_head"
    return SegmentPlan(
        kind="head",
        axis="columns",
        groups=split.geometry.vocab_groups,
        entry=Entry(norm=norm(model, "model.norm"), scale=model.residual_scale),
        core=Head(model.logit_scale, model.logit_softcap),
        joined=(Linear("output", tensor, model.vocab, model.hidden, split.geometry.vocab_group_rows),),
    )


# What several families do.


def with_norm(plan: SegmentPlan, model: Model, name: str) -> SegmentPlan:
    """The segment with another norm before its product."""
    return replace(plan, entry=replace(plan.entry, norm=norm(model, name)))


def head_normed(plan: SegmentPlan, model: Model) -> SegmentPlan:
    """The attention `plan` with a root-mean-square norm over each query and key head."""
    vectors = tuple(Vector(f"{n}_norm", f"{ATTENTION}{n}_norm.weight", model.head_dim, model.norm_add) for n in "qk")
    return with_head_norm(replace(plan, vectors=vectors), "rms")


def with_head_norm(plan: SegmentPlan, head_norm: HeadNorm) -> SegmentPlan:
    """The attention `plan` with another norm of queries and keys; their weights are the caller's."""
    if not isinstance(plan.core, Attention):
        raise TypeError(f"segment {plan.kind} is no attention")
    return replace(plan, core=replace(plan.core, head_norm=head_norm))
