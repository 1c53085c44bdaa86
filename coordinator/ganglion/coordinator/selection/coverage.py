"""How much subsets could still gain under COVERAGE, of many nodes of a search at once. Pure.

With t = sum of -log(1 - quality) over the added experts, what is missed is sum of w exp(-t) over the kinds. Around any
point tau Jensen's inequality bounds it from below by an exponential of one linear function of the subset, which the
Lagrangian of a knapsack bounds for any prices of the limits; tau moves towards the knapsack's own fractional answer
(Frank and Wolfe 1956), prices follow by line searches over one limit after the other (Dantzig's fractional knapsack).

Arrays have a row for each node, [nodes, ...], and a column for each expert, whether it may still join or not: at the
sizes of this problem what one call costs counts for more than what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.coordinator.selection.objective import Floats

PATIENCE: Final = 2  # steps before a relaxation may end for falling slowly:
FALL: Final = 0.03  # by less than this share of what it lies above the best subset known
_TINY: Final = 1e-12


@dataclass
class Nodes:
    """Rows of a search. left: [nodes, kinds], chance of failure so far times the share of the kind.

    room: [nodes, limits], the last limit counts members. free: [nodes, experts], who may still join. at: [nodes,
    experts], fractions, 0 for others, and prices: [nodes, limits], where the relaxation is taken.
    """

    left: Floats
    room: Floats
    free: NDArray[np.bool_]
    at: Floats
    prices: Floats

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Nodes:
        """Some of them."""
        return Nodes(self.left[rows], self.room[rows], self.free[rows], self.at[rows], self.prices[rows])


def coverage_bounds(nodes: Nodes, logs: Floats, costs: Floats, *, steps: int, enough: float) -> tuple[Floats, Floats]:
    """([nodes] what no extension exceeds, [nodes, experts] what none with that expert exceeds).

    The nodes' points move. logs: [kinds, experts], -log(1 - quality). costs: [limits, experts]. Ends early when
    no bound falls towards `enough`.
    """
    fractions, prices = nodes.at, nodes.prices
    binding = nodes.free @ costs.T > nodes.room
    best = np.full(len(fractions), np.inf)
    each = np.full(fractions.shape, np.inf)
    for step in range(steps):
        tau = fractions @ logs.T
        tilted = nodes.left * np.exp(-tau)
        total = np.maximum(tilted.sum(axis=1), _TINY)
        tilted /= total[:, None]
        gains = tilted @ logs
        last = step == steps - 1
        prices, filled = _priced(nodes, gains, costs, binding, prices, fill=not last)
        reduced = gains - prices @ costs
        most = (prices * nodes.room).sum(axis=1) + (np.maximum(reduced, 0.0) * nodes.free).sum(axis=1)
        exponent = np.log(total) + (tilted * tau).sum(axis=1) - most
        bound = 1.0 - np.exp(exponent)
        each = np.minimum(each, 1.0 - np.exp(exponent[:, None] - np.minimum(reduced, 0.0)))
        fell = bound < best
        slow = (best - bound < FALL * (best - enough)) | (bound <= enough)
        nodes.at = np.where(fell[:, None], fractions, nodes.at)
        nodes.prices = np.where(fell[:, None], prices, nodes.prices)
        best = np.minimum(best, bound)
        if last or (step >= PATIENCE and slow.all()):
            break
        fractions = fractions + (filled - fractions) * (2.0 / (step + 3.0))
    return best, each


def _priced(
    nodes: Nodes, gains: Floats, costs: Floats, binding: NDArray[np.bool_], prices: Floats, *, fill: bool
) -> tuple[Floats, Floats]:
    """(prices [nodes, limits], a fractional answer [nodes, experts]) of knapsacks that gain so much; the answer only
    where `fill`."""
    free, room = nodes.free, nodes.room
    prices = np.where(binding, prices, 0.0)
    filled = free.astype(np.float64)
    rows = np.arange(len(gains))
    for limit in np.flatnonzero(binding.any(axis=0)):
        row = costs[limit]
        prices[:, limit] = 0.0
        ratio = np.where(free, (gains - prices @ costs) / np.maximum(row, _TINY), -np.inf)
        order = np.argsort(-ratio, axis=1)
        used = np.where(free, row, 0.0)[rows[:, None], order].cumsum(axis=1)
        count = (used <= room[:, limit, None]).sum(axis=1)
        tight = binding[:, limit] & (count < row.size)
        at = np.minimum(count, row.size - 1)
        edge = order[rows, at]
        prices[:, limit] = np.where(tight, np.maximum(ratio[rows, edge], 0.0), 0.0)
        if not fill:
            continue
        answer = np.zeros_like(filled)
        answer[rows[:, None], order] = np.arange(row.size) < count[:, None]
        before = np.where(at > 0, used[rows, at - 1], 0.0)
        answer[rows, edge] = (room[:, limit] - before) / np.maximum(row[edge], _TINY)
        filled = np.where(tight[:, None], answer, filled)
    return prices, filled


def coverage_children(
    nodes: Nodes, order: NDArray[np.intp], logs: Floats, costs: Floats
) -> tuple[Floats, NDArray[np.bool_]]:
    """[nodes, ranks]: what no subset exceeds that takes the expert at that place of `order` and none before it.

    order: [nodes, ranks], experts that may join come first. All at once, around the point without the expert, at the
    point's prices. Second: where there is one that may join.
    """
    rows = np.arange(len(order))[:, None]
    there = nodes.free[rows, order]
    at, mine = nodes.at[rows, order][:, None, :], logs.T[order].transpose(0, 2, 1)
    dear = costs.T[order].transpose(0, 2, 1)
    tau = (nodes.at @ logs.T)[:, :, None]
    tilted = nodes.left[:, :, None] * np.exp(-tau - mine * (1.0 - at))
    total = np.maximum(tilted.sum(axis=1), _TINY)
    tilted /= total[:, None, :]
    rest = nodes.room[:, :, None] - dear
    later = there[:, None, :] & np.triu(np.ones((order.shape[1],) * 2, np.bool_), 1)
    for limit in range(costs.shape[0]):
        later &= dear[:, limit, None, :] <= rest[:, limit, :, None]
    price = np.einsum("bl,bln->bn", nodes.prices, dear)
    reduced = np.maximum(tilted.transpose(0, 2, 1) @ mine - price[:, None, :], 0.0)
    most = np.einsum("bl,bln->bn", nodes.prices, rest) + (reduced * later).sum(axis=2)
    bounds: Floats = 1.0 - np.exp(np.log(total) + (tilted * (tau - mine * at)).sum(axis=1) - most)
    return bounds, there
