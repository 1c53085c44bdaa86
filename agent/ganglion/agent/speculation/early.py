"""The target's own first layers as its drafter: they and its head, from the same pieces and the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from msgspec import structs

from ganglion.agent.executor.loader import Shard
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import Layer, Manifest, Segment

_POST_NORM: Final = "post_norm"  # the slot of a head that holds the norm after the last layer's MLP


def early_layers(manifest: Manifest, layers: int) -> Manifest:
    """The model of the first `layers` layers and the head, which names no piece that `manifest` does not.

    Its parameters are in proportion to its bytes. Raises Unsupported where the head begins with the last layer's norm,
    which fits no other layer, and for a count that leaves none of the layers, or all.
    """
    geometry = manifest.geometry
    if any(slot.name == _POST_NORM for slot in manifest.head.slots):
        raise Unsupported(
            f"early layers of {manifest.name}: in family {manifest.family} the head begins with the norm of the last"
            " layer, so no other layer can stand before it; use another drafter",
            param="layers",
        )
    if not 0 < layers < geometry.layers:
        raise Unsupported(
            f"early layers of {manifest.name}: {layers} of {geometry.layers}; use 1 to {geometry.layers - 1}",
            param="layers",
        )
    first, prompt = manifest.layers[:layers], manifest.prompt_layers[:layers]
    used = [*_segments((*first, *prompt)), manifest.head]
    kinds, ropes = {one.kind for one in used}, {one.rope for one in used}
    part = _bytes(first, manifest) / _bytes(manifest.layers, manifest)
    return structs.replace(
        manifest,
        name=f"{manifest.name}-early-{layers}",
        geometry=structs.replace(geometry, layers=layers),
        layers=first,
        prompt_layers=prompt,
        graphs={name: pieces for name, pieces in manifest.graphs.items() if name.rsplit("/", 1)[0] in kinds},
        ropes={name: tables for name, tables in manifest.ropes.items() if name in ropes},
        parameters=round(manifest.parameters * part),
    )


def early_shard(shard: Shard, early: Manifest) -> Shard:
    """What `early_layers` needs of a loaded shard of the whole target: the same graphs, so no memory of its own."""
    count = sum(len(layer.segments) for layer in early.layers)
    return replace(shard, segments=shard.segments[:count], prompt=shard.prompt[:count])


def _segments(layers: Sequence[Layer]) -> Iterator[Segment]:
    for layer in layers:
        yield from layer.segments


def _bytes(layers: Sequence[Layer], manifest: Manifest) -> int:
    """Bytes of the layers' pieces, the head's and the embedding's."""
    slots = [slot for segment in (*_segments(layers), manifest.head) for slot in segment.slots]
    pieces = [piece for slot in slots for piece in slot.pieces]
    return sum(piece.size for piece in (*pieces, *manifest.embedding.pieces))
