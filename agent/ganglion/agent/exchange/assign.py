"""Which device runs which expert of which row, where experts lie on several: a pure core.

A row goes to as few devices beside the lead as can be (a device costs a frame there and one back, whatever it runs),
and among those each expert to the device that is done with it first. Nothing is measured here: speeds are what the plan
gives a device to hold, so that the same step is always run by the same devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import InvalidDocument
from ganglion.wire.nouns import Stage

LEAD: Final = 0
AGAIN: Final = 1 / 16  # of an expert's time: one more row through it, once its weights are read
_TRIED: Final = 10  # devices, at most, of which all sets are tried; beyond, the one that serves most goes first


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds the experts of one layer.

    masks: of each expert, bit r where rank r holds it. only [experts] (int64): the rank where it is one, else -1.
    """

    masks: tuple[int, ...]
    only: NDArray[np.int64]

    @classmethod
    def of(cls, held: Sequence[Sequence[int]], experts: int) -> Holders:
        """held: the experts of each rank; raises InvalidDocument unless each of `experts` lies somewhere."""
        masks = [0] * experts
        for rank, numbers in enumerate(held):
            for expert in numbers:
                if not 0 <= expert < experts:
                    raise InvalidDocument(f"plan: rank {rank} holds expert {expert} of a layer of {experts}")
                masks[expert] |= 1 << rank
        missing = next((expert for expert, mask in enumerate(masks) if not mask), None)
        if missing is not None:
            raise InvalidDocument(f"plan: expert {missing} of a layer of {experts} lies on no device")
        only = [mask.bit_length() - 1 if mask & (mask - 1) == 0 else -1 for mask in masks]
        return cls(tuple(masks), np.array(only, np.int64))


def speeds_of(stage: Stage) -> tuple[float, ...]:
    """Relative speeds by rank, as the plan has them: the experts that lie there, one on several devices as a part."""
    speeds = [0.0] * len(stage.shares)
    for layer in zip(*(share.experts for share in stage.shares), strict=True):
        copies: dict[int, int] = {}
        for numbers in layer:
            for expert in numbers:
                copies[expert] = copies.get(expert, 0) + 1
        for rank, numbers in enumerate(layer):
            speeds[rank] += sum(1 / copies[expert] for expert in numbers)
    return tuple(max(speed, AGAIN) for speed in speeds)


def assign(chosen: NDArray[np.int64], holders: Holders, speeds: Sequence[float]) -> NDArray[np.int64]:
    """The rank that runs each pair; chosen: the experts of each row [rows, k], distinct within a row.

    Invariant: no row touches fewer devices beside the lead in any other way.
    """
    ranks: NDArray[np.int64] = holders.only[chosen]
    if (ranks >= 0).all():
        return ranks
    load = _Load(speeds)
    for row, place in zip(*np.nonzero(ranks >= 0), strict=True):
        load.add(int(ranks[row, place]), int(chosen[row, place]))
    for row in np.nonzero((ranks < 0).any(axis=1))[0]:
        found, experts = ranks[row], chosen[row]
        open_places = [int(place) for place in np.nonzero(found < 0)[0]]
        touched = 1 << LEAD
        for rank in found[found >= 0].tolist():
            touched |= 1 << rank
        unserved = frozenset(
            mask for mask in (holders.masks[experts[place]] for place in open_places) if not mask & touched
        )
        if unserved:
            touched |= min(_fewest(unserved), key=load.of)
        for place in open_places:
            expert = int(experts[place])
            found[place] = load.first_done(holders.masks[expert] & touched, expert)
            load.add(int(found[place]), expert)
    return ranks


class _Load:
    """What the devices have to do in a step, in experts' time over their speed."""

    def __init__(self, speeds: Sequence[float]) -> None:
        self._speeds = speeds
        self._done = [0.0] * len(speeds)
        self._running: set[tuple[int, int]] = set()

    def _cost(self, rank: int, expert: int) -> float:
        return (AGAIN if (rank, expert) in self._running else 1.0) / self._speeds[rank]

    def add(self, rank: int, expert: int) -> None:
        """One more row through an expert there."""
        self._done[rank] += self._cost(rank, expert)
        self._running.add((rank, expert))

    def of(self, mask: int) -> tuple[float, int]:
        """The load of the busiest device of a set; ties go to the lowest ranks."""
        return max(self._done[rank] + 1 / self._speeds[rank] for rank in _ranks(mask)), mask

    def first_done(self, mask: int, expert: int) -> int:
        """The device of a set that would be done first with one more row through the expert."""
        return min(_ranks(mask), key=lambda rank: (self._done[rank] + self._cost(rank, expert), rank))


@lru_cache(maxsize=4096)
def _fewest(unserved: frozenset[int]) -> tuple[int, ...]:
    """Every smallest set of ranks that has one of each mask; of many ranks one small set only."""
    union = 0
    for mask in unserved:
        union |= mask
    ranks = _ranks(union)
    if len(ranks) > _TRIED:
        return (_greedy(unserved, ranks),)
    for count in range(1, len(ranks) + 1):
        sets = [sum(1 << rank for rank in some) for some in combinations(ranks, count)]
        found = tuple(some for some in sets if all(mask & some for mask in unserved))
        if found:
            return found
    raise ValueError("an expert that nobody holds")


def _greedy(unserved: frozenset[int], ranks: Sequence[int]) -> int:
    found, left = 0, set(unserved)
    while left:
        best = max(ranks, key=lambda rank: (sum(mask >> rank & 1 for mask in left), -rank))
        found |= 1 << best
        left = {mask for mask in left if not mask & found}
    return found


def _ranks(mask: int) -> list[int]:
    return [rank for rank in range(mask.bit_length()) if mask >> rank & 1]
