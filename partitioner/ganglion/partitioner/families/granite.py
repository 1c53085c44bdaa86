"""Granite: as Llama, with multipliers of the embedding, of scores, of what a half adds, and a divisor of logits."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import head
from ganglion.partitioner.families.llama import plain_layer
from ganglion.partitioner.families.model import Family, Model
from ganglion.partitioner.families.reading import filled, read_dense


def _read(config: Config) -> Model:
    config = filled(config, max_position_embeddings=2048)
    biased = config.flag("attention_bias", False)
    return read_dense(
        config,
        family="granite",
        query_bias=biased,
        output_bias=biased,
        mlp_bias=config.flag("mlp_bias", False),
        attention_scale=config.number("attention_multiplier", 1.0),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logit_scale=1.0 / config.number("logits_scaling", 1.0),
    )


GRANITE: Final = Family(name="granite", architectures=("GraniteForCausalLM",), read=_read, layer=plain_layer, head=head)
