"""The all-reduce over lanes: sends first, then receives, added in order of rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.exchange.plan import ExchangePlan
from ganglion.wire.frames import Expectation, Kind, wire_dtype
from ganglion.wire.lane import Lane


class AllReduce:
    """One device's part of the sums of its stage; `lanes` by rank."""

    def __init__(self, part: ExchangePlan, rank: int, lanes: Mapping[int, Lane]) -> None:
        self._send_own = tuple(lanes[other] for other in part.send_own_to)
        self._add = tuple(None if other == rank else lanes[other] for other in part.add)
        self._send_sum = tuple(lanes[other] for other in part.send_sum_to)
        self._take_sum = None if part.take_sum_from is None else lanes[part.take_sum_from]
        self._rooms: list[NDArray[Any]] = [np.empty(0)] * len(part.add)  # for what comes, kept from one sum to the next

    async def reduce(self, step: int, exchange: int, own: NDArray[Any]) -> None:
        """Make `own` [rows, hidden] (float64 in exact classes, else float32) the sum over devices, in place.

        Raises what the lanes raise: DeviceLost, ProtocolViolation.
        """
        for lane in self._send_own:
            await lane.send_tensor(Kind.PARTIAL, step, exchange, own)
        expected = Expectation(Kind.PARTIAL, step, exchange, wire_dtype(own.dtype), own.shape[0], own.shape[1])
        if self._take_sum is not None:
            await self._take_sum.receive(expected, into=own)
            return
        terms = [
            own if lane is None else await lane.receive(expected, into=self._room(place, own))
            for place, lane in enumerate(self._add)
        ]
        add_in_order(terms, own)
        for lane in self._send_sum:
            await lane.send_tensor(Kind.PARTIAL, step, exchange, own)

    def _room(self, place: int, like: NDArray[Any]) -> NDArray[Any]:
        room = self._rooms[place]
        if room.shape != like.shape or room.dtype != like.dtype:
            room = self._rooms[place] = np.empty_like(like)
        return room


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
