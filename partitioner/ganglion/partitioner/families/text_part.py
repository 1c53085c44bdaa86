"""The text part of a model that also sees: its configuration and its tensors, as if it had been saved alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.weights import Weights
from ganglion.wire.errors import InvalidDocument

# Architecture -> the one of its text.
TEXT_PARTS: Final = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
PREFIX: Final = "language_model."
SHARED: Final = ("bos_token_id", "eos_token_id", "tie_word_embeddings")  # which the whole has on top


def text_part(config: Config) -> Config:
    """The configuration of the text part; any other configuration as it is. Raises InvalidDocument without one."""
    named = config.names("architectures")
    if not named or named[0] not in TEXT_PARTS:
        return config
    nested = config.object("text_config")
    if nested is None:
        raise InvalidDocument(f"{config.where}: {named[0]} without a text_config", param="text_config")
    shared = {name: config.fields[name] for name in SHARED if config.has(name)}
    fields = nested.fields | shared | {"architectures": [TEXT_PARTS[named[0]]]}
    return Config(fields, nested.where)


def text_tensors(config: Config, tensors: Mapping[str, Weights]) -> Mapping[str, Weights]:
    """The tensors of the text part of the model that `config` describes, by the names that they have alone."""
    if text_part(config) is config:
        return tensors
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
