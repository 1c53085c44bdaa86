"""Branch and bound of BEST, where one expert answers, best bound first. Pure and deterministic.

A node has members, and candidates that may still join. It ends where a bound (bounds.py) says that no extension beats
the best subset known, or where so few may join that all are tried at once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.coordinator.selection.bounds import best_bound, best_children
from ganglion.coordinator.selection.objective import Floats, Problem, State
from ganglion.coordinator.selection.search import PAIR_CELLS, PROVED, ROOT_STEPS, WORK_CELLS, Search

NODE_STEPS: Final = 4


@dataclass(frozen=True)
class _Node:
    members: tuple[int, ...]
    state: State
    room: Floats
    candidates: NDArray[np.intp]
    prices: Floats


class BestSearch(Search):
    """See the module."""

    def __init__(self, problem: Problem, work: int, subset_cells: int) -> None:
        super().__init__(problem, work, subset_cells)
        self._heap: list[tuple[float, int, int, _Node]] = []

    def _climb(self, candidates: NDArray[np.intp]) -> float:
        """What no subset exceeds, once the tree of BEST is searched."""
        point = self._problem.quality[:, list(self._members)].max(axis=1, initial=0.0)
        self._expand(_Node((), State(self._problem), self._room, candidates, point), ROOT_STEPS)
        bound = self._value
        while self._heap:
            bound = -self._heap[0][0]
            if bound <= self._value + PROVED or self._work <= 0:
                break
            _, _, at, parent = heapq.heappop(self._heap)
            self._expand(self._child(parent, at), NODE_STEPS)
        else:
            bound = self._value
        return bound

    def _expand(self, node: _Node, steps: int) -> None:
        """Close a node, or put those that take one candidate more on the heap."""
        problem, state, room = self._problem, node.state, node.room
        candidates, point = node.candidates, node.prices
        costs, gains = self._costs[:, candidates], state.gains(candidates)
        fits = np.all(costs <= room[:, None], axis=0) & (gains > 0.0)
        if not fits.all():
            candidates, costs, gains = candidates[fits], costs[:, fits], gains[fits]
        self._work -= 1.0
        if not candidates.size:
            return
        best = int(np.argmax(gains))
        self._offer((*node.members, int(candidates[best])), state.value() + float(gains[best]))
        more = self._joiners(costs, room)
        if more == 1:
            return
        if more == 2 and problem.share.size * candidates.size**2 <= PAIR_CELLS:
            self._pairs(node.members, state, room, candidates)
            return
        if problem.share.size << candidates.size <= self._subset_cells:
            self._subsets(node.members, state, room, candidates)
            return
        self._nodes += 1
        self._work -= steps * (0.5 + problem.share.size * candidates.size / WORK_CELLS) / 3
        room = np.append(room[:-1], float(more))
        enough = self._value + PROVED / 2
        found = best_bound(problem, state.left, candidates, more, point, steps=steps, enough=enough)
        # What is worth no more than its members and the sum of its gains.
        bound = min(found.bound, state.value() + float(np.sort(gains)[-more:].sum()))
        keep = found.each > self._value + PROVED
        if bound <= self._value + PROVED or not keep.any():
            return
        self._children(node, candidates[keep], room, found.point, bound)

    def _children(self, node: _Node, candidates: NDArray[np.intp], room: Floats, point: Floats, bound: float) -> None:
        """One node for each candidate that is worth it, without those before it; strong ones come first."""
        problem = self._problem
        order, bounds = best_children(problem, candidates, int(room[-1]), point)
        candidates = candidates[order]
        self._work -= problem.share.size * candidates.size / WORK_CELLS
        # An expert that one before it dominates never joins without that one.
        led = np.triu(self._over[np.ix_(candidates, candidates)], 1).any(axis=0)
        parent = _Node(node.members, node.state, room, candidates, point)
        bounds = np.minimum(bounds, bound)
        for at in np.flatnonzero((bounds > self._value + PROVED) & ~led):
            self._count += 1
            heapq.heappush(self._heap, (-float(bounds[at]), self._count, int(at), parent))

    def _child(self, parent: _Node, at: int) -> _Node:
        """With the candidate at `at`, and those after it as candidates."""
        chosen, point = int(parent.candidates[at]), parent.prices
        return _Node(
            (*parent.members, chosen),
            parent.state.plus(chosen),
            parent.room - self._costs[:, chosen],
            parent.candidates[at + 1 :],
            point,
        )

    def _joiners(self, costs: Floats, room: Floats) -> int:
        """How many candidates can join at most."""
        cheapest = np.sort(costs, axis=1).cumsum(axis=1)
        return int((cheapest <= room[:, None]).sum(axis=1).min())
