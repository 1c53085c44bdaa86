"""Command-R: attention and MLP of a layer read the same rows, layer norms, interleaved rope, scaled logits.

The halves have one norm and one sum, so the devices exchange once a layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import (
    ATTENTION,
    attention,
    head,
    layer_norm_names,
    mlp,
    with_head_norm,
    with_norm,
)
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import GroupVector, SegmentPlan
from ganglion.partitioner.families.reading import filled, read_dense


def _read(config: Config) -> Model:
    config = filled(config, rope_theta=500000.0)
    return read_cohere(config, "cohere", head_norms=config.flag("use_qk_norm", False))


def read_cohere(config: Config, family: str, **facts: Any) -> Model:
    """What Cohere's first and second generation have in common, and `facts`."""
    config = filled(config, tie_word_embeddings=True, layer_norm_eps=1e-5, max_position_embeddings=8192)
    biased = config.flag("attention_bias", False)
    return read_dense(
        config,
        family=family,
        norm_kind="layer",
        rope_interleaved=True,
        epsilon=config.number("layer_norm_eps"),
        query_bias=biased,
        output_bias=biased,
        logit_scale=config.number("logit_scale", 0.0625),
        **facts,
    )


def parallel_layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    """Attention, and an MLP of the same rows."""
    first = replace(attention(model, split, layer), exchange=False)
    if model.head_norms:
        first = with_head_norm(replace(first, grouped=_head_norms(model)), "layer")
    second = with_norm(mlp(model, split), model, layer_norm_names("input_layernorm"))
    return first, replace(second, entry=replace(second.entry, mode="keep"))


def _head_norms(model: Model) -> tuple[GroupVector, ...]:
    heads = {"q": (model.heads, model.queries), "k": (model.kv_heads, 1)}
    return tuple(
        GroupVector(
            f"{name}_norm", f"{ATTENTION}{name}_norm.weight", (count, model.head_dim), of_group * model.head_dim
        )
        for name, (count, of_group) in heads.items()
    )


COHERE: Final = Family(name="cohere", architectures=("CohereForCausalLM",), read=_read, layer=parallel_layer, head=head)
