"""DeepSeek-V2 and V2-Lite: latent attention, a few dense layers, then experts and shared ones (arXiv 2405.04434)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import MLP, head, mlp
from ganglion.partitioner.families.experts import MixtureModel, Routing, mixture, named, read_mixture
from ganglion.partitioner.families.latent import LatentSizes, latent_attention
from ganglion.partitioner.families.model import Family, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.reading import HEAD_QUANTUM, filled, refuse, variants
from ganglion.partitioner.rope import read_ropes
from ganglion.wire.errors import InvalidDocument, Unsupported


@dataclass(frozen=True, kw_only=True)
class DeepseekModel(MixtureModel):
    """A mixture with latent attention."""

    latent: LatentSizes

    @property
    def block_inputs(self) -> int:
        """What a block of a fast class must divide: values are narrower than keys."""
        return math.gcd(self.latent.value, self.hidden)


def _read(config: Config) -> DeepseekModel:
    config = filled(config, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    config = filled(config, max_position_embeddings=2048)
    refuse(config, "norm_topk_prob")
    heads = config.whole("num_attention_heads", at_most=4096)
    if config.whole("num_key_value_heads", heads, at_most=4096) != heads:
        raise Unsupported(f"{config.where}: latent attention with fewer key-value heads", param="num_key_value_heads")
    sizes = LatentSizes(
        rank=config.whole("kv_lora_rank"),
        query_rank=_query_rank(config),
        plain=config.whole("qk_nope_head_dim", at_most=4096),
        turned=config.whole("qk_rope_head_dim", at_most=4096),
        value=config.whole("v_head_dim", at_most=4096),
    )
    head_dim = sizes.plain + sizes.turned
    if any(size % HEAD_QUANTUM for size in (sizes.plain, sizes.turned, sizes.value)) or sizes.value > head_dim:
        raise Unsupported(
            f"{config.where}: heads of {sizes.plain} plain and {sizes.turned} turned dimensions with values of "
            f"{sizes.value}; supported are multiples of {HEAD_QUANTUM}, and values of at most {head_dim}"
        )
    biased = config.flag("attention_bias", False)
    context = config.whole("max_position_embeddings", at_most=2**24)
    layers, dense = config.whole("num_hidden_layers", at_most=4096), config.fields.get("first_k_dense_replace", 0)
    if type(dense) is not int or dense < 0:
        raise InvalidDocument(f"{config.where}: first_k_dense_replace is {dense!r}, a number of layers is expected")
    if config.whole("moe_layer_freq", 1) != 1:
        raise Unsupported(f"{config.where}: moe_layer_freq other than 1", param="moe_layer_freq")
    model = read_mixture(
        Config(config.fields | {"head_dim": head_dim, "num_key_value_heads": heads}, config.where),
        family="deepseek",
        experts=config.whole("n_routed_experts", 64, at_most=4096),
        shared=config.whole("n_shared_experts", 2, at_most=4096),
        intermediate=config.whole("moe_intermediate_size", 1407),
        sparse=tuple(layer >= dense for layer in range(layers)),
        routing=_routing(config),
        ropes=(("default", variants(read_ropes(config, sizes.turned, context))),),
        attention_scale=_scale(config, head_dim),
        query_bias=biased,
        output_bias=biased,
        mlp_bias=config.flag("mlp_bias", False),
    )
    if model.mlp_bias:
        raise Unsupported(f"{config.where}: experts with biases", param="mlp_bias")
    return DeepseekModel(**vars(model), latent=sizes)


def _query_rank(config: Config) -> int:
    """0 where config.json says null; transformers takes 1536 where it says nothing."""
    if "q_lora_rank" in config.fields and config.fields["q_lora_rank"] is None:
        return 0
    return config.whole("q_lora_rank", 1536)


def _routing(config: Config) -> Routing:
    method, scores = config.text("topk_method", "greedy"), config.text("scoring_func", "softmax")
    if scores != "softmax":
        raise Unsupported(f"{config.where}: scoring_func {scores!r}; supported is softmax", param="scoring_func")
    facts: dict[str, Any] = {}
    if method == "group_limited_greedy":
        facts = {name: config.whole(field) for name, field in (("groups", "n_group"), ("chosen_groups", "topk_group"))}
    elif method != "greedy":
        raise Unsupported(
            f"{config.where}: topk_method {method!r}; supported are greedy and group_limited_greedy",
            param="topk_method",
        )
    return Routing(
        config.whole("num_experts_per_tok", at_most=4096), scale=config.number("routed_scaling_factor", 1.0), **facts
    )


def _scale(config: Config, head_dim: int) -> float:
    """Of the scores: yarn's magnitude for all dimensions goes in twice."""
    scale = 1 / math.sqrt(head_dim)
    rope = config.object("rope_scaling") or config.object("rope_parameters")
    if rope is None or rope.text("rope_type", rope.text("type", "default")) == "default":
        return scale
    weight = rope.fields.get("mscale_all_dim")
    factor = rope.number("factor", 1.0)
    if not weight or factor <= 1:
        return scale
    return scale * (0.1 * rope.number("mscale_all_dim") * math.log(factor) + 1.0) ** 2


def _layer(model: DeepseekModel, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    attends = latent_attention(model, model.latent, split, layer)
    if not model.sparse[layer]:
        return attends, mlp(model, split)
    experts = mixture(
        model,
        split,
        router=f"{MLP}gate",
        stored=named(f"{MLP}experts.{{expert}}"),
        stored_shared=named(f"{MLP}shared_experts"),
    )
    return attends, experts


DEEPSEEK: Final = Family(name="deepseek", architectures=("DeepseekV2ForCausalLM",), read=_read, layer=_layer, head=head)
