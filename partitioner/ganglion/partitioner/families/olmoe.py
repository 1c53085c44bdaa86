"""OLMoE: many small experts, and queries and keys normalized over all heads as in OLMo 2."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import MLP, attention, head
from ganglion.partitioner.families.experts import MixtureModel, Routing, mixture, named, read_mixture
from ganglion.partitioner.families.model import Family, Split
from ganglion.partitioner.families.olmo2 import all_normed
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.reading import filled, refuse


def _read(config: Config) -> MixtureModel:
    config = filled(config, rms_norm_eps=1e-5, max_position_embeddings=4096)
    refuse(config, "clip_qkv")
    biased = config.flag("attention_bias", False)
    return read_mixture(
        config,
        family="olmoe",
        experts=config.whole("num_experts", 64, at_most=4096),
        routing=Routing(
            config.whole("num_experts_per_tok", 8, at_most=4096),
            softmax="chosen" if config.flag("norm_topk_prob", False) else "all",
        ),
        query_bias=biased,
        output_bias=biased,
    )


def _layer(model: MixtureModel, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    experts = mixture(model, split, router=f"{MLP}gate", stored=named(f"{MLP}experts.{{expert}}"))
    return *all_normed(attention(model, split, layer), model), experts


OLMOE: Final = Family(name="olmoe", architectures=("OlmoeForCausalLM",), read=_read, layer=_layer, head=head)
