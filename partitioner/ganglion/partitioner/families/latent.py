"""Multi-head latent attention (arXiv 2405.04434): the plan of its segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ganglion.partitioner.families.base import ATTENTION, layer_norm_names, norm
from ganglion.partitioner.families.model import Model, Split
from ganglion.partitioner.families.plans import Attention, Core, Entry, Linear, SegmentPlan, Vector

EPSILON: Final = 1e-6  # of the norms of latents, whatever the model's own is


@dataclass(frozen=True)
class Latent(Core):
    """Attention whose keys and values come from a normalized latent of `rank` numbers, which every device makes.

    inner: over heads of `turned` + `plain` dimensions, of which the first are turned by the rope; the turned part of
    keys is one for all heads. value: dimensions of a value head. query_rank: of the queries' own latent, 0 for none.
    Replicated are latent (with the keys' turned part behind it) and query_latent, joined q and kv (of each head the
    plain part and the value); vectors are latent_norm and query_norm.
    """

    inner: Attention
    rank: int
    plain: int
    turned: int
    value: int
    query_rank: int = 0
    epsilon: float = EPSILON

    @property
    def attention(self) -> Attention:
        """The attention inside it."""
        return self.inner

    @property
    def head_dim(self) -> int:
        """Dimensions of a query or key head."""
        return self.plain + self.turned


@dataclass(frozen=True)
class LatentSizes:
    """Figures of latent attention as config.json has them; query_rank 0 for queries without a latent."""

    rank: int
    query_rank: int
    plain: int
    turned: int
    value: int


def latent_attention(model: Model, sizes: LatentSizes, split: Split, layer: int) -> SegmentPlan:
    """Latent attention: groups are heads, what comes before them is in every share."""
    rank, query_rank, heads = sizes.rank, sizes.query_rank, model.heads
    vectors = [Vector("latent_norm", f"{ATTENTION}kv_a_layernorm.weight", rank)]
    down = rank + sizes.turned
    replicated = [Linear("latent", f"{ATTENTION}kv_a_proj_with_mqa", down, model.hidden, down, model.query_bias)]
    queries, inputs = "q_proj", model.hidden
    if query_rank:
        vectors.append(Vector("query_norm", f"{ATTENTION}q_a_layernorm.weight", query_rank))
        replicated.append(
            Linear("query_latent", f"{ATTENTION}q_a_proj", query_rank, model.hidden, query_rank, model.query_bias)
        )
        queries, inputs = "q_b_proj", query_rank
    both = sizes.plain + sizes.value
    return SegmentPlan(
        kind="latent",
        axis="heads",
        groups=split.geometry.head_groups,
        entry=Entry(norm=norm(model, layer_norm_names("input_layernorm")), scale=model.residual_scale),
        core=Latent(
            inner=Attention(
                queries=1,
                head_dim=model.head_dim,
                rope=model.layer_ropes[layer],
                interleaved=True,
                scale=model.attention_scale,
            ),
            rank=rank,
            plain=sizes.plain,
            turned=sizes.turned,
            value=sizes.value,
            query_rank=query_rank,
        ),
        vectors=tuple(vectors),
        replicated=tuple(replicated),
        joined=(
            Linear("q", f"{ATTENTION}{queries}", heads * model.head_dim, inputs, model.head_dim),
            Linear("kv", f"{ATTENTION}kv_b_proj", heads * both, rank, both),
        ),
        summed=Linear("o", f"{ATTENTION}o_proj", model.hidden, heads * sizes.value, sizes.value, model.output_bias),
    )
