"""The all-reduce over lanes: sends first, then receives, added in order of rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.exchange.payload import decode, encode
from ganglion.agent.exchange.plan import ExchangePlan
from ganglion.wire.frames import Expectation, Kind, wire_dtype
from ganglion.wire.lane import Lane
from ganglion.wire.nouns.plan import Payload
from ganglion.wire.payload import dtype_of, width_of

_NOTHING: Final = np.empty((0, 0))


class AllReduce:
    """One device's part of the sums of its stage; `lanes` by rank. payload: how they travel.

    A sum is a `give` and a `take`, with other work between them or none. Both raise what the lanes raise: DeviceLost,
    ProtocolViolation.
    """

    def __init__(self, part: ExchangePlan, rank: int, lanes: Mapping[int, Lane], payload: Payload = "full") -> None:
        self._send_own = tuple(lanes[other] for other in part.send_own_to)
        self._add = tuple(None if other == rank else lanes[other] for other in part.add)
        self._send_sum = tuple(lanes[other] for other in part.send_sum_to)
        self._take_sum = None if part.take_sum_from is None else lanes[part.take_sum_from]
        self._payload: Payload = payload
        # For what comes and what is decoded of it, kept from one sum to the next; the last place is the way out.
        self._came: list[NDArray[Any]] = [_NOTHING] * (len(part.add) + 1)
        self._terms: list[NDArray[Any]] = [_NOTHING] * len(part.add)

    async def give(self, step: int, exchange: int, own: NDArray[Any]) -> None:
        """Send what this device adds, `own` [rows, columns] (float64 in exact classes, else float32), which becomes
        what travels.
        """
        if self._send_own:
            await self._send(self._send_own, step, exchange, own)

    async def take(self, step: int, exchange: int, own: NDArray[Any]) -> None:
        """Make `own`, as `give` left it, the sum over devices, in place: receive what the others add, or the sum."""
        if self._take_sum is not None:
            await self._receive(self._take_sum, -1, step, exchange, own)
            return
        terms = []
        for place, lane in enumerate(self._add):
            if lane is not None:
                term = self._terms[place] = _room(self._terms[place], own.shape, own.dtype)
                await self._receive(lane, place, step, exchange, term)
            terms.append(own if lane is None else self._terms[place])
        add_in_order(terms, own)
        if self._send_sum:
            await self._send(self._send_sum, step, exchange, own)

    async def _send(self, lanes: tuple[Lane, ...], step: int, exchange: int, sums: NDArray[Any]) -> None:
        travels = sums if self._payload == "full" else self._rounded(sums)
        for lane in lanes:
            await lane.send_tensor(Kind.PARTIAL, step, exchange, travels)

    def _rounded(self, sums: NDArray[Any]) -> NDArray[Any]:
        """What of `sums` travels; `sums` becomes what arrives."""
        if self._payload == "full":
            return sums
        travels = self._came[-1] = self._as_it_travels(self._came[-1], sums)
        encode(self._payload, sums, travels)
        decode(self._payload, travels, sums)
        return travels

    async def _receive(self, lane: Lane, place: int, step: int, exchange: int, into: NDArray[Any]) -> None:
        came = into
        if self._payload != "full":
            came = self._came[place] = self._as_it_travels(self._came[place], into)
        expected = Expectation(Kind.PARTIAL, step, exchange, wire_dtype(came.dtype), came.shape[0], came.shape[1])
        await lane.receive(expected, into=came)
        if came is not into:
            decode(self._payload, came, into)

    def _as_it_travels(self, kept: NDArray[Any], sums: NDArray[Any]) -> NDArray[Any]:
        rows, columns = sums.shape
        return _room(kept, (rows, width_of(self._payload, columns)), dtype_of(self._payload, sums.dtype))


def _room(kept: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    return kept if kept.shape == shape and kept.dtype == dtype else np.empty(shape, dtype)


def add_in_order(terms: list[NDArray[Any]], into: NDArray[Any]) -> None:
    """into = terms[0] + terms[1] + ..., from the left; `into` may be one of the terms."""
    if len(terms) == 1:
        if terms[0] is not into:
            into[...] = terms[0]
        return
    late = any(term is into for term in terms[2:])
    total = np.add(terms[0], terms[1], out=np.empty_like(into) if late else into)
    for term in terms[2:]:
        np.add(total, term, out=total)
    if late:
        into[...] = total
