"""Which groups a share holds of a segment, and how its `weights.bin` is put together: for each slot its groups, joined.

The same arithmetic places the initializers of a graph, so what the builder promises is what the device writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import BinaryIO, Final, Protocol

import numpy as np

from ganglion.wire.errors import Corrupt, InvalidDocument
from ganglion.wire.nouns import Layer, Manifest, PieceRef, Range, Segment, Share, Slot, Stage

BLOCK_BYTES: Final = 8 << 20  # columns are joined in blocks of rows of about this size

OpenPiece = Callable[[str], memoryview]  # digest -> the piece's bytes; raises what the store raises
Groups = Range | tuple[int, ...]
"""Groups of a segment: a range, or of the axis "experts" their rising numbers."""


def group_count(groups: Groups) -> int:
    """How many groups."""
    return groups.count if isinstance(groups, Range) else len(groups)


class Holding(Protocol):
    """What a share holds, as `Share` has it."""

    @property
    def heads(self) -> Range: ...  # noqa: D102
    @property
    def columns(self) -> Range: ...  # noqa: D102
    @property
    def experts(self) -> tuple[tuple[int, ...], ...]: ...  # noqa: D102


def held_groups(share: Holding, segment: Segment, layer: int) -> Groups:
    """The groups of `segment`, of the stage's layer number `layer`, that a share holds."""
    if segment.axis == "experts":
        return share.experts[layer] if share.experts else ()
    return share.heads if segment.axis == "heads" else share.columns


def every_expert(layers: Sequence[Layer]) -> tuple[tuple[int, ...], ...]:
    """`Share.experts` of a device that holds all of them; () of a model that is not cut by experts."""
    counts = [next((one.groups for one in layer.segments if one.axis == "experts"), 0) for layer in layers]
    return tuple(tuple(range(count)) for count in counts) if any(counts) else ()


def whole_share(manifest: Manifest, node_id: str, layers: Range) -> Share:
    """The share of a device that runs `layers` and the output matrix alone."""
    geometry = manifest.geometry
    return Share(
        device=node_id,
        heads=Range(0, geometry.head_groups),
        columns=Range(0, geometry.column_groups),
        vocab=Range(0, geometry.vocab_groups),
        experts=every_expert(manifest.layers[layers.start : layers.stop]),
    )


def only_experts(share: Share) -> bool:
    """Whether a share holds experts and nothing else: rows are sent to it, it runs no steps and keeps no state."""
    return bool(share.experts) and not (share.heads.count or share.columns.count or share.vocab.count)


def check_experts(manifest: Manifest, stage: Stage) -> None:
    """Raise InvalidDocument unless every expert of the stage lies on a share, and shares name those that there are.

    Of several shares the first has all else, the others have experts only.
    """
    layers = manifest.layers[stage.layers.start : stage.layers.stop]
    every = every_expert(layers)
    for share in stage.shares:
        if not every and any(share.experts):
            raise InvalidDocument(
                f"plan: the share of {share.device} names experts, by which {manifest.name} is not cut"
            )
        if every and len(share.experts) != len(every):
            raise InvalidDocument(
                f"plan: the share of {share.device} names experts of {len(share.experts)} layers, the stage has"
                f" {len(every)} of {manifest.name}, which is cut by experts"
            )
        for number, (held, there) in enumerate(zip(share.experts, every, strict=False), stage.layers.start):
            if held and not there:
                raise InvalidDocument(f"plan: the share of {share.device} names experts of layer {number}, it has none")
            if held and held[-1] >= len(there):
                raise InvalidDocument(
                    f"plan: the share of {share.device} names expert {held[-1]} of layer {number}, it has {len(there)}"
                )
            if any(one >= following for one, following in pairwise(held)):
                raise InvalidDocument(
                    f"plan: the share of {share.device} names experts of layer {number} that do not rise"
                )
    for number, there in enumerate(every):
        missing = set(there).difference(*(share.experts[number] for share in stage.shares))
        if missing:
            raise InvalidDocument(
                f"plan: no share holds expert {min(missing)} of layer {stage.layers.start + number} ({len(missing)} of"
                f" {len(there)} are missing)"
            )
    if every and not all(map(only_experts, stage.shares[1:])):
        raise InvalidDocument(
            f"plan: {manifest.name} is cut by experts, so that of several shares one has all heads and columns and the "
            "others experts only; tensor parallelism runs a model that is cut with --experts columns"
        )


def graph_name(segment: Segment, share: Groups) -> str:
    """The name in `Manifest.graphs` of the graphs of a share of these groups, as `Manifest` has it."""
    apart = dict.fromkeys(slot.groups for slot in segment.slots if slot.groups is not None)
    held = set(_numbers(share))
    counts = [len(held.intersection(some)) for some in apart] or [group_count(share)]
    return f"{segment.kind}/{'+'.join(map(str, counts))}"


def _numbers(share: Groups) -> Iterable[int]:
    return range(share.start, share.stop) if isinstance(share, Range) else share


def share_pieces(slot: Slot, share: Groups) -> tuple[PieceRef, ...]:
    """The pieces of `slot` that a share of these groups needs, in order; InvalidDocument if there are too few."""
    if slot.join == "whole":
        if len(slot.pieces) != 1:
            raise InvalidDocument(f"slot {slot.name}: {len(slot.pieces)} pieces, a whole slot has exactly 1")
        return slot.pieces
    if slot.join == "marks":
        return ()
    if slot.groups is not None:
        if len(slot.groups) != len(slot.pieces):
            raise InvalidDocument(f"slot {slot.name}: {len(slot.pieces)} pieces of {len(slot.groups)} groups")
        of_group = dict(zip(slot.groups, slot.pieces, strict=True))
        pieces = tuple(of_group[group] for group in _numbers(share) if group in of_group)
    elif isinstance(share, Range):
        if share.stop > len(slot.pieces):
            raise InvalidDocument(f"slot {slot.name}: groups {share.start}..{share.stop} of {len(slot.pieces)} pieces")
        pieces = slot.pieces[share.start : share.stop]
    else:
        if share and max(share) >= len(slot.pieces):
            raise InvalidDocument(f"slot {slot.name}: group {max(share)} of {len(slot.pieces)} pieces")
        pieces = tuple(slot.pieces[group] for group in share)
    if len({piece.size for piece in slot.pieces}) > 1:
        raise InvalidDocument(f"slot {slot.name}: its pieces differ in size, every group of a slot is as large")
    if slot.join == "columns" and pieces and pieces[0].size % slot.rows:
        raise InvalidDocument(f"slot {slot.name}: a piece of {pieces[0].size} bytes does not hold {slot.rows} rows")
    if slot.stored and (slot.join == "columns" or any(piece.size % 2 for piece in pieces)):
        raise InvalidDocument(f"slot {slot.name}: pieces of {slot.stored} are rows of whole numbers")
    return pieces


def slot_offsets(segment: Segment, share: Groups) -> dict[str, int]:
    """Slot name -> offset in bytes of its first byte in the `weights.bin` of this share."""
    offsets, at = {}, 0
    for slot in segment.slots:
        offsets[slot.name] = at
        at += _slot_bytes(slot, share)
    return offsets


def weights_size(segment: Segment, share: Groups) -> int:
    """Size in bytes of the `weights.bin` of these groups of `segment`."""
    return sum(_slot_bytes(slot, share) for slot in segment.slots)


def _slot_bytes(slot: Slot, share: Groups) -> int:
    if slot.join == "marks":
        return len(slot_marks(slot, share))
    return slot.growth * sum(piece.size for piece in share_pieces(slot, share))


def slot_marks(slot: Slot, share: Groups) -> bytes:
    """Of a slot of marks: which of these groups are its own, as a float32 each."""
    own = set(slot.groups or ())
    return np.array([group in own for group in _numbers(share)], "<f4").tobytes()


def write_weights(segment: Segment, share: Groups, open_piece: OpenPiece, into: BinaryIO) -> None:
    """Write the `weights.bin` of these groups of `segment`; raises Corrupt for a piece of another size."""
    for slot in segment.slots:
        if slot.join == "marks":
            into.write(slot_marks(slot, share))
            continue
        pieces = [_opened(slot, piece, open_piece) for piece in share_pieces(slot, share)]
        if slot.stored:
            _widened(slot, pieces, into)
        elif slot.join == "columns" and len(pieces) > 1:
            _write_columns(pieces, slot.rows, into)
        else:
            into.writelines(pieces)


def _widened(slot: Slot, pieces: list[memoryview], into: BinaryIO) -> None:
    """Write numbers of 16 bits as float32."""
    for piece in pieces:
        for start in range(0, piece.nbytes, BLOCK_BYTES):
            part = piece[start : start + BLOCK_BYTES]
            if slot.stored == "bfloat16":  # the upper half of a float32
                into.write((np.frombuffer(part, "<u2").astype("<u4") << np.uint32(16)).data)
            else:
                into.write(np.frombuffer(part, "<f2").astype("<f4").data)


def _opened(slot: Slot, piece: PieceRef, open_piece: OpenPiece) -> memoryview:
    view = memoryview(open_piece(piece.digest)).cast("B")
    if view.nbytes != piece.size:
        raise Corrupt(f"slot {slot.name}: piece {piece.digest[:12]} has {view.nbytes} bytes, named with {piece.size}")
    return view


def _write_columns(pieces: list[memoryview], rows: int, into: BinaryIO) -> None:
    parts = [np.frombuffer(piece, np.uint8).reshape(rows, -1) for piece in pieces]
    step = max(1, BLOCK_BYTES // max(1, sum(part.shape[1] for part in parts)))
    into.writelines(
        np.concatenate([part[start : start + step] for part in parts], axis=1).data for start in range(0, rows, step)
    )
