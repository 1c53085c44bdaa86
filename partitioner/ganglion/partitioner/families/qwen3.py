"""Qwen3 dense: a norm over each query and key head, and a head dimension of its own."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import Family, Model, attention, mlp, read_dense
from ganglion.wire.errors import Unsupported


def _read(config: Config) -> Model:
    if config.flag("use_sliding_window", False) or "sliding_attention" in config.names("layer_types"):
        raise Unsupported(f"{config.where}: sliding-window attention is not supported", param="use_sliding_window")
    return read_dense(
        config,
        family="qwen3",
        head_dim=128,
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=False,
        query_key_norm=True,
    )


QWEN3: Final = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read=_read,
    layer=lambda model, split: (attention(model, split), mlp(model, split)),
)
