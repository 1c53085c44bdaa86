"""Qwen3 dense: a norm over each query and key head, a head dimension of its own, windows as Qwen2."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import attention, head, head_normed, mlp
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.qwen2 import qwen_filled, qwen_windows
from ganglion.partitioner.families.reading import read_dense


def _read(config: Config) -> Model:
    biased = config.flag("attention_bias", False)
    return read_dense(
        qwen_filled(config),
        family="qwen3",
        head_dim=128,
        windows=qwen_windows(config),
        query_bias=biased,
        output_bias=biased,
    )


def _layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    return head_normed(attention(model, split, layer), model), mlp(model, split)


QWEN3: Final = Family(name="qwen3", architectures=("Qwen3ForCausalLM",), read=_read, layer=_layer, head=head)
