"""Mistral: as Llama without biases, and every layer sees a window of tokens."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import head
from ganglion.partitioner.families.llama import plain_layer
from ganglion.partitioner.families.model import Family, Model
from ganglion.partitioner.families.reading import filled, read_dense, refuse, windows_of


def _read(config: Config) -> Model:
    config = filled(config, sliding_window=4096, num_key_value_heads=8, max_position_embeddings=131072)
    refuse(config, "layer_types")  # transformers ignores them here
    slides = config.has("sliding_window")
    windows = windows_of(config, (slides,) * config.whole("num_hidden_layers", at_most=4096))
    return read_dense(config, family="mistral", windows=windows)


MISTRAL: Final = Family(name="mistral", architectures=("MistralForCausalLM",), read=_read, layer=plain_layer, head=head)
