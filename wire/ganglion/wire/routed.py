"""Rows of a mixture on their way to the experts that lie elsewhere, and how many bytes they are. Pure.

In each layer the lead sends a device at most one ROUTED frame, with every row that needs experts there, once; the
device answers with one GIVEN frame. Little-endian, without padding:

  ROUTED   rows u32, pairs u32, weights f32[pairs], rows as they travel [rows, width], experts u16[pairs],
           counts u16[rows] (pairs of each row, >= 1; a row's pairs follow each other)
  GIVEN    exact classes: f64[rows with several pairs, hidden], then f32[rows with one, hidden], each in their order;
           fast classes: the sums as they travel [rows, width]

A row travels as float32 where the payload is "full" (always in exact classes), as float16, or in 8 bits with a float32
scale for each block. So the size of a GIVEN frame follows from what was asked, and that of a ROUTED frame is bounded by
the announced step.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.nouns.plan import Payload
from ganglion.wire.payload import row_bytes

FRAME_BYTES: Final = 56  # of any frame beside its payload: header and tag
STEP_BYTES: Final = 24  # of the announcement of one session's row, about: every device hears it

_HEAD: Final = struct.Struct("<II")
_PAIR_BYTES: Final = 4 + 2
_COUNT_BYTES: Final = 2


def routed_bytes(rows: int, pairs: int, columns: int, payload: Payload = "full") -> int:
    """Bytes of the payload of a ROUTED frame."""
    return _HEAD.size + pairs * _PAIR_BYTES + rows * (_COUNT_BYTES + row_bytes(payload, columns))


def given_bytes(lone: int, shared: int, columns: int, *, exact: bool, payload: Payload = "full") -> int:
    """Bytes of the payload of a GIVEN frame: of rows with one pair, and of those with several."""
    if exact:
        return (4 * lone + 8 * shared) * columns
    return (lone + shared) * row_bytes(payload, columns)


def touch_bytes(pairs: int, columns: int, *, exact: bool, payload: Payload = "full") -> int:
    """Bytes on a lane, both ways, for a lone row of a step that has `pairs` experts on another device, in one layer."""
    there = routed_bytes(1, pairs, columns, payload)
    back = given_bytes(int(pairs == 1), int(pairs > 1), columns, exact=exact, payload=payload)
    return 2 * FRAME_BYTES + there + back


def token_bytes(
    touched: Sequence[Sequence[int]], devices: int, columns: int, *, exact: bool, payload: Payload = "full"
) -> int:
    """Bytes on all lanes of the lead for a token that is alone in its step.

    touched: of each layer, for each device beside the lead that has experts of the token how many. devices: of the
    plan, with the lead; each of the others hears of every step.
    """
    travelling = sum(touch_bytes(pairs, columns, exact=exact, payload=payload) for layer in touched for pairs in layer)
    return travelling + (devices - 1) * (FRAME_BYTES + STEP_BYTES)


@dataclass(frozen=True, slots=True)
class RoutedFrame:
    """What a ROUTED frame says.

    rows: as they travel [rows, width]. counts [rows] (intp): the pairs of each row. experts [pairs] (uint16) and
    weights [pairs] (float32) of the pairs, row by row.
    """

    rows: NDArray[Any]
    counts: NDArray[np.intp]
    experts: NDArray[np.uint16]
    weights: NDArray[np.float32]


def pack_routed(routed: RoutedFrame) -> memoryview:
    """The payload of a ROUTED frame."""
    parts = (
        routed.weights.astype(np.float32, copy=False),
        np.ascontiguousarray(routed.rows),
        routed.experts.astype(np.uint16, copy=False),
        routed.counts.astype(np.uint16),
    )
    payload = bytearray(_HEAD.size + sum(part.nbytes for part in parts))
    _HEAD.pack_into(payload, 0, len(routed.rows), len(routed.experts))
    at = _HEAD.size
    for part in parts:
        payload[at : at + part.nbytes] = part.data.cast("B")
        at += part.nbytes
    return memoryview(payload)


def parse_routed(
    payload: bytes, *, rows: int, each: int, width: int, dtype: np.dtype[Any], place: NDArray[np.int64]
) -> RoutedFrame:
    """What a ROUTED frame says; its arrays are views of `payload`.

    rows: of the announced step. each: pairs of a row at most. width and dtype: of a row as it travels. place: by
    expert, -1 where it does not lie here. Raises ProtocolViolation naming what no lead of this plan says.
    """
    if len(payload) < _HEAD.size:
        raise ProtocolViolation(f"a ROUTED frame of {len(payload)} bytes, at least {_HEAD.size} are its counts")
    found, pairs = _HEAD.unpack_from(payload)
    if not 0 < found <= rows:
        raise ProtocolViolation(f"a ROUTED frame of {found} rows, the step has {rows}")
    if not found <= pairs <= found * each:
        raise ProtocolViolation(f"a ROUTED frame of {pairs} pairs for {found} rows, of 1 to {each} experts each")
    sizes = (4 * pairs, found * width * dtype.itemsize, 2 * pairs, 2 * found)
    if len(payload) != _HEAD.size + sum(sizes):
        raise ProtocolViolation(
            f"a ROUTED frame of {len(payload)} bytes, {found} rows and {pairs} pairs are {_HEAD.size + sum(sizes)}"
        )
    at = _HEAD.size
    weights = np.frombuffer(payload, "<f4", pairs, at)
    at += sizes[0]
    numbers = np.frombuffer(payload, dtype, found * width, at).reshape(found, width)
    at += sizes[1]
    experts = np.frombuffer(payload, "<u2", pairs, at)
    counts = np.frombuffer(payload, "<u2", found, at + sizes[2]).astype(np.intp)
    if counts.min() < 1 or counts.max() > each or counts.sum() != pairs:
        raise ProtocolViolation(
            f"a ROUTED frame whose rows have {counts.min()} to {counts.max()} experts, {counts.sum()} in all, with "
            f"{pairs} pairs of at most {each} experts a row"
        )
    last = int(experts.max())
    if last >= len(place):
        raise ProtocolViolation(f"a ROUTED frame for expert {last} of a layer of {len(place)}")
    absent = place[experts] < 0
    if absent.any():
        raise ProtocolViolation(f"a ROUTED frame for expert {experts[absent.argmax()]}, which does not lie here")
    if not np.isfinite(weights).all():
        raise ProtocolViolation("a ROUTED frame with weights that are not finite")
    return RoutedFrame(numbers, counts, experts, weights)
