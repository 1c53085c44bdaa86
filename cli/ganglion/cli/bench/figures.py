"""Figures out of rounds: the median, how far rounds lie apart, and ratios made round by round. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """One figure over the rounds, in the order in which they ran; at least one."""

    rounds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rounds:
            raise ValueError("a figure of no round")

    @classmethod
    def of(cls, rounds: Sequence[float]) -> Spread:
        """Of one figure a round."""
        return cls(tuple(rounds))

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.rounds)

    @property
    def document(self) -> dict[str, Any]:
        """As `--json` has it."""
        return {"median": self.median, "low": min(self.rounds), "high": max(self.rounds), "rounds": list(self.rounds)}

    def shown(self, digits: int = 1) -> str:
        """For a table: the median, and the range of the rounds where there are several."""
        if len(self.rounds) == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({min(self.rounds):.{digits}f}–{max(self.rounds):.{digits}f})"


def ratios(ours: Spread, theirs: Spread) -> Spread:
    """Ours over theirs of each round: noise that lasts a round falls on both. Raises ValueError for other rounds."""
    return Spread.of([a / b for a, b in zip(ours.rounds, theirs.rounds, strict=True)])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that `share` (0 to 1) of them are not above; nothing is interpolated.

    Raises ValueError when there are none.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def gaps(at_s: Sequence[float]) -> list[float]:
    """Seconds between neighbours; tokens that came together have none between them."""
    return [later - earlier for earlier, later in itertools.pairwise(at_s)]
