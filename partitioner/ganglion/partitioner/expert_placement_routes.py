"""Which experts of a layer were chosen together, how often, and which devices that asks. Pure.

A token of a layer is asked of the cheapest devices that together hold its experts. Counted are the devices touched
(ExFlow, arXiv 2401.08383) and the rows that each of them gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import InvalidDocument, InvalidRequest

DEVICES: Final = 8  # 2**8 sets of them are looked at for every token
MULTIPLIED: Final = 100_000  # products of a matrix in the time that one set takes to be spread
UNIFORM_SETS: Final = 512  # that stand for all sets where nothing was counted

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class RouteSets:
    """Sets of experts of one layer, each by rising number, and the tokens that chose it.

    experts: of the layer, 0 of one without. groups: runs of as many experts each, from every one of which a token
    chooses (Pangu Pro MoE, arXiv 2505.21411); 1 where it chooses among all. others: tokens whose sets are not here.
    """

    experts: int
    sets: tuple[tuple[int, ...], ...]
    tokens: tuple[float, ...]
    groups: int = 1
    others: float = 0.0

    def __post_init__(self) -> None:
        if len(self.sets) != len(self.tokens):
            raise InvalidDocument(f"routes: {len(self.sets)} sets of experts with {len(self.tokens)} counts")
        if any(not one or one[0] < 0 or one[-1] >= self.experts for one in self.sets):
            raise InvalidDocument(f"routes: a set of experts is not among the layer's {self.experts}")

    @cached_property
    def uses(self) -> Flags:
        """Whether a set has an expert [sets, experts]."""
        found = np.zeros((len(self.sets), self.experts), np.bool_)
        for index, one in enumerate(self.sets):
            found[index, list(one)] = True
        return found

    @cached_property
    def weights(self) -> Floats:
        """Tokens of each set as a part of all that are counted [sets]."""
        counted = np.asarray(self.tokens, np.float64)
        return counted / max(1e-300, float(counted.sum()))

    @cached_property
    def rows(self) -> Floats:
        """Rows of each expert for one token [experts]; they add up to the experts of a token."""
        return np.asarray(self.weights @ self.uses, np.float64)

    @cached_property
    def entries(self) -> tuple[Integers, Integers]:
        """Every expert of every set: the set, the expert [entries]."""
        sets, experts = np.nonzero(self.uses)
        return sets, experts

    @cached_property
    def pairs(self) -> tuple[Integers, Integers]:
        """Every ordered pair of experts of one set, by their places in `entries`, those with themselves included."""
        sets, _ = self.entries
        sizes = np.bincount(sets, minlength=len(self.sets))
        first = np.repeat(np.arange(len(sets)), sizes[sets])
        begins = np.cumsum(sizes) - sizes
        within = np.arange(len(first)) - np.repeat(np.cumsum(sizes[sets]) - sizes[sets], sizes[sets])
        return first, begins[sets[first]] + within

    @cached_property
    def group_of(self) -> Integers:
        """The group of each expert [experts]."""
        return np.arange(self.experts) * self.groups // max(1, self.experts)

    @cached_property
    def group_rows(self) -> Floats:
        """Rows of each group for one token [groups]."""
        return np.asarray(np.bincount(self.group_of, self.rows, self.groups), np.float64)


@dataclass(frozen=True)
class CountedRoutes:
    """What a lead counted: `tokens`, and of every layer of the model their sets."""

    tokens: int
    layers: tuple[RouteSets, ...]


def uniform_sets(experts: int, chosen: int, groups: int = 1) -> RouteSets:
    """Sets as if every choice were as likely: all of them where they are few, else some that use all experts alike."""
    if groups == 1 and comb(experts, chosen) <= UNIFORM_SETS:
        sets = list(combinations(range(experts), chosen))
    else:
        random = np.random.default_rng(0)
        size, each = experts // groups, max(1, chosen // groups)
        sets = []
        while len(sets) < UNIFORM_SETS:
            orders = [random.permutation(size) + group * size for group in range(groups)]
            for start in range(0, size - each + 1, each):
                picked = np.concatenate([order[start : start + each] for order in orders])
                sets.append(tuple(sorted(int(one) for one in picked)))
    return RouteSets(experts, tuple(sets), (1.0,) * len(sets), groups)


def sets_of(chosen: NDArray[np.integer[Any]], experts: int, groups: int = 1) -> RouteSets:
    """The sets of one layer's choices [tokens, k], the most frequent first."""
    found, counts = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    order = np.lexsort((*found.T[::-1], -counts))
    sets = tuple(tuple(int(one) for one in found[index]) for index in order)
    return RouteSets(experts, sets, tuple(float(counts[index]) for index in order), groups)


@dataclass(frozen=True)
class Covers:
    """How a layer's tokens are spread over devices.

    cost: of what a token touches, by weight of each device. touched: devices of a token. touches: part of the tokens
    that touch each device [devices]. rows: of each group at each device, for one token [groups, devices].
    per_set: of every set, rows at each device [sets, devices].
    """

    cost: float
    touched: float
    touches: Floats
    rows: Floats
    per_set: Floats


class DeviceSets:
    """All sets of devices, the cheapest first: by the weight of a touch, then by how many they are."""

    def __init__(self, touch: Sequence[float]) -> None:
        if len(touch) > DEVICES:
            raise InvalidRequest(f"experts: {len(touch)} devices may hold them, at most {DEVICES} are planned for")
        count = len(touch)
        members = (np.arange(1, 1 << count)[:, None] >> np.arange(count)) & 1 == 1
        costs = members @ np.asarray(touch, np.float64)
        order = np.lexsort((np.arange(len(costs)), members.sum(axis=1), costs))
        self.members: Flags = members[order]  # [device sets, devices]
        self.costs: Floats = costs[order]
        self._floats = self.members.astype(np.float32)

    def steps(self, routes: RouteSets) -> float:
        """How many sets could be spread while `missing` is found once."""
        return 2 + len(routes.sets) * len(self.costs) * routes.experts / MULTIPLIED

    def missing(self, uses: Flags, held: Flags) -> NDArray[np.float32]:
        """Experts of each set that no member holds [sets, device sets]; held: [devices, experts]."""
        lacking = (self._floats @ held.astype(np.float32)) == 0
        return np.asarray(uses.astype(np.float32) @ lacking.T.astype(np.float32), np.float32)

    def cheapest(self, uses: Flags, held: Flags) -> Floats:
        """What each set costs at least [sets]; every expert must be held."""
        covers = self.missing(uses, held) == 0
        return np.asarray(self.costs[np.argmax(covers, axis=1)], np.float64)


def spread(routes: RouteSets, held: Flags, touch: Sequence[float], speeds: Sequence[float]) -> Covers:
    """Ask each set of the cheapest devices that hold it, the frequent sets first.

    Of equally good devices it is the one that has the least to do for its speed. held: [devices, experts].
    """
    device_sets = DeviceSets(touch)
    covers = device_sets.missing(routes.uses, held) == 0
    first = np.argmax(covers, axis=1)
    sizes = device_sets.members.sum(axis=1)
    grade = np.unique(np.stack([device_sets.costs, sizes]), axis=1, return_inverse=True)[1].ravel()
    alike_all = covers & (grade[None, :] == grade[first][:, None])
    choices = alike_all.sum(axis=1).tolist()
    # Plain numbers from here on: one set after the other, of few experts each.
    devices, weights, group_of = range(len(speeds)), routes.weights.tolist(), routes.group_of.tolist()
    members_of = [np.flatnonzero(one).tolist() for one in device_sets.members]
    holders = [set(np.flatnonzero(one).tolist()) for one in held.T]
    rows = np.zeros((routes.groups, len(speeds)))
    load = [0.0] * len(speeds)
    touches = [0.0] * len(speeds)
    per_set = np.zeros((len(routes.sets), len(speeds)))
    for index in np.argsort(-routes.weights, kind="stable").tolist():
        weight, best = weights[index], int(first[index])
        if choices[index] > 1:
            alike = np.flatnonzero(alike_all[index]).tolist()
            best = min(alike, key=lambda one: max(load[d] / speeds[d] for d in members_of[one]))
        mine = [0] * len(speeds)
        able = [(expert, [d for d in members_of[best] if d in holders[expert]]) for expert in routes.sets[index]]
        able.sort(key=lambda one: len(one[1]))
        for expert, there in able:
            device = there[0]
            if len(there) > 1:
                device = min(there, key=lambda d: ((load[d] + weight * (1 + mine[d])) / speeds[d], d))
            mine[device] += 1
            load[device] += weight
            rows[group_of[expert], device] += weight
        for device in devices:
            if mine[device]:
                per_set[index, device] = mine[device]
                touches[device] += weight
    return _covers(rows, per_set, np.asarray(touches), np.asarray(touch, np.float64))


def _covers(rows: Floats, per_set: Floats, touches: Floats, touch: Floats) -> Covers:
    return Covers(
        cost=float(touches @ touch),
        touched=float(touches.sum()),
        touches=touches,
        rows=rows,
        per_set=per_set,
    )
