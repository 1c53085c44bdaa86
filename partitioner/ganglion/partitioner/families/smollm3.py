"""SmolLM 3: as Llama, and the queries and keys of some layers do not turn; those may see a window."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import head
from ganglion.partitioner.families.llama import plain_layer
from ganglion.partitioner.families.model import Family, Model
from ganglion.partitioner.families.reading import filled, read_dense, read_layer_types, windows_of
from ganglion.wire.errors import InvalidDocument, Unsupported


def _read(config: Config) -> Model:
    config = filled(
        config, num_key_value_heads=4, max_position_embeddings=32768, rope_theta=2000000.0, tie_word_embeddings=True
    )
    layers = config.whole("num_hidden_layers", at_most=4096)
    turns = config.ids("no_rope_layers")  # 1 where a layer turns
    if not config.has("no_rope_layers"):
        interval = config.whole("no_rope_layer_interval", 4)
        turns = tuple(int((layer + 1) % interval != 0) for layer in range(layers))
    if len(turns) < layers:
        raise InvalidDocument(f"{config.where}: no_rope_layers has {len(turns)} entries for {layers} layers")
    uses = config.flag("use_sliding_window", False) and config.has("sliding_window")
    sliding = read_layer_types(config, lambda layer: uses and not turns[layer])
    if any(sliding) and not uses:
        raise Unsupported(f"{config.where}: sliding_attention layers without a window", param="use_sliding_window")
    biased = config.flag("attention_bias", False)
    return read_dense(
        config,
        family="smollm3",
        layer_ropes=tuple("default" if turns[layer] else "" for layer in range(layers)),
        windows=windows_of(config, sliding),
        query_bias=biased,
        output_bias=biased,
        mlp_bias=config.flag("mlp_bias", False),
    )


SMOLLM3: Final = Family(name="smollm3", architectures=("SmolLM3ForCausalLM",), read=_read, layer=plain_layer, head=head)
