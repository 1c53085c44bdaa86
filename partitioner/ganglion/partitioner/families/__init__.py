"""Model families, one file each: what a family does differently, and where its devices must exchange."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.cohere import COHERE
from ganglion.partitioner.families.cohere2 import COHERE2
from ganglion.partitioner.families.deepseek import DEEPSEEK
from ganglion.partitioner.families.gemma2 import GEMMA2
from ganglion.partitioner.families.gemma3 import GEMMA3
from ganglion.partitioner.families.gpt_oss import GPT_OSS
from ganglion.partitioner.families.granite import GRANITE
from ganglion.partitioner.families.llama import LLAMA
from ganglion.partitioner.families.mistral import MISTRAL
from ganglion.partitioner.families.mixtral import MIXTRAL
from ganglion.partitioner.families.model import Family
from ganglion.partitioner.families.olmo2 import OLMO2
from ganglion.partitioner.families.olmo3 import OLMO3
from ganglion.partitioner.families.olmoe import OLMOE
from ganglion.partitioner.families.phi3 import PHI3
from ganglion.partitioner.families.qwen2 import QWEN2
from ganglion.partitioner.families.qwen3 import QWEN3
from ganglion.partitioner.families.qwen3_moe import QWEN3_MOE
from ganglion.partitioner.families.smollm3 import SMOLLM3
from ganglion.partitioner.families.text_part import TEXT_PARTS
from ganglion.wire.errors import Unsupported

FAMILIES: Final = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    OLMO3,
    GRANITE,
    SMOLLM3,
    COHERE,
    COHERE2,
    MIXTRAL,
    OLMOE,
    QWEN3_MOE,
    GPT_OSS,
    DEEPSEEK,
)
SUPPORTED: Final = (*(name for family in FAMILIES for name in family.architectures), *TEXT_PARTS)


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
