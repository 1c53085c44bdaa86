"""Command-R7B and Command-A: as Command-R, three layers in four see a window, and only those turn."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import head
from ganglion.partitioner.families.cohere import parallel_layer, read_cohere
from ganglion.partitioner.families.model import Family, Model
from ganglion.partitioner.families.reading import filled, read_layer_types, windows_of


def _read(config: Config) -> Model:
    config = filled(config, sliding_window=4096, sliding_window_pattern=4, max_position_embeddings=8192)
    pattern = config.whole("sliding_window_pattern")
    sliding = read_layer_types(config, lambda layer: bool((layer + 1) % pattern))
    ropes = tuple("default" if slides else "" for slides in sliding)
    return read_cohere(config, "cohere2", windows=windows_of(config, sliding), layer_ropes=ropes)


COHERE2: Final = Family(
    name="cohere2", architectures=("Cohere2ForCausalLM",), read=_read, layer=parallel_layer, head=head
)
