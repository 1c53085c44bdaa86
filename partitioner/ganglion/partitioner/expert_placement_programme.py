"""Where experts lie, as an integer programme solved by HiGHS (ExFlow, arXiv 2401.08383).

Two formulations. Without replicas what a device costs depends on its own experts only: with few experts every set of
them that a device may hold is a column, and the columns of alike devices are one, so that no symmetry is left and the
relaxation is tight. Otherwise x[expert, device] says what lies where and y[set, device] what a set of experts touches;
with replicas z[set, expert, device] says who is asked. HiGHS is loaded when it is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import combinations, pairwise
from math import comb
from typing import Any, Final

import numpy as np

from ganglion.partitioner.expert_placement_routes import Flags, Floats, Integers, RouteSets, spread
from ganglion.partitioner.expert_placement_search import Room
from ganglion.wire.errors import Unsupported

COLUMNS: Final = 70_000  # sets of experts that are listed at most
VARIABLES: Final = 40_000  # of the formulation by single experts; beyond it only its bound would be wrong for long
LEAST_TIME_S: Final = 0.05


@dataclass(frozen=True)
class Solved:
    """What HiGHS found of one layer. held: [devices, experts], None where it found nothing.

    bound: no placement costs less. infeasible: there is none within the limits, proved. proved: `held` is optimal.
    """

    held: Flags | None
    bound: float
    infeasible: bool = False
    proved: bool = False


def load_highs() -> Any:
    """The module highspy; raises Unsupported naming the extra that brings it."""
    try:
        return import_module("highspy")
    except ImportError:
        raise Unsupported(
            "placing experts by an integer programme needs HiGHS, which is not installed here: pip install"
            " 'ganglion-ai[partitioner]'"
        ) from None


def _silent(highs: Any) -> Any:
    """A solver that prints nothing, not even its name, which it does when its callbacks are set up."""

    class Silent(highs.Highs):  # type: ignore[misc]  # loaded when it is used
        def enableCallbacks(self) -> None:  # noqa: N802 - highspy's name
            self.silent()
            super().enableCallbacks()

    return Silent()


def solve(routes: RouteSets, room: Room, start: Flags | None, time_limit_s: float) -> Solved:
    """The fewest touches within `room`, from `start` (within the limits) on; raises Unsupported without HiGHS."""
    highs = load_highs()
    replicas = room.places > routes.experts
    if not replicas and _subsets(routes.experts, room) <= COLUMNS:
        return _by_columns(highs, routes, room, start, time_limit_s)
    if replicas and _pairs_suffice(routes, room):
        return _by_pairs(highs, routes, room, start, time_limit_s)
    return _by_experts(highs, routes, room, start, time_limit_s, replicas=replicas)


def _pairs_suffice(routes: RouteSets, room: Room) -> bool:
    """Whether every token has at most two experts, every touch costs as much, and the columns can be listed."""
    small = max(map(len, routes.sets)) <= 2 and len(set(room.touch)) == 1
    return small and _subsets(routes.experts, room) <= COLUMNS


def _subsets(experts: int, room: Room) -> int:
    return sum(comb(experts, size) for size in range(1, min(max(room.capacity), experts) + 1))


@dataclass
class _Model:
    """Columns with cost and bounds, rows with bounds and entries; minimized."""

    costs: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    index: list[int] = field(default_factory=list)
    value: list[float] = field(default_factory=list)

    def columns(self, count: int, cost: Sequence[float] | Floats, upper: float = 1.0, *, whole: bool) -> int:
        """Add columns from 0 to `upper`; returns the first one's number."""
        first = len(self.costs)
        self.costs.extend(float(one) for one in cost)
        self.lower.extend([0.0] * count)
        self.upper.extend([upper] * count)
        self.whole.extend([whole] * count)
        return first

    def row(self, index: Sequence[int], value: Sequence[float], lower: float, upper: float) -> None:
        """Add a row."""
        self.index.extend(index)
        self.value.extend(value)
        self.starts.append(len(self.index))
        self.row_lower.append(lower)
        self.row_upper.append(upper)

    def run(self, highs: Any, start: Floats | None, time_limit_s: float) -> tuple[Floats | None, float, bool, bool]:
        """Values or None, the bound, whether it is infeasible, whether the values are optimal."""
        solver = _silent(highs)
        for name, wanted in {
            "threads": 1,
            "random_seed": 0,
            "mip_rel_gap": 1e-6,
            "time_limit": max(LEAST_TIME_S, time_limit_s),
        }.items():
            solver.setOptionValue(name, wanted)
        problem = highs.HighsLp()
        problem.num_col_, problem.num_row_ = len(self.costs), len(self.row_lower)
        problem.col_cost_ = np.asarray(self.costs)
        problem.col_lower_, problem.col_upper_ = np.asarray(self.lower), np.asarray(self.upper)
        problem.row_lower_, problem.row_upper_ = np.asarray(self.row_lower), np.asarray(self.row_upper)
        problem.a_matrix_.format_ = highs.MatrixFormat.kRowwise
        problem.a_matrix_.start_ = np.asarray(self.starts, np.int32)
        problem.a_matrix_.index_ = np.asarray(self.index, np.int32)
        problem.a_matrix_.value_ = np.asarray(self.value)
        kinds = highs.HighsVarType
        problem.integrality_ = [kinds.kInteger if one else kinds.kContinuous for one in self.whole]
        solver.passModel(problem)
        if start is not None:
            known = highs.HighsSolution()
            known.col_value = start.tolist()
            solver.setSolution(known)
        solver.run()
        status, info = solver.getModelStatus(), solver.getInfo()
        statuses = highs.HighsModelStatus
        if status == statuses.kInfeasible:
            return None, float("inf"), True, False
        found = info.primal_solution_status == 2 and np.isfinite(info.objective_function_value)  # 2: feasible
        values = np.asarray(solver.getSolution().col_value) if found else None
        bound = (
            float(info.mip_dual_bound) if np.isfinite(info.mip_dual_bound) else sum(min(0.0, one) for one in self.costs)
        )
        return values, bound, False, status == statuses.kOptimal


def _alike(room: Room) -> list[list[int]]:
    """Devices that may change places."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for device, capacity in enumerate(room.capacity):
        key = (capacity, room.touch[device], tuple(np.round(room.limits[:, device], 9)))
        kinds.setdefault(key, []).append(device)
    return list(kinds.values())


def _by_columns(highs: Any, routes: RouteSets, room: Room, start: Flags | None, time_limit_s: float) -> Solved:
    """Each expert lies in exactly one of the chosen columns; of a kind of devices at most as many as there are."""
    model, classes = _Model(), _alike(room)
    masks, sizes, touches, rows = _listed(routes, min(max(room.capacity), routes.experts))
    parts: list[Integers] = []
    for devices in classes:
        fits = (rows <= room.limits[:, devices[0]]).all(axis=1) & (sizes <= room.capacity[devices[0]])
        parts.append(np.flatnonzero(fits))
        model.columns(len(parts[-1]), room.touch[devices[0]] * touches[fits], whole=True)
    kinds = np.repeat(np.arange(len(classes)), [len(part) for part in parts])
    columns = masks[np.concatenate(parts)]
    for expert in range(routes.experts):
        held = np.flatnonzero(columns >> expert & 1)
        if not len(held):
            return Solved(None, float("inf"), infeasible=True)
        model.row(held.tolist(), [1.0] * len(held), 1.0, 1.0)
    for kind, devices in enumerate(classes):
        held = np.flatnonzero(kinds == kind)
        model.row(held.tolist(), [1.0] * len(held), 0.0, float(len(devices)))
    known = None
    if start is not None:
        known = np.zeros(len(columns))
        weights = np.int64(1) << np.arange(routes.experts)
        for kind, devices in enumerate(classes):
            for device in devices:
                known[(kinds == kind) & (columns == start[device] @ weights)] += 1.0
    values, bound, infeasible, proved = model.run(highs, known, time_limit_s)
    if values is None:
        return Solved(None, max(0.0, bound), infeasible=infeasible)
    held_by = np.zeros((len(room.capacity), routes.experts), np.bool_)
    free = [list(devices) for devices in classes]
    for number in np.flatnonzero(values > 0.5):
        held_by[free[kinds[number]].pop(0)] = columns[number] >> np.arange(routes.experts) & 1 == 1
    return Solved(held_by, bound, proved=proved)


def _listed(routes: RouteSets, most: int) -> tuple[Integers, Integers, Floats, Floats]:
    """Every set of at most `most` experts: its mask, its size, the part of the tokens that touch it, rows by group."""
    bits = np.int64(1) << np.arange(routes.experts)
    by_size = [
        bits[np.asarray(list(combinations(range(routes.experts), size)))].sum(axis=1) for size in range(1, most + 1)
    ]
    masks = np.concatenate(by_size)
    sizes = np.repeat(np.arange(1, most + 1), [len(one) for one in by_size])
    touches = np.zeros(len(masks))
    for experts, weight in zip(routes.sets, routes.weights, strict=True):
        touches += weight * (masks & _mask(experts) != 0)
    rows = np.zeros((len(masks), routes.groups))
    for expert in range(routes.experts):
        rows[:, routes.group_of[expert]] += routes.rows[expert] * (masks >> expert & 1)
    return masks, sizes, touches, rows


def _mask(experts: Iterable[int]) -> int:
    return sum(1 << int(one) for one in experts)


def _by_pairs(highs: Any, routes: RouteSets, room: Room, start: Flags | None, time_limit_s: float) -> Solved:
    """Columns with replicas, where tokens have two experts: a token touches one device less if a column has both.

    Which replica is asked does not show in columns, so the limits on rows are left out: its bound holds with them, its
    placement is for the caller to weigh. An expert more never costs more, so only the largest columns are needed.
    """
    model, classes = _Model(), _alike(room)
    masks, sizes, _, _ = _listed(routes, min(max(room.capacity), routes.experts))
    full = sum(min(one, routes.experts) for one in room.capacity) <= room.places
    parts: list[Integers] = []
    for devices in classes:
        capacity = min(room.capacity[devices[0]], routes.experts)
        parts.append(np.flatnonzero(sizes == capacity if full else sizes <= capacity))
    kinds = np.repeat(np.arange(len(classes)), [len(part) for part in parts])
    columns, held_sizes = masks[np.concatenate(parts)], sizes[np.concatenate(parts)]
    counts = np.asarray([len(devices) for devices in classes])
    model.columns(len(columns), np.zeros(len(columns)), upper=float(counts.max()), whole=True)
    pairs = [number for number, one in enumerate(routes.sets) if len(one) == 2]
    first = model.columns(len(pairs), -routes.weights[pairs], whole=False)
    for expert in range(routes.experts):
        held = np.flatnonzero(columns >> expert & 1)
        model.row(held.tolist(), [1.0] * len(held), 1.0, np.inf)
    for kind, count in enumerate(counts):
        held = np.flatnonzero(kinds == kind)
        model.row(held.tolist(), [1.0] * len(held), 0.0, float(count))
    if not full:
        model.row(range(len(columns)), held_sizes.tolist(), 0.0, float(room.places))
    for place, number in enumerate(pairs):
        mask = _mask(routes.sets[number])
        held = np.flatnonzero(columns & mask == mask)
        model.row([first + place, *held.tolist()], [-1.0] + [1.0] * len(held), 0.0, np.inf)
    known = None
    if start is not None:
        known = np.zeros(len(model.costs))
        known[first:] = [any(one[list(routes.sets[number])].all() for one in start) for number in pairs]
        for kind, devices in enumerate(classes):
            for device in devices:
                mask = _mask(np.flatnonzero(start[device]))
                known[: len(columns)][(kinds == kind) & (columns == mask)] += 1.0
    values, bound, infeasible, proved = model.run(highs, known, time_limit_s)
    cost = room.touch[0]
    spared = float(routes.weights[pairs].sum())
    lowest = cost * (1.0 + spared + bound)
    if values is None:
        return Solved(None, max(0.0, lowest), infeasible=infeasible)
    held_by = np.zeros((len(room.capacity), routes.experts), np.bool_)
    free = [list(devices) for devices in classes]
    for column in np.flatnonzero(values[: len(columns)] > 0.5):
        for _ in range(round(values[column])):
            held_by[free[kinds[column]].pop(0)] = columns[column] >> np.arange(routes.experts) & 1 == 1
    return Solved(held_by, max(0.0, lowest), proved=proved)


def _by_experts(  # noqa: PLR0912 - one row of the model after another
    highs: Any, routes: RouteSets, room: Room, start: Flags | None, time_limit_s: float, *, replicas: bool
) -> Solved:
    """x[expert, device], y[set, device] and with replicas z[set, expert, device]."""
    experts, sets, devices = routes.experts, len(routes.sets), len(room.capacity)
    members = [(index, expert) for index, one in enumerate(routes.sets) for expert in one]
    count = (experts + sets + (len(members) if replicas else 0)) * devices
    if count > VARIABLES:
        return Solved(None, 0.0)
    model = _Model()
    touch = np.asarray(room.touch, np.float64)
    x = model.columns(experts * devices, np.zeros(experts * devices), whole=True)
    y = model.columns(sets * devices, (routes.weights[:, None] * touch).ravel(), whole=replicas)
    z = model.columns(len(members) * devices, np.zeros(len(members) * devices), whole=False) if replicas else 0
    for expert in range(experts):
        held = [x + expert * devices + device for device in range(devices)]
        model.row(held, [1.0] * devices, 1.0, float(devices) if replicas else 1.0)
    for device, capacity in enumerate(room.capacity):
        held = [x + expert * devices + device for expert in range(experts)]
        model.row(held, [1.0] * experts, 0.0, float(capacity))
    if replicas:
        model.row(range(x, x + experts * devices), [1.0] * (experts * devices), 0.0, float(room.places))
    for number, (index, expert) in enumerate(members):
        for device in range(devices):
            at, touched = x + expert * devices + device, y + index * devices + device
            if replicas:
                asked = z + number * devices + device
                model.row([at, asked], [1.0, -1.0], 0.0, np.inf)
                model.row([touched, asked], [1.0, -1.0], 0.0, np.inf)
            else:
                model.row([touched, at], [1.0, -1.0], 0.0, np.inf)
        if replicas:
            model.row([z + number * devices + device for device in range(devices)], [1.0] * devices, 1.0, 1.0)
    for index in range(sets):
        model.row([y + index * devices + device for device in range(devices)], [1.0] * devices, 1.0, np.inf)
    _limit(routes, room, model, members, x, z, replicas=replicas)
    for alike in _alike(room):
        _order(model, alike, x, devices, experts, replicas=replicas)
    known = None
    if start is not None:
        known = _known(routes, room, start, len(model.costs), replicas=replicas)
    values, bound, infeasible, proved = model.run(highs, known, time_limit_s)
    if values is None:
        return Solved(None, bound, infeasible=infeasible)
    held_by = values[x : x + experts * devices].reshape(experts, devices).T > 0.5
    return Solved(held_by, bound, proved=proved)


def _limit(  # noqa: PLR0917 - the parts of one model
    routes: RouteSets, room: Room, model: _Model, members: list[tuple[int, int]], x: int, z: int, *, replicas: bool
) -> None:
    """Rows of each group at each device."""
    devices = len(room.capacity)
    for device in range(devices):
        for group in range(routes.groups):
            if replicas:
                of_group = [n for n, (_, expert) in enumerate(members) if routes.group_of[expert] == group]
                index = [z + number * devices + device for number in of_group]
                value = [float(routes.weights[members[number][0]]) for number in of_group]
            else:
                mine = np.flatnonzero(routes.group_of == group)
                index = [int(x + expert * devices + device) for expert in mine]
                value = [float(one) for one in routes.rows[mine]]
            model.row(index, value, 0.0, float(room.limits[group, device]))


def _order(model: _Model, alike: list[int], x: int, devices: int, experts: int, *, replicas: bool) -> None:
    """Of devices that may change places only one order is left."""
    if replicas:
        for one, other in pairwise(alike):
            model.row([x + one, x + other], [1.0, -1.0], 0.0, 1.0)  # expert 0
        return
    for rank, device in enumerate(alike):
        for expert in range(min(rank, experts)):  # the smallest experts of alike devices rise
            model.upper[x + expert * devices + device] = 0.0


def _known(routes: RouteSets, room: Room, start: Flags, count: int, *, replicas: bool) -> Floats:
    """The start as values, alike devices in the order that the rows ask for; with replicas HiGHS finds z itself."""
    held = start.copy()
    for alike in _alike(room):
        ranked = sorted(alike, key=lambda d: not start[d, 0] if replicas else _smallest(start[d]))
        held[alike] = start[ranked]
    touched = (routes.uses.astype(np.float64) @ held.T) > 0
    if replicas:
        touched = spread(routes, held, room.touch, room.speeds).per_set > 0
    values = np.zeros(count)
    values[: held.size] = held.T.ravel()
    values[held.size : held.size + touched.size] = touched.ravel()
    return values


def _smallest(held: Flags) -> int:
    """The smallest expert of a device; beyond all of them where it has none."""
    return int(np.argmax(held)) if held.any() else len(held)
