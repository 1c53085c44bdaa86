"""Where experts lie, found by descent: the start of the integer programme, and its answer when time is short. Pure.

Without replicas what a device is touched by depends on its own experts only, so that all swaps of two experts are
weighed at once. Replicas are then put where they spare most touches, hot experts where none does.
A search ends when its effort is spent, which is counted in steps and not in seconds: equal inputs give equal answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.partitioner.expert_placement_routes import DeviceSets, Flags, Floats, RouteSets, spread

OVERLOAD: Final = 1e3  # what a row beyond a device's limit costs, in touches
LEAST_GAIN: Final = 1e-9
TRIED: Final = 8  # places of a replica, of each kind, before it is given up
WEIGHED_EXPERTS: Final = 64  # beyond so many the balance is not weighed for every replica
TOGETHER: Final = 8  # changes at once
KICKED: Final = 3  # swaps between two descents
KICKED_EXPERTS: Final = 32  # up to so many as many descents as were asked for
WEIGHED: Final = 400  # entries that are weighed in the time that one token's set takes to be spread
FIXED: Final = 20  # sets that could be spread while arrays of whatever size are set up

Owners = NDArray[np.int64]


@dataclass(frozen=True)
class Room:
    """What a layer's devices take: experts at most, rows of a token of each group at most [groups, devices].

    places: experts and their replicas on all devices at most.
    """

    capacity: tuple[int, ...]
    places: int
    limits: Floats
    touch: tuple[float, ...]
    speeds: tuple[float, ...]


@dataclass
class Effort:
    """What a search may still do: sets of experts spread over devices, or work that takes about as long."""

    left: float

    def spend(self, sets: float) -> bool:
        """Take so much; False when nothing is left afterwards."""
        self.left -= sets
        return self.left > 0


def fair_limits(routes: RouteSets, speeds: tuple[float, ...], slack: float) -> Floats:
    """Rows of each group at each device at most: its part by speed, and `slack` of that more [groups, devices]."""
    speed = np.asarray(speeds, np.float64)
    return np.asarray((1 + slack) * np.outer(routes.group_rows, speed / speed.sum()) + 1e-12, np.float64)


def overload(rows: Floats, room: Room) -> float:
    """Rows beyond the limits."""
    return float(np.maximum(0.0, rows - room.limits).sum())


def partition(routes: RouteSets, room: Room, kicks: int, effort: Effort) -> Owners:
    """One device for each expert [experts]: the best of descents from a clustering, and with `kicks` from others."""
    starts = [_clustered(routes, room), round_robin(routes.experts, room)] if kicks else [_clustered(routes, room)]
    descents = [_descend(routes, room, start, effort) for start in starts]
    best, best_cost = min(descents, key=lambda one: one[1])
    random = np.random.default_rng(0)
    few = min(kicks, kicks * KICKED_EXPERTS**2 // routes.experts**2)  # of many experts a descent takes long
    for _ in range(few if len(room.capacity) > 1 else 0):
        if effort.left <= 0:
            break
        kicked = best.copy()
        for _ in range(KICKED):
            one, other = random.integers(0, routes.experts, 2)
            kicked[one], kicked[other] = kicked[other], kicked[one]
        found, cost = _descend(routes, room, kicked, effort)
        if cost < best_cost - LEAST_GAIN:
            best, best_cost = found, cost
    return best


def round_robin(experts: int, room: Room) -> Owners:
    """Expert after expert to the next device that has room."""
    owner, left, device = np.zeros(experts, np.int64), list(room.capacity), 0
    for expert in range(experts):
        while not left[device % len(left)]:
            device += 1
        owner[expert] = device % len(left)
        left[device % len(left)] -= 1
        device += 1
    return owner


def by_load(routes: RouteSets, room: Room) -> Owners:
    """The busiest expert first, each to the device that has the least to do for its speed."""
    owner, left = np.zeros(routes.experts, np.int64), list(room.capacity)
    load = np.zeros(len(left))
    for expert in np.argsort(-routes.rows, kind="stable"):
        able = [device for device, free in enumerate(left) if free]
        device = min(able, key=lambda d: ((load[d] + routes.rows[expert]) / room.speeds[d], d))
        owner[expert] = device
        load[device] += routes.rows[expert]
        left[device] -= 1
    return owner


def _clustered(routes: RouteSets, room: Room) -> Owners:
    """The busiest expert first, each where it adds the least cost."""
    owner, left = np.zeros(routes.experts, np.int64), list(room.capacity)
    touched = np.zeros((len(left), len(routes.sets)), np.bool_)
    rows = np.zeros_like(room.limits)
    for expert in np.argsort(-routes.rows, kind="stable"):
        group = routes.group_of[expert]
        fresh = ~touched @ (routes.weights * routes.uses[:, expert])
        costs = room.touch * fresh + OVERLOAD * _beyond(rows[group] + routes.rows[expert], room.limits[group])
        loads = rows.sum(axis=0) / room.speeds
        device = min((one for one, free in enumerate(left) if free), key=lambda d: (costs[d], loads[d], d))
        owner[expert] = device
        touched[device] |= routes.uses[:, expert]
        rows[group, device] += routes.rows[expert]
        left[device] -= 1
    return owner


def _descend(routes: RouteSets, room: Room, start: Owners, effort: Effort) -> tuple[Owners, float]:
    """The best moves and swaps after each other while the cost falls; returns the owners and their cost."""
    owner = start.copy()
    cost, changes = _weigh(routes, room, owner)
    step = FIXED + (len(routes.pairs[0]) + routes.experts**2) / WEIGHED
    while changes and effort.spend(step):
        for together in dict.fromkeys((len(changes), 1)):  # several at once, unless they get in each other's way
            trial = owner.copy()
            for gain, one, other in changes[:together]:
                del gain
                if other < 0:
                    trial[one] = -1 - other
                else:
                    trial[one], trial[other] = owner[other], owner[one]
            trial_cost, trial_changes = _weigh(routes, room, trial)
            if trial_cost < cost - LEAST_GAIN:
                break
        else:
            break
        owner, cost, changes = trial, trial_cost, trial_changes
    return owner, cost


def _weigh(routes: RouteSets, room: Room, owner: Owners) -> tuple[float, list[tuple[float, int, int]]]:
    """The cost, and the changes that lower it, the best first, no expert or device of a move in two of them.

    A change: by how much it lowers the cost if it is the only one, an expert, and the expert that it changes places
    with, or -1 - device where it moves.
    """
    touch, count, experts = np.asarray(room.touch, np.float64), len(room.capacity), routes.experts
    everyone = np.arange(experts)
    sets, mine = routes.entries
    there = np.bincount(sets * count + owner[mine], minlength=len(routes.sets) * count).reshape(-1, count)
    weights = routes.weights[sets]
    alone = weights * (there[sets, owner[mine]] == 1)
    leaves = touch[owner] * np.bincount(mine, alone, experts)
    fresh = np.stack(
        [np.bincount(mine, weights * (there[sets, device] == 0), experts) for device in range(count)], axis=1
    )
    joins = touch * fresh
    first, other = routes.pairs  # entries of one set: neither leaves a device that it was alone at
    both = np.bincount(mine[first] * experts + mine[other], alone[first], experts**2).reshape(experts, experts)
    pairs = touch[owner][:, None] * both
    rows = np.zeros_like(room.limits)
    np.add.at(rows, (routes.group_of, owner), routes.rows)
    shift = _shifts(routes, room, rows, owner)
    moves = joins - leaves[:, None] + OVERLOAD * shift
    moves[everyone, owner] = np.inf
    moves[:, np.bincount(owner, minlength=count) >= np.asarray(room.capacity)] = np.inf
    one_way = joins[:, owner] - leaves[:, None]
    swaps = one_way + one_way.T + pairs + pairs.T + OVERLOAD * _swap_shifts(routes, room, rows, owner, shift)
    swaps[owner[:, None] == owner[None, :]] = np.inf
    cost = float(routes.weights @ ((there > 0) @ touch)) + OVERLOAD * overload(rows, room)
    best = moves.argmin(axis=1), swaps.argmin(axis=1)
    found = [(float(moves[one, to]), one, -1 - int(to)) for one, to in enumerate(best[0])]
    found += [(float(swaps[one, other]), one, int(other)) for one, other in enumerate(best[1])]
    changes: list[tuple[float, int, int]] = []
    busy: set[int] = set()
    for change in sorted(one for one in found if one[0] < -LEAST_GAIN):
        parts = {change[1], change[2]}
        if not parts & busy:
            busy |= parts
            changes.append(change)
    return cost, changes[:TOGETHER]


def _beyond(rows: Floats, limits: Floats) -> Floats:
    return np.maximum(0.0, rows - limits)


def _shifts(routes: RouteSets, room: Room, rows: Floats, owner: Owners) -> Floats:
    """Change of the overload when an expert moves [experts, devices]."""
    group, mine = routes.group_of, routes.rows
    now = _beyond(rows, room.limits)
    left = _beyond(rows[group, owner] - mine, room.limits[group, owner]) - now[group, owner]
    came = _beyond(rows[group] + mine[:, None], room.limits[group]) - now[group]
    return left[:, None] + came


def _swap_shifts(routes: RouteSets, room: Room, rows: Floats, owner: Owners, shift: Floats) -> Floats:
    """Change of the overload when two experts change places [experts, experts]."""
    group, mine = routes.group_of, routes.rows
    apart = shift[:, owner]
    apart = apart + apart.T
    now = _beyond(rows, room.limits)[group, owner]
    more = mine[None, :] - mine[:, None]
    after = _beyond((rows[group, owner])[:, None] + more, room.limits[group, owner][:, None]) - now[:, None]
    return np.where(group[:, None] == group[None, :], after + after.T, apart)


def replicate(routes: RouteSets, room: Room, held: Flags, passes: int, effort: Effort) -> Flags:
    """Fill what room is left with replicas, then move them `passes` times while that spares touches.

    held: [devices, experts], not changed.
    """
    held = held.copy()
    device_sets = DeviceSets(room.touch)
    while effort.left > 0 and _add_best(routes, room, device_sets, held, effort):
        pass
    for _ in range(passes):
        before = float(routes.weights @ device_sets.cheapest(routes.uses, held))
        for device, expert in np.argwhere(held):
            if held[:, expert].sum() > 1 and effort.spend(2 * len(routes.sets)):
                trial = held.copy()
                trial[device, expert] = False
                _add_best(routes, room, device_sets, trial, effort, only=int(device))
                if _cost(routes, room, device_sets, trial) < _cost(routes, room, device_sets, held) - LEAST_GAIN:
                    held = trial
        held = _exchange(routes, room, device_sets, held, effort)
        if before - float(routes.weights @ device_sets.cheapest(routes.uses, held)) < LEAST_GAIN:
            break
    return held


def _exchange(routes: RouteSets, room: Room, device_sets: DeviceSets, held: Flags, effort: Effort) -> Flags:
    """Let two devices exchange an expert each wherever that spares touches and keeps the balance."""
    best = _cost(routes, room, device_sets, held)
    step = device_sets.steps(routes)
    for one, other in combinations(range(held.shape[0]), 2):
        for mine, theirs in np.argwhere(np.outer(held[one] & ~held[other], held[other] & ~held[one])):
            trial = held.copy()
            trial[[one, other], mine] = trial[[other, one], mine]
            trial[[one, other], theirs] = trial[[other, one], theirs]
            if not (trial[one, theirs] and trial[other, mine]) or trial[one, mine] or trial[other, theirs]:
                continue
            if not effort.spend(step):
                return held
            # Touches first: they are quickly counted, and most exchanges spare none.
            if float(routes.weights @ device_sets.cheapest(routes.uses, trial)) >= best - LEAST_GAIN:
                continue
            effort.spend(len(routes.sets))
            cost = _cost(routes, room, device_sets, trial)
            if cost < best - LEAST_GAIN:
                held, best = trial, cost
    return held


def _cost(routes: RouteSets, room: Room, device_sets: DeviceSets, held: Flags) -> float:
    touches = float(routes.weights @ device_sets.cheapest(routes.uses, held))
    return touches + OVERLOAD * overload(spread(routes, held, room.touch, room.speeds).rows, room)


def _add_best(  # noqa: PLR0917 - one search
    routes: RouteSets, room: Room, device_sets: DeviceSets, held: Flags, effort: Effort, only: int | None = None
) -> bool:
    """Put the replica that spares most touches, or the busiest expert where none does; whether one was put."""
    free = np.asarray(room.capacity) - held.sum(axis=1)
    if held.sum() >= room.places:
        return False
    able = (free > 0) & (np.arange(len(free)) == only if only is not None else True)
    open_places = able[:, None] & ~held
    if not open_places.any():
        return False
    effort.spend(len(routes.sets) + 8 * device_sets.steps(routes))
    spared = np.where(open_places, _gains(routes, device_sets, held), -1.0)
    rows = spread(routes, held, room.touch, room.speeds).rows
    idle = 1e-6 * rows.sum(axis=0) / np.asarray(room.speeds)
    hot = np.where(open_places, routes.rows / held.sum(axis=0) - idle[:, None], -np.inf)
    tried = [one for one in np.argsort(-spared, axis=None, kind="stable")[:TRIED] if spared.flat[one] > LEAST_GAIN]
    tried += [one for one in np.argsort(-hot, axis=None, kind="stable")[:TRIED] if np.isfinite(hot.flat[one])]
    before = overload(rows, room)
    for one in tried:
        device, expert = np.unravel_index(one, held.shape)
        held[device, expert] = True
        # A replica draws rows to where a token's other experts are: not beyond what the device should get.
        if routes.experts > WEIGHED_EXPERTS:
            return True
        effort.spend(len(routes.sets))
        if overload(spread(routes, held, room.touch, room.speeds).rows, room) <= before + LEAST_GAIN:
            return True
        held[device, expert] = False
    return False


def _gains(routes: RouteSets, device_sets: DeviceSets, held: Flags) -> Floats:
    """Touches spared by one more replica [devices, experts]."""
    missing = device_sets.missing(routes.uses, held)
    now = device_sets.costs[np.argmax(missing == 0, axis=1)]
    found = np.zeros_like(held, dtype=np.float64)
    lacking = ~held
    saved = np.zeros((held.shape[0], len(routes.sets), held.shape[1]))
    for index, members in enumerate(device_sets.members):
        chosen = np.flatnonzero((missing[:, index] == 1) & (now > device_sets.costs[index]))
        if not len(chosen):
            continue
        lost = routes.uses[chosen] & lacking[members].all(axis=0)
        expert = np.argmax(lost, axis=1)
        spared = now[chosen] - device_sets.costs[index]
        for device in np.flatnonzero(members):
            np.maximum.at(saved[device], (chosen, expert), spared)
    np.einsum("dse,s->de", saved, routes.weights, out=found)
    return found
