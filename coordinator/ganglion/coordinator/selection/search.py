"""What both searches for the best subset begin with and end by: greedy rules, swaps, and trying all that is left. Pure.

Values are monotone, limits are closed under taking members away: every prefix of a subset is a subset that is allowed.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.coordinator.selection.objective import SLACK, Floats, Problem, State, dominators, value

WORK_CELLS: Final = 512
PROVED: Final = 1e-9  # a subset is the best when no other can be worth more by this
ROOT_STEPS: Final = 40
PAIR_CELLS: Final = 200_000  # of kinds times pairs: up to here a node's last two members are tried at once


@dataclass(frozen=True)
class Solution:
    """The best members that were found, their value, and what no subset exceeds. nodes: bounds taken."""

    members: tuple[int, ...]
    value: float
    bound: float
    nodes: int

    @property
    def gap(self) -> float:
        """How far the optimum may lie above the value."""
        return max(0.0, self.bound - self.value)

    @property
    def optimal(self) -> bool:
        """Whether no subset is better."""
        return self.gap <= PROVED


class Search(abc.ABC):
    """A problem's, within so much `work`; one run each."""

    def __init__(self, problem: Problem, work: int, subset_cells: int) -> None:
        self._problem = problem
        self._work = float(work)
        self._subset_cells = subset_cells
        # The number of members is a limit like the others, and the last one.
        self._costs = np.vstack([problem.costs, np.ones((1, problem.experts))])
        self._room = np.append(np.full(problem.costs.shape[0], 1.0 + SLACK), float(problem.most))
        self._later = np.triu(np.ones((problem.experts, problem.experts), np.bool_), 1)
        self._over = dominators(problem)
        self._members: tuple[int, ...] = ()
        self._value = 0.0
        self._nodes = 0
        self._count = 0

    def run(self) -> Solution:
        """The best members within the work."""
        candidates = self._worth_having()
        self._start(candidates)
        bound = self._climb(candidates)
        members = self._without_idle(self._members)
        return Solution(members, value(self._problem, list(members)), max(bound, self._value), self._nodes)

    @abc.abstractmethod
    def _climb(self, candidates: NDArray[np.intp]) -> float:
        """Search the tree; what no subset exceeds."""

    def _worth_having(self) -> NDArray[np.intp]:
        """Experts whose dominators could all join before them."""
        problem, over = self._problem, self._over
        everyone = np.arange(problem.experts)
        if problem.objective == "best":
            return everyone[~over.any(axis=0)]
        taken = self._costs @ over + self._costs  # of each with its dominators
        return everyone[np.all(taken <= self._room[:, None], axis=0)]

    # The first subset

    def _start(self, candidates: NDArray[np.intp]) -> None:
        costs = self._costs
        rules = [np.ones(self._problem.experts), *costs[:-1]]
        if len(rules) > 2:
            rules += [costs[:-1].max(axis=0), costs[:-1].sum(axis=0)]
        for members in self._greedy(candidates, np.maximum(np.stack(rules), 1e-12)):
            self._offer(members, value(self._problem, list(members)))
        self._swap(candidates)

    def _greedy(self, candidates: NDArray[np.intp], prices: Floats) -> list[tuple[int, ...]]:
        """For each rule, [rules, experts], members by what they add for their price, while any fits."""
        problem, rows = self._problem, np.arange(len(prices))
        members: list[list[int]] = [[] for _ in rows]
        left = np.stack([State(problem).left] * rows.size)
        room = np.stack([self._room] * rows.size)
        free = np.zeros(prices.shape, np.bool_)
        free[:, candidates] = True
        while True:
            free &= (self._costs <= room[:, :, None]).all(axis=1)
            gains = np.where(free, self._gains(left), 0.0)
            chosen = np.argmax(gains / prices, axis=1)
            joins = gains[rows, chosen] > 0.0
            if not joins.any():
                return [tuple(each) for each in members]
            for row in np.flatnonzero(joins):
                members[row].append(int(chosen[row]))
            column = problem.quality[:, chosen].T
            after = np.maximum(left, column) if problem.objective == "best" else left * (1.0 - column)
            left = np.where(joins[:, None], after, left)
            room = room - np.where(joins, self._costs[:, chosen], 0.0).T
            free[rows, chosen] = False

    def _gains(self, left: Floats) -> Floats:
        """[nodes, experts]: what each would add. left: [nodes, kinds], as of State."""
        problem = self._problem
        if problem.objective == "best":
            added: Floats = np.maximum(problem.quality - left[:, :, None], 0.0)
            return added.transpose(0, 2, 1) @ problem.share
        gains: Floats = (problem.share * left) @ problem.quality
        return gains

    def _swap(self, candidates: NDArray[np.intp], rounds: int = 12) -> None:
        """Exchange one member for another while that helps, then fill up."""
        problem = self._problem
        for _ in range(rounds):
            before, members = self._value, self._members
            others = np.setdiff1d(candidates, members)
            if not members or not others.size:
                return
            kept = [tuple(each for each in members if each != out) for out in members]
            states = [self._after(each) for each in kept]
            rooms = np.stack([room for _, room in states])
            left = np.stack([state.left for state, _ in states])
            fits: NDArray[np.bool_] = np.all(self._costs[:, others] <= rooms[:, :, None], axis=1)
            worth = np.where(fits, self._gains(left)[:, others], -1.0)
            best = worth.argmax(axis=1)
            worth = np.array([state.value() for state, _ in states]) + worth[np.arange(len(kept)), best]
            for row in np.argsort(-worth, kind="stable"):
                joined = int(others[best[row]])
                if not fits[row, best[row]]:
                    continue
                room = rooms[row] - self._costs[:, joined]
                rest = others[(self._costs[:, others] <= room[:, None]).all(axis=0)]
                added = (*kept[row], joined)
                gains = states[row][0].plus(joined).gains(rest[rest != joined])
                if gains.size and gains.max() > 0.0:
                    added = (*added, int(rest[rest != joined][int(np.argmax(gains))]))
                elif worth[row] <= before:
                    continue
                self._offer(added, value(problem, list(added)))
                if self._value > before + PROVED:
                    break
            if self._value <= before + PROVED:
                return

    def _after(self, members: tuple[int, ...]) -> tuple[State, Floats]:
        """What members leave, and the room beside them."""
        problem, chosen = self._problem, list(members)
        quality = problem.quality[:, chosen]
        left = quality.max(axis=1, initial=0.0) if problem.objective == "best" else np.prod(1.0 - quality, axis=1)
        return State(problem, left), self._room - self._costs[:, chosen].sum(axis=1)

    def _offer(self, members: tuple[int, ...], worth: float) -> None:
        if worth > self._value:
            self._members, self._value = members, worth

    def _without_idle(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """Without those that add nothing, the dearest of them first."""
        kept = sorted(members)
        for each in sorted(members, key=lambda one: (-float(self._costs[:, one].sum()), -one)):
            rest = [other for other in kept if other != each]
            if rest and value(self._problem, rest) >= self._value - 1e-12:
                kept = rest
        return tuple(kept)

    def _pairs(self, members: tuple[int, ...], state: State, room: Floats, candidates: NDArray[np.intp]) -> None:
        """Try every two candidates at once: they are the last that may join."""
        problem = self._problem
        costs = self._costs[:, candidates]
        allowed = self._later[: candidates.size, : candidates.size].copy()
        for limit, row in enumerate(costs):
            allowed &= row[:, None] <= room[limit] - row
        quality = problem.quality[:, candidates]
        self._work -= candidates.size * problem.share.size / WORK_CELLS
        if problem.objective == "best":
            reached = np.maximum(quality, state.left[:, None])
            worth = np.einsum("k,kij->ij", problem.share, np.maximum(reached[:, :, None], reached[:, None, :]))
        else:
            missed = 1.0 - quality
            worth = 1.0 - missed.T @ ((problem.share * state.left)[:, None] * missed)
        worth = np.where(allowed, worth, 0.0)
        first, second = divmod(int(np.argmax(worth)), candidates.size)
        if worth[first, second] > 0.0:
            pair = (int(candidates[first]), int(candidates[second]))
            self._offer((*members, *pair), float(worth[first, second]))

    def _subsets(self, members: tuple[int, ...], state: State, room: Floats, candidates: NDArray[np.intp]) -> None:
        """Try every subset of the candidates at once; bit i of a column's number says whether candidate i is in it."""
        problem = self._problem
        best = problem.objective == "best"
        left, costs = np.empty((problem.share.size, 1 << candidates.size)), np.empty((room.size, 1 << candidates.size))
        left[:, 0], costs[:, 0] = state.left, 0.0
        for at, each in enumerate(candidates):
            half, column = 1 << at, problem.quality[:, each, None]
            before = left[:, :half]
            left[:, half : 2 * half] = np.maximum(before, column) if best else before * (1.0 - column)
            costs[:, half : 2 * half] = costs[:, :half] + self._costs[:, each, None]
        self._work -= left.size / WORK_CELLS / 4
        met = problem.share @ left
        worth = np.where(np.all(costs <= room[:, None], axis=0), met if best else 1.0 - met, 0.0)
        found = int(np.argmax(worth))
        joined = tuple(int(each) for at, each in enumerate(candidates) if found >> at & 1)
        self._offer((*members, *joined), float(worth[found]))
