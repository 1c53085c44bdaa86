"""How much a subset could still gain under BEST: an upper bound by relaxation. Pure.

The Lagrangian of "each kind is answered by one member" (the dual of k-median, Cornuejols, Fisher and Nemhauser 1977):
for prices of the kinds at or above what is reached already, the price of all plus the largest surpluses. With prices
equal to what is reached this is the bound by submodularity; a subgradient lowers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.coordinator.selection.objective import Floats, Problem

_TINY: Final = 1e-12


@dataclass(frozen=True)
class Bound:
    """No extension is worth more than `bound`; each: with that candidate. point: prices to start the next one from."""

    bound: float
    each: Floats
    point: Floats


def best_bound(
    problem: Problem,
    reached: Floats,
    candidates: NDArray[np.intp],
    most: int,
    point: Floats,
    *,
    steps: int,
    enough: float,
) -> Bound:
    """Of BEST. reached: [kinds]. point: prices to start from. Ends early at a bound of `enough` or less."""
    quality = problem.quality[:, candidates]
    share = problem.share
    prices = np.maximum(point, reached)
    most = min(most, candidates.size)
    found: Bound | None = None
    each = np.zeros(0)
    scale = 1.0
    for _ in range(steps):
        surplus = quality - prices[:, None]
        gains = np.maximum(surplus, 0.0).T @ share
        order = np.argsort(-gains, kind="stable")
        top = order[:most]
        base = float(share @ prices)
        bound = base + float(gains[top].sum())
        # Any other candidate would take the place of the last of the top.
        here = np.full(gains.size, bound)
        here[order[most:]] += gains[order[most:]] - gains[top[-1]]
        each = here if found is None else np.minimum(each, here)
        if found is None or bound < found.bound - _TINY:
            found = Bound(bound, each, prices)
        else:
            scale *= 0.7
        if bound <= enough:
            break
        slope = share * (1.0 - (surplus[:, top] > 0.0).sum(axis=1))
        # A kind whose price cannot fall does not count.
        slope[(slope > 0.0) & (prices <= reached)] = 0.0
        norm = float(slope @ slope)
        if norm <= _TINY:
            break
        prices = np.maximum(prices - slope * (scale * (bound - enough) / norm), reached)
    if found is None:
        raise ValueError("a bound takes one step at least")
    return Bound(found.bound, each, found.point)


def best_children(
    problem: Problem, candidates: NDArray[np.intp], most: int, point: Floats
) -> tuple[NDArray[np.intp], Floats]:
    """(order of the candidates, what no subset exceeds that takes the i-th of the order and none before it)."""
    share, prices = problem.share, point
    surplus = np.maximum(problem.quality[:, candidates] - prices[:, None], 0.0).T @ share
    order = np.argsort(-surplus, kind="stable")
    sums = np.append(0.0, surplus[order].cumsum())
    ends = np.minimum(np.arange(order.size) + most, order.size)
    return order, float(share @ prices) + sums[ends] - sums[:-1]
