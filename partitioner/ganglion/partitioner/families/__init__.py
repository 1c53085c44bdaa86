"""Model families, one file each: what a family does differently, and where its devices must exchange."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import Family
from ganglion.partitioner.families.llama import LLAMA
from ganglion.partitioner.families.qwen3 import QWEN3
from ganglion.wire.errors import Unsupported

FAMILIES: Final = (LLAMA, QWEN3)
SUPPORTED: Final = tuple(name for family in FAMILIES for name in family.architectures)


def family_of(config: Config) -> Family:
    """The family of a configuration; raises Unsupported naming its architecture and the supported ones."""
    named = config.names("architectures")
    for family in FAMILIES:
        if named and named[0] in family.architectures:
            return family
    found = named[0] if named else f"(none named, model_type {config.text('model_type', '')!r})"
    raise Unsupported(
        f"{config.where}: architecture {found} is not supported; supported are {', '.join(SUPPORTED)}",
        param="architectures",
    )
