"""How a share's `weights.bin` is put together from pieces: for each slot in order, its groups joined along its axis.

The same arithmetic places the initializers of a graph, so what the builder promises is what the device writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Final

import numpy as np

from ganglion.wire.errors import Corrupt, InvalidDocument
from ganglion.wire.nouns import PieceRef, Range, Segment, Slot

BLOCK_BYTES: Final = 8 << 20  # columns are joined in blocks of rows of about this size

OpenPiece = Callable[[str], memoryview]  # digest -> the piece's bytes; raises what the store raises


def share_pieces(slot: Slot, share: Range) -> tuple[PieceRef, ...]:
    """The pieces of `slot` that a share of groups start..stop needs, in order; InvalidDocument if there are too few."""
    if slot.join == "whole":
        if len(slot.pieces) != 1:
            raise InvalidDocument(f"slot {slot.name}: {len(slot.pieces)} pieces, a whole slot has exactly 1")
        return slot.pieces
    if share.stop > len(slot.pieces):
        raise InvalidDocument(f"slot {slot.name}: groups {share.start}..{share.stop} of {len(slot.pieces)} pieces")
    pieces = slot.pieces[share.start : share.stop]
    if len({piece.size for piece in slot.pieces}) > 1:
        raise InvalidDocument(f"slot {slot.name}: its pieces differ in size, every group of a slot is as large")
    if slot.join == "columns" and pieces and pieces[0].size % slot.rows:
        raise InvalidDocument(f"slot {slot.name}: a piece of {pieces[0].size} bytes does not hold {slot.rows} rows")
    if slot.stored and (slot.join == "columns" or any(piece.size % 2 for piece in pieces)):
        raise InvalidDocument(f"slot {slot.name}: pieces of {slot.stored} are rows of whole numbers")
    return pieces


def slot_offsets(segment: Segment, share: Range) -> dict[str, int]:
    """Slot name -> offset in bytes of its first byte in the `weights.bin` of this share."""
    offsets, at = {}, 0
    for slot in segment.slots:
        offsets[slot.name] = at
        at += slot.growth * sum(piece.size for piece in share_pieces(slot, share))
    return offsets


def weights_size(segment: Segment, share: Range) -> int:
    """Size in bytes of the `weights.bin` of groups start..stop of `segment`."""
    return sum(slot.growth * piece.size for slot in segment.slots for piece in share_pieces(slot, share))


def write_weights(segment: Segment, share: Range, open_piece: OpenPiece, into: BinaryIO) -> None:
    """Write the `weights.bin` of groups start..stop of `segment`; raises Corrupt for a piece of another size."""
    for slot in segment.slots:
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
