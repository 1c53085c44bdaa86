"""OLMo 2: no norms before the halves but after them, and queries and keys normalized over all heads.

The norm over all heads needs the sums of squares of every device, so attention is two segments with an exchange of two
numbers a row between them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import ATTENTION, attention, mlp, with_head_norm
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import Entry, GroupVector, Projection, SegmentPlan
from ganglion.partitioner.families.post_norms import post_normed, post_normed_head
from ganglion.partitioner.families.reading import filled, read_dense


def _read(config: Config) -> Model:
    config = olmo_filled(config)
    return read_dense(config, family="olmo2", **olmo_facts(config))


def olmo_filled(config: Config) -> Config:
    """The configuration with the defaults of OLMo 2 and 3."""
    return filled(config, rms_norm_eps=1e-5, max_position_embeddings=2048)


def olmo_facts(config: Config) -> dict[str, Any]:
    """The biases of OLMo 2 and 3."""
    biased = config.flag("attention_bias", False)
    return {"query_bias": biased, "output_bias": biased}


def all_normed(plan: SegmentPlan, model: Model) -> tuple[SegmentPlan, SegmentPlan]:
    """The attention `plan` in two: the projections, and attention on what they carry, normalized over all heads."""
    queries = model.queries * model.head_dim
    widths = {"q": (model.heads * model.head_dim, queries), "k": (model.kv_heads * model.head_dim, model.head_dim)}
    projection = replace(
        plan,
        kind="projection",
        core=Projection(),
        summed=None,
        width=2,
        carry=queries + 2 * model.head_dim,
    )
    norms = tuple(
        GroupVector(f"{name}_norm", f"{ATTENTION}{name}_norm.weight", (length,), width)
        for name, (length, width) in widths.items()
    )
    attend = replace(plan, entry=Entry(mode="carry"), grouped=norms, joined=())
    return projection, with_head_norm(attend, "all")


def olmo_layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    """Projection, attention, MLP; norms only after attention and MLP."""
    first, second, last = (*all_normed(attention(model, split, layer), model), mlp(model, split))
    first, last = (replace(plan, entry=replace(plan.entry, norm=None)) for plan in (first, last))
    return post_normed(model, layer, first, second, last)


OLMO2: Final = Family(
    name="olmo2", architectures=("Olmo2ForCausalLM",), read=_read, layer=olmo_layer, head=post_normed_head
)
