"""What a mixture's router said of a step's rows, and the sum of what experts gave, wherever they lie. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import ProtocolViolation

Sums = NDArray[np.float64 | np.float32]


@dataclass(frozen=True, slots=True)
class Routed:
    """Rows of a step at a layer of experts: each goes to k of them. Arrays are the executor's, until it runs again.

    rows: what experts take, float32 [S, hidden]. chosen: each row's experts by number, the shared ones last, int64
    [S, k]. weights: what they give is multiplied with, float32 [S, k].
    """

    rows: NDArray[np.float32]
    chosen: NDArray[np.int64]
    weights: NDArray[np.float32]


def check_places(index: int, rows: NDArray[np.float32], place: NDArray[np.int64], held: int) -> None:
    """Raise ProtocolViolation unless each of `rows` for segment `index` has a place among the `held` experts."""
    if place.shape != rows.shape[:1]:
        raise ProtocolViolation(f"segment {index}: {len(rows)} rows for {len(place)} places of experts")
    if place.size and not 0 <= int(place.min()) <= int(place.max()) < held:
        raise ProtocolViolation(
            f"segment {index}: rows for experts {int(place.min())}..{int(place.max())}, {held} lie here"
        )


def mix(
    given: NDArray[np.float32],
    row: NDArray[np.int64],
    weights: NDArray[np.float32],
    out: NDArray[np.float64 | np.float32],
) -> None:
    """Add to `out` [S, hidden], for each pair i of a row and an expert, weights[i] * given[i] at row[i].

    given: float32 [R, hidden]; row: int64 [R], below S; weights: float32 [R]. Products are rounded to float32 and added
    in the type of `out`: in float64 their order leaves no trace, so that pairs may be mixed in any order and in parts.
    """
    for places in _apart(row):
        out[row[places]] += given[places] * weights[places, None]


def mix_each(given: NDArray[np.float32], weights: NDArray[np.float32], out: Sums) -> None:
    """`mix` where every row's k pairs follow each other, in order of rows: given [S * k, hidden], weights [S, k]."""
    rows, each = weights.shape
    by_row = given.reshape(rows, each, -1)
    for place in range(each):
        out += by_row[:, place] * weights[:, place, None]


def _apart(row: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The places of pairs in runs in which no row is twice."""
    order = np.argsort(row, kind="stable")
    ordered = row[order]
    first = np.flatnonzero(np.diff(ordered, prepend=-1))
    turn = np.arange(len(row)) - np.repeat(first, np.diff(first, append=len(row)))
    for place in range(int(turn.max(initial=-1)) + 1):
        yield order[turn == place]
