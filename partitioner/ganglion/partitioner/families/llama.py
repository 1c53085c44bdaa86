"""Llama 2, 3, 3.1, 3.2 and what is built like them: packed attention, rope scalings as in `rope`."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import attention, head, mlp
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.reading import filled, read_dense


def _read(config: Config) -> Model:
    config = filled(config, max_position_embeddings=2048)
    biased = config.flag("attention_bias", False)
    return read_dense(
        config, family="llama", query_bias=biased, output_bias=biased, mlp_bias=config.flag("mlp_bias", False)
    )


def plain_layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    """Attention, then the MLP: what families have that differ in the facts of `Model` alone."""
    return attention(model, split, layer), mlp(model, split)


LLAMA: Final = Family(name="llama", architectures=("LlamaForCausalLM",), read=_read, layer=plain_layer, head=head)
