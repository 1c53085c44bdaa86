"""Mixtral: Mistral's layers with experts; the weights of a token's experts add up to one."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import attention, head
from ganglion.partitioner.families.experts import MixtureModel, Routing, mixture, named, read_mixture
from ganglion.partitioner.families.model import Family, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.reading import filled, windows_of

BLOCK: Final = "model.layers.{layer}.block_sparse_moe"


def _read(config: Config) -> MixtureModel:
    config = filled(config, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=131072)
    slides = (config.has("sliding_window"),) * config.whole("num_hidden_layers", at_most=4096)
    return read_mixture(
        config,
        family="mixtral",
        experts=config.whole("num_local_experts", 8, at_most=4096),
        routing=Routing(config.whole("num_experts_per_tok", 2, at_most=4096), softmax="chosen"),
        windows=windows_of(config, slides),
    )


def _layer(model: MixtureModel, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    stored = named(f"{BLOCK}.experts.{{expert}}", "w1", "w3", "w2")
    return attention(model, split, layer), mixture(model, split, router=f"{BLOCK}.gate", stored=stored)


MIXTRAL: Final = Family(name="mixtral", architectures=("MixtralForCausalLM",), read=_read, layer=_layer, head=head)
