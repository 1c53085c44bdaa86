"""Ropes by layer type: one of the layers that see all of the context, one of those that see a window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.model import Model, RopeVariant
from ganglion.partitioner.families.reading import variants
from ganglion.partitioner.rope import rope_of
from ganglion.wire.errors import Unsupported


def with_ropes_by_layer_type(
    model: Model, config: Config, sliding: Sequence[bool], *, full_theta: float, sliding_theta: float
) -> Model:
    """The model with the rope of `full_attention` layers and that of `sliding_attention` layers.

    In an old configuration `rope_theta` and `rope_scaling` are about full layers alone.
    """
    nested = config.object("rope_parameters")
    if nested is not None and not any(map(nested.has, ("full_attention", "sliding_attention"))):
        raise Unsupported(f"{config.where}: rope_parameters that are not by layer type", param="rope_parameters")
    scaling = config.object("rope_scaling") or Config({}, config.where)
    thetas = {"full_attention": config.number("rope_theta", full_theta), "sliding_attention": sliding_theta}
    found: dict[str, tuple[RopeVariant, ...]] = {}
    for kind, theta in thetas.items():
        given = (nested and nested.object(kind)) or Config({}, config.where)
        fields = {"rope_theta": theta} | given.fields | (scaling.fields if kind == "full_attention" else {})
        if not fields.get("truncate", True):
            raise Unsupported(f"{config.where}: truncate is not supported in ropes by layer type", param="truncate")
        around = Config({"partial_rotary_factor": config.fields.get("partial_rotary_factor")}, config.where)
        found[kind] = variants(rope_of(Config(fields, given.where), around, model.head_dim, model.context))
    names = {"full_attention": "default", "sliding_attention": "local"}
    if found["full_attention"] == found["sliding_attention"]:
        names["sliding_attention"] = "default"
    layer_ropes = tuple(names["sliding_attention" if slides else "full_attention"] for slides in sliding)
    ropes = {names[kind]: rope for kind, rope in found.items() if names[kind] in layer_ropes}
    return replace(model, ropes=tuple(sorted(ropes.items())), layer_ropes=layer_ropes)
