"""Llama 2, 3, 3.1, 3.2 and what is built like them: packed attention, rope scalings as in `rope`."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import Family, Model, attention, mlp, read_dense


def _read(config: Config) -> Model:
    return read_dense(
        config,
        family="llama",
        head_dim=None,
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
        query_key_norm=False,
    )


LLAMA: Final = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read=_read,
    layer=lambda model, split: (attention(model, split), mlp(model, split)),
)
