"""OLMo 3: as OLMo 2, three layers in four see a window, and only the others' rope is scaled."""

from __future__ import annotations

from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.layer_ropes import with_ropes_by_layer_type
from ganglion.partitioner.families.model import Family, Model
from ganglion.partitioner.families.olmo2 import olmo_facts, olmo_filled, olmo_layer
from ganglion.partitioner.families.post_norms import post_normed_head
from ganglion.partitioner.families.reading import filled, read_dense, read_layer_types, windows_of
from ganglion.wire.errors import Unsupported

THETA: Final = 500000.0


def _read(config: Config) -> Model:
    config = filled(olmo_filled(config), sliding_window=4096)
    if not config.has("rope_parameters") and config.number("rope_theta", THETA) != THETA:
        # Of an old configuration transformers gives such a theta to the full layers alone.
        raise Unsupported(
            f"{config.where}: rope_theta other than {THETA:g} outside rope_parameters", param="rope_theta"
        )
    sliding = read_layer_types(config, lambda layer: bool((layer + 1) % 4))
    model = read_dense(config, family="olmo3", windows=windows_of(config, sliding), ropes=(), **olmo_facts(config))
    return with_ropes_by_layer_type(model, config, sliding, full_theta=THETA, sliding_theta=THETA)


OLMO3: Final = Family(
    name="olmo3", architectures=("Olmo3ForCausalLM",), read=_read, layer=olmo_layer, head=post_normed_head
)
