"""Qwen3 dense: a norm over each query and key head, and a head dimension of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import ATTENTION, Family, Model, Split, attention, head, mlp, read_dense
from ganglion.partitioner.families.plans import SegmentPlan, Vector
from ganglion.wire.errors import Unsupported


def _read(config: Config) -> Model:
    if config.flag("use_sliding_window", False) or "sliding_attention" in config.names("layer_types"):
        raise Unsupported(f"{config.where}: sliding-window attention is not supported", param="use_sliding_window")
    biased = config.flag("attention_bias", False)
    return read_dense(config, family="qwen3", head_dim=128, query_bias=biased, output_bias=biased)


def head_normed(plan: SegmentPlan, model: Model) -> SegmentPlan:
    """The attention `plan` with a root-mean-square norm over each query and key head."""
    norms = tuple(Vector(f"{n}_norm", f"{ATTENTION}{n}_norm.weight", model.head_dim) for n in "qk")
    return replace(plan, vectors=norms, core=replace(plan.core, head_norm="rms"))


def _layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    return head_normed(attention(model, split, layer), model), mlp(model, split)


QWEN3: Final = Family(name="qwen3", architectures=("Qwen3ForCausalLM",), read=_read, layer=_layer, head=head)
