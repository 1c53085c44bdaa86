"""Qwen3 with experts: Qwen3's attention; some layers may be dense."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import MLP, attention, head, head_normed, mlp
from ganglion.partitioner.families.experts import MixtureModel, Routing, mixture, named, read_mixture
from ganglion.partitioner.families.model import Family, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.reading import filled, windows_of


def _read(config: Config) -> MixtureModel:
    config = filled(config, num_key_value_heads=4, max_position_embeddings=32768, sliding_window=4096)
    biased = config.flag("attention_bias", False)
    step, dense = config.whole("decoder_sparse_step", 1), config.ids("mlp_only_layers")
    layers = range(config.whole("num_hidden_layers", at_most=4096))
    slides = config.flag("use_sliding_window", False) and config.has("sliding_window")
    counted = "num_experts" if config.has("num_experts") else "num_local_experts"
    return read_mixture(
        config,
        family="qwen3_moe",
        experts=config.whole(counted, 128, at_most=4096),
        intermediate=config.whole("moe_intermediate_size", 768),
        sparse=tuple((layer + 1) % step == 0 and layer not in dense for layer in layers),
        routing=Routing(
            config.whole("num_experts_per_tok", 8, at_most=4096),
            softmax="chosen" if config.flag("norm_topk_prob", False) else "all",
        ),
        windows=windows_of(config, (slides for _ in layers)),
        query_bias=biased,
        output_bias=biased,
    )


def _layer(model: MixtureModel, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    attends = head_normed(attention(model, split, layer), model)
    if not model.sparse[layer]:
        return attends, mlp(model, split)
    return attends, mixture(model, split, router=f"{MLP}gate", stored=named(f"{MLP}experts.{{expert}}"))


QWEN3_MOE: Final = Family(name="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), read=_read, layer=_layer, head=head)
