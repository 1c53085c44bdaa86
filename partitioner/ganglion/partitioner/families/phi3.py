"""Phi-3, Phi-4 and Phi-4-mini: q, k, v and gate, up stored as one matrix each; longrope; heads that turn in part."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import ATTENTION, MLP, attention, head, mlp
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.reading import filled, read_dense, variants, windows_of
from ganglion.partitioner.rope import rope_of

KINDS: Final = ("default", "longrope")
OLD_NAMES: Final = ("su", "yarn")  # of longrope, in the first checkpoints


def _read(config: Config) -> Model:
    config = filled(config, rms_norm_eps=1e-5, original_max_position_embeddings=4096, max_position_embeddings=4096)
    slides = config.has("sliding_window")
    windows = windows_of(config, (slides,) * config.whole("num_hidden_layers", at_most=4096))
    model = read_dense(config, family="phi3", windows=windows, ropes=())
    parameters = config.object("rope_scaling") or config.object("rope_parameters") or Config({}, config.where)
    if parameters.text("rope_type", parameters.text("type", "default")) in OLD_NAMES:
        parameters = Config(parameters.fields | {"rope_type": "longrope"}, parameters.where)
    found = rope_of(parameters, config, model.head_dim, model.context, partial=True, kinds=KINDS)
    return replace(model, ropes=(("default", variants(found)),))


def fused(plan: SegmentPlan, tensor: str) -> SegmentPlan:
    """The segment with its joined matrices one after the other in the one `tensor`."""
    stored, first, joined = sum(matrix.outputs for matrix in plan.joined), 0, []
    for matrix in plan.joined:
        joined.append(replace(matrix, tensor=tensor, first=first, stored=stored))
        first += matrix.outputs
    return replace(plan, joined=tuple(joined))


def _layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    return (
        fused(attention(model, split, layer), f"{ATTENTION}qkv_proj"),
        fused(mlp(model, split), f"{MLP}gate_up_proj"),
    )


PHI3: Final = Family(name="phi3", architectures=("Phi3ForCausalLM",), read=_read, layer=_layer, head=head)
