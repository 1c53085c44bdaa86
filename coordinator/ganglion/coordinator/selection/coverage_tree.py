"""Branch and bound of COVERAGE, where several answer, the WAVE best nodes at once. Pure and deterministic.

A node has members, and candidates that may still join. It ends where a bound (coverage.py) says that no extension beats
the best subset known, or where so few may join that all are tried at once. An expert that another one dominates joins
only after that one. Bounds of many nodes are taken together, because what one call costs counts for more than what it
computes.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.coordinator.selection.coverage import Nodes, coverage_bounds, coverage_children
from ganglion.coordinator.selection.objective import Floats, Problem, State, log_miss
from ganglion.coordinator.selection.search import PAIR_CELLS, PROVED, ROOT_STEPS, WORK_CELLS, Search

WAVE: Final = 16
NODE_STEPS: Final = 2


@dataclass(frozen=True)
class _Spot:
    """A node of COVERAGE, with arrays over all experts; order: strong candidates first. See coverage.Nodes."""

    members: tuple[int, ...]
    left: Floats
    room: Floats
    order: NDArray[np.intp]
    at: Floats
    prices: Floats

    def child(self, problem: Problem, costs: Floats, rank: int) -> _Spot:
        """With the candidate of that rank, and those after it as candidates."""
        chosen = int(self.order[rank])
        left = self.left * (1.0 - problem.quality[:, chosen])
        room = self.room - costs[:, chosen]
        return _Spot((*self.members, chosen), left, room, self.order[rank + 1 :], self.at, self.prices)


class CoverageSearch(Search):
    """See the module."""

    def __init__(self, problem: Problem, work: int, subset_cells: int) -> None:
        super().__init__(problem, work, subset_cells)
        self._logs = log_miss(problem)
        self._cheap = np.argsort(self._costs, axis=1)
        self._spots: list[tuple[float, int, int, _Spot]] = []

    def _climb(self, candidates: NDArray[np.intp]) -> float:
        """What no subset exceeds, once the tree is searched."""
        problem = self._problem
        at = np.isin(np.arange(problem.experts), self._members).astype(np.float64)
        left, prices = np.ones(problem.share.size), np.zeros(self._room.size)
        self._wave([_Spot((), left, self._room, candidates, at, prices)], ROOT_STEPS)
        while self._spots:
            bound = -self._spots[0][0]
            if bound <= self._value + PROVED or self._work <= 0:
                return bound
            spots: list[_Spot] = []
            while self._spots and len(spots) < WAVE and -self._spots[0][0] > self._value + PROVED:
                _, _, rank, parent = heapq.heappop(self._spots)
                spots.append(parent.child(problem, self._costs, rank))
            self._wave(spots, NODE_STEPS)
        return self._value

    def _wave(self, spots: list[_Spot], steps: int) -> None:
        """Close nodes, or put those that take one candidate more on the heap."""
        problem, costs = self._problem, self._costs
        left, room = np.stack([one.left for one in spots]), np.stack([one.room for one in spots])
        free = np.zeros((len(spots), problem.experts), np.bool_)
        for row, one in enumerate(spots):
            free[row, one.order] = True
        gains = self._gains(left)
        free &= (costs <= room[:, :, None]).all(axis=1) & (gains > 0.0)
        gains = np.where(free, gains, 0.0)
        worth = 1.0 - left @ problem.share
        row, best = divmod(int(np.argmax(worth[:, None] + gains)), problem.experts)
        if free[row, best]:
            self._offer((*spots[row].members, best), float(worth[row] + gains[row, best]))
        more = self._joiners(free, room)
        # What is worth no more than its members and the sum of its gains.
        sums = np.sort(gains, axis=1)[:, ::-1].cumsum(axis=1)
        simple = worth + sums[np.arange(len(more)), np.maximum(more, 1) - 1]
        open_rows = np.flatnonzero((more > 1) & (simple > self._value + PROVED))
        self._work -= 2.0 + len(spots) * (1.0 + steps * problem.share.size * problem.experts / WORK_CELLS) / 4
        counts = free.sum(axis=1).tolist()
        rows = [
            row
            for row in open_rows.tolist()
            if not self._ended(spots[row], room[row], free[row], counts[row], int(more[row]))
        ]
        if not rows:
            return
        self._nodes += len(rows)
        spots, gains, more = [spots[row] for row in rows], gains[rows], more[rows]
        left, room, free = left[rows], room[rows], free[rows]
        room[:, -1] = more
        at = np.where(free, np.stack([one.at for one in spots]), 0.0)
        nodes = Nodes(problem.share * left, room, free, at, np.stack([one.prices for one in spots]))
        bounds, each = coverage_bounds(nodes, self._logs, costs, steps=steps, enough=self._value + PROVED / 2)
        bounds = np.minimum(bounds, simple[rows])
        nodes.free = free & (each > self._value + PROVED)
        alive = (bounds > self._value + PROVED) & nodes.free.any(axis=1)
        if alive.any():
            kept = np.flatnonzero(alive)
            self._wave_children([spots[row] for row in kept], left[kept], nodes.take(kept), gains[kept], bounds[kept])

    def _wave_children(self, spots: list[_Spot], left: Floats, nodes: Nodes, gains: Floats, bounds: Floats) -> None:
        """One node for each candidate that is worth it, without those before it; strong ones come first."""
        widest = int(nodes.free.sum(axis=1).max())
        strong = np.where(nodes.free, -gains * (0.5 + nodes.at), np.inf)
        order = np.argsort(strong, axis=1, kind="stable")[:, :widest]
        children, there = coverage_children(nodes, order, self._logs, self._costs)
        self._work -= len(spots) * self._problem.share.size * widest / WORK_CELLS / 2
        # An expert that one before it dominates never joins without that one.
        over = self._over[order[:, :, None], order[:, None, :]] & there[:, :, None]
        led = (over & self._later[:widest, :widest]).any(axis=1)
        children = np.minimum(children, bounds[:, None])
        worth_it = there & ~led & (children > self._value + PROVED)
        parents = [
            _Spot(spot.members, left[row], nodes.room[row], order[row, :ranks], nodes.at[row], nodes.prices[row])
            for row, (spot, ranks) in enumerate(zip(spots, there.sum(axis=1).tolist(), strict=True))
        ]
        rows, ranks = np.nonzero(worth_it)
        for worth, row, rank in zip((-children[rows, ranks]).tolist(), rows.tolist(), ranks.tolist(), strict=True):
            self._count += 1
            heapq.heappush(self._spots, (worth, self._count, rank, parents[row]))

    def _joiners(self, free: NDArray[np.bool_], room: Floats) -> NDArray[np.intp]:
        """[nodes]: how many may join at most."""
        found: NDArray[np.intp] = free.sum(axis=1)
        for limit, row in enumerate(self._costs):
            cheap = self._cheap[limit]
            there = free[:, cheap]
            used = np.where(there, row[cheap], 0.0).cumsum(axis=1)
            found = np.minimum(found, ((used <= room[:, limit, None]) & there).sum(axis=1))
        return found

    def _ended(self, spot: _Spot, room: Floats, free: NDArray[np.bool_], count: int, more: int) -> bool:
        """Whether all that may join, `more` of `count`, were tried at once."""
        kinds = self._problem.share.size
        if more == 2 and kinds * count**2 <= PAIR_CELLS:
            tried = self._pairs
        elif kinds << count <= self._subset_cells:
            tried = self._subsets
        else:
            return False
        tried(spot.members, State(self._problem, spot.left), room, np.flatnonzero(free))
        return True
