"""Pure: how many answers are worth their cost. F(N) = F_max (1 - (1 - p)^N), arXiv 2505.20522.

F(N): the chance that the answer which is kept in the end is among the first N. The next one adds F_max p (1 - p)^N:
N is at the saturation point once that is below what an answer must bring.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

MOST: Final = 32  # answers of one request
GAIN: Final = 0.05  # that one more answer must bring
FEWEST: Final = 16  # requests, before a fit is believed
_ROUNDS: Final = 60  # of the golden section: the interval shrinks to 1e-12 of itself
_GOLDEN: Final = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Curve:
    """p: chance that one answer is the one; f_max: of any number of them."""

    p: float
    f_max: float

    def at(self, count: float) -> float:
        """F(count)."""
        return float(self.f_max * (1 - (1 - self.p) ** count))

    def saturation(self, gain: float = GAIN) -> int:
        """The smallest N whose next answer brings less than `gain`; 1 to MOST."""
        if self.p >= 1 or self.f_max * self.p <= gain:
            return 1
        if self.p <= 0:
            return MOST
        return min(MOST, max(1, math.ceil(math.log(gain / (self.f_max * self.p)) / math.log(1 - self.p))))


WITHOUT_DATA: Final = Curve(p=0.35, f_max=1.0)  # its saturation point is 5


def fit(points: Sequence[tuple[int, float, float]]) -> Curve:
    """The least-squares curve through (N, F, weight); p in (0, 1), f_max in (0, 1].

    For a given p the best f_max is linear regression, so one dimension is searched: a grid to find the valley, then a
    golden section in it.
    """
    counts = np.array([count for count, _, _ in points], np.float64)
    values = np.array([value for _, value, _ in points], np.float64)
    weights = np.array([weight for _, _, weight in points], np.float64)

    def scale(p: float) -> float:
        shape = 1 - (1 - p) ** counts
        return float(np.clip((weights * shape * values).sum() / max((weights * shape * shape).sum(), 1e-300), 1e-9, 1))

    def loss(p: float) -> float:
        return float((weights * (scale(p) * (1 - (1 - p) ** counts) - values) ** 2).sum())

    grid = np.concatenate([np.geomspace(1e-4, 0.1, 60), np.linspace(0.1, 1 - 1e-6, 200)[1:]])
    at = int(np.argmin([loss(p) for p in grid]))
    low, high = float(grid[max(0, at - 1)]), float(grid[min(len(grid) - 1, at + 1)])
    for _ in range(_ROUNDS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    p = (low + high) / 2
    return Curve(p, scale(p))


class Tally:
    """Counts, for every class of requests, which of a request's answers was the first like the one that was kept."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[tuple[int, int], int]] = {}

    def add(self, name: str, first: int, count: int) -> None:
        """`first` of `count` answers, from 1 on, said what was kept; what one answer alone says is no evidence."""
        if 1 <= first <= count <= MOST and count > 1:
            counts = self._seen.setdefault(name, {})
            counts[first, count] = counts.get((first, count), 0) + 1

    def curve(self, name: str) -> Curve:
        """Fitted to what was counted; WITHOUT_DATA before FEWEST requests."""
        counts = self._seen.get(name, {})
        if sum(counts.values()) < FEWEST:
            return WITHOUT_DATA
        return fit(_points(counts))


def _points(counts: Mapping[tuple[int, int], int]) -> list[tuple[int, float, float]]:
    """(N, share found by then, requests that had N answers); a request stops counting at its last answer."""
    points = []
    for at in range(1, max(count for _, count in counts) + 1):
        reached = {key: seen for key, seen in counts.items() if key[1] >= at}
        total = sum(reached.values())
        points.append((at, sum(seen for (first, _), seen in reached.items() if first <= at) / total, float(total)))
    return points
