"""gpt-oss: windows in every other layer, a sink logit per query head, and experts with biases and a clamped swiglu.

The router's weights are a softmax over the chosen experts' logits. Checkpoints stack the experts; MXFP4 is undone where
the checkpoint is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import ATTENTION, MLP, attention, head
from ganglion.partitioner.families.experts import MixtureModel, Routing, Stacked, mixture, read_mixture
from ganglion.partitioner.families.model import Family, Split
from ganglion.partitioner.families.plans import Attention, GroupVector, SegmentPlan
from ganglion.partitioner.families.reading import filled, read_layer_types, windows_of

ROPE: Final = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class GptOssModel(MixtureModel):
    """A mixture whose experts multiply gate * sigmoid(alpha * gate) with up + 1, both within `limit`."""

    alpha: float
    limit: float


def _read(config: Config) -> GptOssModel:
    config = filled(
        config, num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=150000.0,
        sliding_window=128,
    )  # fmt: skip
    if not (config.has("rope_parameters") or config.has("rope_scaling")):
        config = filled(config, rope_parameters=ROPE)
    biased = config.flag("attention_bias", True)
    sliding = read_layer_types(config, lambda layer: layer % 2 == 0)
    model = read_mixture(
        config,
        family="gpt_oss",
        head_dim=64,
        experts=config.whole("num_local_experts", 128, at_most=4096),
        routing=Routing(config.whole("num_experts_per_tok", 4, at_most=4096), softmax="chosen"),
        windows=windows_of(config, sliding),
        query_bias=biased,
        output_bias=biased,
    )
    return GptOssModel(
        **vars(model), alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0)
    )


def with_sinks(plan: SegmentPlan, model: MixtureModel) -> SegmentPlan:
    """The attention `plan` with a sink logit for each query head."""
    if not isinstance(plan.core, Attention):
        raise TypeError(f"segment {plan.kind} is no attention")
    sinks = GroupVector("sinks", f"{ATTENTION}sinks", (model.heads,), model.queries)
    return replace(plan, grouped=(*plan.grouped, sinks), core=replace(plan.core, sinks=True))


def _layer(model: GptOssModel, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    experts = mixture(
        model,
        split,
        router=f"{MLP}router",
        stored=Stacked(f"{MLP}experts.gate_up_proj", f"{MLP}experts.down_proj"),
        router_bias=True,
        bias=True,
        alpha=model.alpha,
        beta=1.0,
        limit=model.limit,
    )
    return with_sinks(attention(model, split, layer), model), experts


GPT_OSS: Final = Family(name="gpt_oss", architectures=("GptOssForCausalLM",), read=_read, layer=_layer, head=head)
