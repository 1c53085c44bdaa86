"""Trees of drafted tokens: which branches run beside a window, and how many tokens of each. Pure.

A branch goes on from the middle of a window otherwise than the window does, so it gives tokens where the window's next
one is not drawn and its own first one is: as many as hold of it, as the pass draws what follows its last one too. A row
is worth the chance that it gives a token; rows are taken by falling worth, as many as give most tokens a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ganglion.wire.limits import TREE_BRANCHES

_PRIOR_TOKENS: Final = 8.0  # how many corrections the prior is worth
_KEPT: Final = 0.995  # of what was known, a correction later
_PRIOR_CHANCES: Final = (0.4, 0.2, 0.1)  # of the second guess, the third, and all beyond, where the first was wrong
_PRIOR_BRANCH: Final = 0.05  # of a pass of one row: what an entry more in it takes, rows aside
_BRANCH_KEPT: Final = 0.9


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that follow the first `at` of a window otherwise. rank: among guesses of its first; the window's has 0."""

    at: int
    tokens: tuple[int, ...]
    rank: int = 1


class Siblings:
    """Chances that a further guess is what is drawn where the first is not, by its rank."""

    def __init__(self) -> None:
        self._right = [0.0] * len(_PRIOR_CHANCES)
        self._seen = [0.0] * len(_PRIOR_CHANCES)

    def observed(self, rank: int, *, right: bool) -> None:
        """Where the first guess was wrong the one of this rank was at hand."""
        place = min(rank, len(_PRIOR_CHANCES)) - 1
        self._right[place] = self._right[place] * _KEPT + right
        self._seen[place] = self._seen[place] * _KEPT + 1.0

    def chance(self, rank: int) -> float:
        """Of the guess of this rank, 1 for the second."""
        place = min(rank, len(_PRIOR_CHANCES)) - 1
        prior = _PRIOR_CHANCES[place] * _PRIOR_TOKENS
        return (self._right[place] + prior) / (self._seen[place] + _PRIOR_TOKENS)


class BranchCost:
    """Seconds that a branch adds to a pass beside its rows: attention of its own, and what it takes of the chain."""

    def __init__(self) -> None:
        self._ratio = _PRIOR_BRANCH  # over a pass of one row

    def measured(self, branches: int, took_s: float, rows_s: float, row_s: float) -> None:
        """A pass with so many took `took_s`, where its rows alone would take `rows_s` and one row `row_s`."""
        if branches and row_s > 0.0:
            found = min(max(0.0, (took_s - rows_s) / branches / row_s), 1.0)
            self._ratio = _BRANCH_KEPT * self._ratio + (1.0 - _BRANCH_KEPT) * found

    def seconds(self, row_s: float) -> float:
        """Of one branch."""
        return self._ratio * row_s


@dataclass(frozen=True, slots=True)
class Tree:
    """Tokens of the window, and of each branch as many as run."""

    window: int
    branches: tuple[Branch, ...] = ()


def ranked_rows(
    window: int, branches: Sequence[Branch], chances: Sequence[float], sibling: Callable[[int], float]
) -> list[tuple[float, int | None]]:
    """Every drafted row as (tokens that it is expected to give, number of its branch or None), by falling worth.

    A row comes after all that it goes on from. chances: `Acceptance.chances`, at least one.
    """

    def chance(depth: int) -> float:
        return chances[min(depth, len(chances) - 1)]

    reached = [1.0]
    for depth in range(window):
        reached.append(reached[-1] * chance(depth))
    rows: list[tuple[float, int | None]] = [(worth, None) for worth in reached[1:]]
    for number, branch in enumerate(branches):
        if branch.at > window:
            continue
        worth = reached[branch.at] * (1.0 - chance(branch.at)) * sibling(branch.rank)
        for depth in range(len(branch.tokens)):
            rows.append((worth, number))
            worth *= chance(branch.at + depth + 1)
    return sorted(rows, key=lambda row: -row[0])  # stable: the window's come first


def best_tree(
    window: int,
    branches: Sequence[Branch],
    chances: Sequence[float],
    sibling: Callable[[int], float],
    pass_s: Callable[[int], float],
    *,
    branch_s: float,
    other_rows: int,
    most: int,
    other_tokens: float = 0.0,
) -> Tree:
    """Of a window of `window` tokens and what may run beside it, at most `most` rows: those that give most a second.

    pass_s: seconds of a pass of so many rows, `other_rows` of other sessions among them, which give `other_tokens`.
    """
    taken: dict[int | None, int] = {}
    best, rate = dict(taken), (1.0 + other_tokens) / pass_s(other_rows + 1)
    tokens, rows = 1.0 + other_tokens, 0
    for worth, number in ranked_rows(window, branches, chances, sibling):
        if rows == most:
            break
        if number is not None and number not in taken and len(taken) - (None in taken) == TREE_BRANCHES:
            continue
        taken[number] = taken.get(number, 0) + 1
        tokens, rows = tokens + worth, rows + 1
        took_s = pass_s(other_rows + 1 + rows) + branch_s * (len(taken) - (None in taken))
        if tokens / took_s > rate:
            best, rate = dict(taken), tokens / took_s
    return _tree(best, branches)


def forced_tree(
    window: int,
    branches: Sequence[Branch],
    chances: Sequence[float],
    sibling: Callable[[int], float],
    *,
    branch_rows: int,
    most: int,
) -> Tree:
    """The window, as long as `most` rows allow with up to `branch_rows` rows of branches, whatever a pass takes."""
    branch_rows = min(branch_rows, sum(len(branch.tokens) for branch in branches), most)
    window = min(window, most - branch_rows)
    taken: dict[int | None, int] = {None: window}
    for _, number in ranked_rows(window, branches, chances, sibling):
        known = number in taken or len(taken) <= TREE_BRANCHES
        if number is not None and known and sum(taken.values()) < window + branch_rows:
            taken[number] = taken.get(number, 0) + 1
    return _tree(taken, branches)


def _tree(taken: dict[int | None, int], branches: Sequence[Branch]) -> Tree:
    found = [(number, count) for number, count in taken.items() if number is not None]
    return Tree(
        taken.get(None, 0),
        tuple(Branch(branches[one].at, branches[one].tokens[:count], branches[one].rank) for one, count in found),
    )
