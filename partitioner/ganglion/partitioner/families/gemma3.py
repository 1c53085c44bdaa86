"""Gemma 3, its text: as Gemma 2 with head norms but no soft caps of scores; one layer in six sees all; two ropes."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import attention, head_normed
from ganglion.partitioner.families.gemma2 import gemma_facts, gemma_filled, gemma_mlp
from ganglion.partitioner.families.layer_ropes import with_ropes_by_layer_type
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.post_norms import post_normed, post_normed_head
from ganglion.partitioner.families.reading import read_dense, read_layer_types, refuse, windows_of


def _read(config: Config) -> Model:
    config = gemma_filled(config, vocab_size=262208, max_position_embeddings=131072, sliding_window_pattern=6)
    refuse(config, "attn_logit_softcapping")  # transformers ignores it here
    pattern = config.whole("sliding_window_pattern")
    sliding = read_layer_types(config, lambda layer: bool((layer + 1) % pattern))
    model = read_dense(config, family="gemma3", windows=windows_of(config, sliding), ropes=(), **gemma_facts(config))
    local = config.number("rope_local_base_freq", 10000.0)
    return with_ropes_by_layer_type(model, config, sliding, full_theta=1000000.0, sliding_theta=local)


def _layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    first = head_normed(attention(model, split, layer), model)
    return post_normed(model, layer, first, gemma_mlp(model, split))


GEMMA3: Final = Family(
    name="gemma3", architectures=("Gemma3ForCausalLM",), read=_read, layer=_layer, head=post_normed_head
)
