"""The best subset of experts within its limits: branch and bound, best bound first. Pure and deterministic."""

from __future__ import annotations

from typing import Final

from ganglion.coordinator.selection.best_tree import BestSearch
from ganglion.coordinator.selection.coverage_tree import CoverageSearch
from ganglion.coordinator.selection.objective import Problem
from ganglion.coordinator.selection.search import PROVED, Solution

__all__ = ["PROVED", "SUBSET_CELLS", "WORK", "Solution", "solve"]

WORK: Final = 250  # of one search at most, in units of search.WORK_CELLS cells of kinds times experts
SUBSET_CELLS: Final = 40_000  # of kinds times subsets: up to here all that may join are tried at once


def solve(problem: Problem, work: int = WORK, subset_cells: int = SUBSET_CELLS) -> Solution:
    """The subset worth most; beyond `work` the best that was found, with an honest bound."""
    if problem.experts == 0 or problem.most == 0:
        return Solution((), 0.0, 0.0, 0)
    search = BestSearch if problem.objective == "best" else CoverageSearch
    return search(problem, work, subset_cells).run()
