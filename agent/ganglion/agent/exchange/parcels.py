"""What a ROUTED and a GIVEN frame hold, made from numbers and made into numbers: a pure core of both ends.

A pair is a row and one of its experts; what it adds is float32(weight * given). In exact classes a row's products are
added in float64, so a sum that was begun elsewhere is the sum that one device has: such sums of float32 numbers round
only where their sizes are 2^29 apart. A row that has one pair there comes back as that product, in half the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.exchange.payload import decode, encode
from ganglion.agent.executor.mixing import mix
from ganglion.wire.nouns.plan import Payload
from ganglion.wire.payload import dtype_of, width_of
from ganglion.wire.routed import RoutedFrame, given_bytes, pack_routed

Experts = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]
"""Rows [R, hidden] and of each its expert's place among those held -> what they give [R, hidden]."""


class Travel(NamedTuple):
    """How numbers travel: in an exact class as they are, otherwise by payload. hidden: numbers of a row."""

    hidden: int
    exact: bool
    payload: Payload

    @property
    def width(self) -> int:
        """Elements of a row as it travels."""
        return width_of(self.payload, self.hidden)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Their type."""
        return dtype_of(self.payload)

    def rounded(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        """Rows [R, hidden] as they travel; they may be changed."""
        if self.payload == "full":
            return rows
        travels = np.empty((len(rows), self.width), self.dtype)
        encode(self.payload, rows, travels)
        return travels

    def restored(self, travelled: NDArray[Any]) -> NDArray[np.float32]:
        """And back."""
        if self.payload == "full":
            return travelled
        rows = np.empty((len(travelled), self.hidden), np.float32)
        decode(self.payload, travelled, rows)
        return rows


class Asked(NamedTuple):
    """What a device was sent: rows of the step, by rising number, and the pairs of each [rows] (intp)."""

    rows: NDArray[np.intp]
    counts: NDArray[np.intp]

    def given_bytes(self, travel: Travel) -> int:
        """Bytes that it answers with."""
        lone = int(np.count_nonzero(self.counts == 1))
        shared = len(self.counts) - lone
        return given_bytes(lone, shared, travel.hidden, exact=travel.exact, payload=travel.payload)


def ask(
    rows: NDArray[np.float32],
    chosen: NDArray[np.int64],
    weights: NDArray[np.float32],
    there: NDArray[np.bool_],
    travel: Travel,
) -> tuple[Asked, memoryview]:
    """What a device is asked and the frame that says so.

    rows [S, hidden]; chosen, weights and there, the pairs that it is to run, [S, k].
    """
    counts = np.count_nonzero(there, axis=1)
    touched = counts.nonzero()[0]
    asked = Asked(touched, counts[touched])
    routed = RoutedFrame(travel.rounded(rows[touched]), asked.counts, chosen[there].astype(np.uint16), weights[there])
    return asked, pack_routed(routed)


def give(routed: RoutedFrame, place: NDArray[np.int64], experts: Experts, travel: Travel) -> NDArray[np.uint8]:
    """Run what was asked; the payload of the answer [1, bytes]. place: of each expert of the layer among those held."""
    rows, counts, weights = travel.restored(routed.rows), routed.counts, routed.weights
    lone = counts == 1
    only_lone = bool(lone.all())
    given = experts(rows if only_lone else np.repeat(rows, counts, axis=0), place[routed.experts])
    if travel.exact and only_lone:
        return (given * weights[:, None]).view(np.uint8).reshape(1, -1)
    if not travel.exact:
        sums = _summed(given, counts, weights, np.float32)
        return travel.rounded(sums).view(np.uint8).reshape(1, -1)
    if not lone.any():
        return _summed(given, counts, weights, np.float64).view(np.uint8).reshape(1, -1)
    apart = np.repeat(lone, counts)
    wide = _summed(given[~apart], counts[~lone], weights[~apart], np.float64)
    products = given[apart] * weights[apart, None]
    return np.concatenate((wide.view(np.uint8).ravel(), products.view(np.uint8).ravel()))[None]


def _summed(
    given: NDArray[np.float32], counts: NDArray[np.intp], weights: NDArray[np.float32], dtype: type[Any]
) -> NDArray[Any]:
    """The sum of each row's products [rows, hidden], in `dtype`."""
    if len(counts) == 1:
        one: NDArray[Any] = (given * weights[:, None]).sum(axis=0, dtype=dtype, keepdims=True)
        return one
    sums = np.zeros((len(counts), given.shape[1]), dtype)
    mix(given, np.repeat(np.arange(len(counts)), counts), weights, sums)
    return sums


def add(given: NDArray[np.uint8], asked: Asked, travel: Travel, into: NDArray[Any]) -> None:
    """Add the answer to what was asked [1, bytes] to the rows of `into` [S, hidden]: float64 in exact classes."""
    content = given[0]
    if not travel.exact:
        travelled = content.view(travel.dtype).reshape(-1, travel.width)
        into[asked.rows] += travel.restored(travelled)
        return
    lone = asked.counts == 1
    shared = len(lone) - int(np.count_nonzero(lone))
    split = shared * travel.hidden * 8
    if shared:
        into[asked.rows[~lone]] += content[:split].view(np.float64).reshape(-1, travel.hidden)
    if shared < len(lone):
        into[asked.rows[lone]] += content[split:].view(np.float32).reshape(-1, travel.hidden)
