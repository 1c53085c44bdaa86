"""Qwen2 and Qwen2.5 dense: biases of q, k and v; the later layers may see a window of tokens."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import head
from ganglion.partitioner.families.llama import plain_layer
from ganglion.partitioner.families.model import Family, Model
from ganglion.partitioner.families.reading import filled, read_dense, read_layer_types, windows_of
from ganglion.wire.errors import Unsupported


def _read(config: Config) -> Model:
    return read_dense(qwen_filled(config), family="qwen2", windows=qwen_windows(config), query_bias=True)


def qwen_filled(config: Config) -> Config:
    """The configuration with Qwen's defaults."""
    return filled(config, max_position_embeddings=32768, num_key_value_heads=32)


def qwen_windows(config: Config) -> tuple[int, ...]:
    """Windows by `layer_types`, or from layer `max_window_layers` on; none without `use_sliding_window`."""
    config = filled(qwen_filled(config), sliding_window=4096, max_window_layers=28)
    uses = config.flag("use_sliding_window", False) and config.has("sliding_window")
    first = 0 if config.fields["max_window_layers"] == 0 else config.whole("max_window_layers")
    sliding = read_layer_types(config, lambda layer: uses and layer >= first)
    if any(sliding) and not uses:
        raise Unsupported(
            f"{config.where}: sliding_attention layers without use_sliding_window and a sliding_window",
            param="use_sliding_window",
        )
    return windows_of(config, sliding)


QWEN2: Final = Family(name="qwen2", architectures=("Qwen2ForCausalLM",), read=_read, layer=plain_layer, head=head)
