"""What a subset of experts is worth, and the search problem in numbers. Pure.

Both values lie within 0 and 1, grow with the subset (monotone) and grow less the more is there (submodular):

* BEST, one expert answers: the quality of the best member for each kind of request, averaged over the kinds (facility
  location).
* COVERAGE, all answer and one answer is kept or mixed (vote, rerank, blend): the chance that at least one member does
  well, were their failures independent: 1 - prod(1 - quality). Under facility location a second expert of a domain
  would be worth nothing, and a vote would always be one of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Objective = Literal["best", "coverage"]

SURE: Final = 0.999  # quality counts as at most this (no other could add to a sure expert), and as at least 1 - this
SLACK: Final = 1e-9  # sums of costs may exceed a limit by this share of it: they are added in any order


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Experts to choose among; every one meets every limit alone.

    share: [kinds], adds up to 1. quality: [kinds, experts], 1 - SURE to SURE. costs: [limits, experts], each as a share
    of its limit, so that the members' sum is at most 1; `best` has none. most: members at most.
    """

    objective: Objective
    share: Floats
    quality: Floats
    costs: Floats
    most: int

    @property
    def experts(self) -> int:
        """How many there are to choose among."""
        return int(self.quality.shape[1])


def problem_of(
    objective: Objective, share: Floats, quality: Floats, costs: Floats, limits: Floats, *, most: int
) -> Problem:
    """A Problem: costs as shares of their limits (infinite ones are left out), `most` 0 for any number."""
    share = np.asarray(share, np.float64)
    finite = np.isfinite(limits)
    experts = quality.shape[1]
    return Problem(
        objective=objective,
        share=share / share.sum(),
        quality=np.clip(np.asarray(quality, np.float64), 1.0 - SURE, SURE),
        costs=costs[finite] / limits[finite, None],
        most=min(most or experts, experts),
    )


def value(problem: Problem, members: list[int]) -> float:
    """What the subset is worth, 0 to 1."""
    if not members:
        return 0.0
    chosen = problem.quality[:, members]
    met = chosen.max(axis=1) if problem.objective == "best" else 1.0 - np.prod(1.0 - chosen, axis=1)
    return float(problem.share @ met)


def is_allowed(problem: Problem, members: list[int]) -> bool:
    """Whether the subset keeps within every limit."""
    return len(members) <= problem.most and bool(
        np.all(problem.costs[:, members].sum(axis=1) <= 1.0 + SLACK) if len(members) else True
    )


class State:
    """What a subset leaves to be gained: for `best` the quality reached of each kind, else the chance of failure."""

    __slots__ = ("left", "problem")

    def __init__(self, problem: Problem, left: Floats | None = None) -> None:
        self.problem = problem
        empty = 0.0 if problem.objective == "best" else 1.0
        self.left = np.full(problem.share.size, empty) if left is None else left

    def value(self) -> float:
        """Of the subset."""
        met = self.problem.share @ self.left
        return float(met if self.problem.objective == "best" else 1.0 - met)

    def gains(self, experts: NDArray[np.intp]) -> Floats:
        """[experts]: what each of them would add."""
        problem = self.problem
        if problem.objective == "best":
            return np.maximum(problem.quality[:, experts] - self.left[:, None], 0.0).T @ problem.share
        return (problem.share * self.left) @ problem.quality[:, experts]

    def plus(self, expert: int) -> State:
        """With one more."""
        column = self.problem.quality[:, expert]
        left = np.maximum(self.left, column) if self.problem.objective == "best" else self.left * (1.0 - column)
        return State(self.problem, left)


def dominators(problem: Problem) -> NDArray[np.bool_]:
    """[experts, experts]: [i, j] where i is at least as good as j for every kind, at no higher cost.

    Equal ones are ordered by index, so that this is a strict order. In place of j, i could always be taken.
    """
    quality, costs = problem.quality, problem.costs
    better = np.all(quality[:, :, None] >= quality[:, None, :], axis=0)
    cheaper = np.all(costs[:, :, None] <= costs[:, None, :], axis=0) if costs.size else np.ones_like(better)
    over = better & cheaper
    equal = over & over.T
    strict: NDArray[np.bool_] = (over & ~equal) | (equal & np.triu(np.ones_like(over), 1))
    return strict


def log_miss(problem: Problem) -> Floats:
    """[kinds, experts]: -log(1 - quality), in which COVERAGE adds up."""
    return -np.log1p(-problem.quality)


def risk_of_chance(chance: float) -> float:
    """-log of the chance to be in time; infinite for none. The chances of members multiply, so these add up."""
    return -math.log(chance) if chance > 0.0 else math.inf
