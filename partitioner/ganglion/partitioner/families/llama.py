"""Llama 2, 3, 3.1, 3.2 and what is built like them: packed attention, rope scalings as in `rope`."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import Family, Model, attention, head, mlp, read_dense


def _read(config: Config) -> Model:
    biased = config.flag("attention_bias", False)
    return read_dense(
        config, family="llama", query_bias=biased, output_bias=biased, mlp_bias=config.flag("mlp_bias", False)
    )


LLAMA: Final = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read=_read,
    layer=lambda model, split, layer: (attention(model, split, layer), mlp(model, split)),
    head=head,
)
