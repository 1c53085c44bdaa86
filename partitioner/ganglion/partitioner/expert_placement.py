"""Which device holds which experts of a mixture: fewest devices touched by a token, load by speed. Pure.

After ExFlow (arXiv 2401.08383): experts that tokens choose together lie together, so that a token's rows travel to few
devices. Layers are barriers, so each one is balanced by itself; they share nothing but the devices' memory, which is
divided among them first, and then each layer is a programme of its own. Spare memory takes replicas of experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ganglion.partitioner.expert_placement_programme import LEAST_TIME_S, load_highs, solve
from ganglion.partitioner.expert_placement_routes import Covers, Flags, RouteSets, spread
from ganglion.partitioner.expert_placement_search import (
    Effort,
    Room,
    by_load,
    fair_limits,
    overload,
    partition,
    replicate,
)
from ganglion.wire.errors import DoesNotFit, InvalidRequest

SLACK: Final = 0.25  # of a device's fair part of the rows, that it may have more
KICKS: Final = 24  # descents of a layer beyond the first two
SPARE: Final = 0.25  # replicas of a layer at most, as a part of its experts
EFFORT: Final = 60_000  # of the descent in all layers: a few seconds
PASSES: Final = 3  # of moving replicas
PASSES_EXPERTS: Final = 32  # beyond so many experts replicas stay where they were put
SLACK_GRAIN: Final = 0.01
LEAST_OVERLOAD: Final = 1e-6  # rows of a token: what HiGHS lets pass


@dataclass(frozen=True)
class ExpertLayer:
    """Experts of one layer: bytes of each where it is held, and what tokens chose."""

    expert_bytes: int
    routes: RouteSets


@dataclass(frozen=True)
class ExpertHost:
    """A device that may hold experts: relative speed, bytes for the experts of all layers, what a touch of it costs.

    touch: 1 counts devices; 0 on the lead counts messages, since it asks itself without one.
    """

    speed: float
    memory_bytes: int
    touch: float = 1.0


@dataclass(frozen=True)
class LayerPlacement:
    """held: by device, the experts there by rising number. covers: how the tokens that it was made for are spread.

    bound: no placement within the layer's memory and `slack` costs less (0: not known). slack: that the balance was
    asked with, or, where that could not be met, the least that was found. proved: nothing costs less.
    """

    held: tuple[tuple[int, ...], ...]
    covers: Covers
    bound: float
    slack: float
    proved: bool


@dataclass(frozen=True)
class ExpertPlacement:
    """A placement of every layer; means are over layers that have experts."""

    layers: tuple[LayerPlacement, ...]
    remarks: tuple[str, ...]

    @property
    def touched(self) -> float:
        """Devices of a token, of a layer."""
        return self._mean(lambda one: one.covers.touched)

    @property
    def cost(self) -> float:
        """What a token costs by the weights of touches, of a layer."""
        return self._mean(lambda one: one.covers.cost)

    @property
    def bound(self) -> float:
        """No placement with the memory of each layer as it was divided costs less."""
        return self._mean(lambda one: one.bound)

    @property
    def gap(self) -> float:
        """How far, at most, the cost is above the optimum, as a part of the cost."""
        return max(0.0, self.cost - self.bound) / self.cost if self.cost > 0 else 0.0

    @property
    def proved(self) -> bool:
        """Whether every layer is optimal."""
        return all(one.proved for one in self.layers)

    def _mean(self, of: Callable[[LayerPlacement], float]) -> float:
        values = [of(one) for one in self.layers if any(one.held)]
        return sum(values) / len(values) if values else 0.0


def place_experts(
    layers: Sequence[ExpertLayer],
    hosts: Sequence[ExpertHost],
    *,
    slack: float = SLACK,
    time_limit_s: float = 0.0,
    spare: float = SPARE,
    kicks: int = KICKS,
    effort: float = EFFORT,
    clock: Callable[[], float] = time.monotonic,
) -> ExpertPlacement:
    """Place the experts of every layer on `hosts`; every expert lies on at least one.

    spare: replicas of a layer at most, as a part of its experts, where memory allows. effort: steps of the descent, see
    `Effort`; a layer that leaves some gives them to the next ones.
    slack: how much more than its part by speed of a layer's rows a device may get; where that cannot be met, the layer
    is placed with the least that was found, and a remark says so. time_limit_s: of the integer programmes together;
    0: the start, found by descent, is the answer. A programme that does not end in time leaves the best placement
    that it had, never a worse one than the start, with its gap; otherwise equal inputs give equal answers.

    Raises DoesNotFit where the memory is short, InvalidRequest for more devices than `DEVICES` or a speed that is
    none, Unsupported where a time limit is given and HiGHS is not installed.
    """
    if not hosts or any(not host.speed > 0 or host.memory_bytes < 0 for host in hosts):
        raise InvalidRequest("experts: they need devices with a speed above 0, and memory of at least 0 bytes")
    if time_limit_s > 0:
        load_highs()
    capacities = divide_memory(layers, [host.memory_bytes for host in hosts])
    rooms = [
        _room(layer.routes, hosts, capacity, slack, spare) for layer, capacity in zip(layers, capacities, strict=True)
    ]
    starts = []
    for number, (layer, room) in enumerate(zip(layers, rooms, strict=True)):
        share = effort / (len(layers) - number)
        own = Effort(share)
        starts.append(_start(layer.routes, room, kicks, own))
        effort -= share - own.left
    ends_s = clock() + time_limit_s
    found: list[LayerPlacement] = []
    for number, (layer, room, start) in enumerate(zip(layers, rooms, starts, strict=True)):
        left_s = max(LEAST_TIME_S, (ends_s - clock()) / (len(layers) - number)) if time_limit_s > 0 else 0.0
        found.append(_layer(layer.routes, room, slack, start, left_s))
    return ExpertPlacement(tuple(found), _remarks(found, slack))


def place_apart(layers: Sequence[ExpertLayer], hosts: Sequence[ExpertHost]) -> ExpertPlacement:
    """Place experts by load alone: a token's are spread, and devices compute them at the same time.

    What answers one token soonest where links are quick and experts slow. Raises DoesNotFit.
    """
    found = []
    for layer, capacity in zip(layers, divide_memory(layers, [host.memory_bytes for host in hosts]), strict=True):
        room = _room(layer.routes, hosts, capacity, 0.0, 0.0)
        held = np.zeros((len(hosts), layer.routes.experts), np.bool_)
        held[by_load(layer.routes, room), np.arange(layer.routes.experts)] = True
        covers = spread(layer.routes, held, room.touch, room.speeds)
        found.append(LayerPlacement(_numbers(held), covers, 0.0, 0.0, False))
    return ExpertPlacement(tuple(found), ())


def _numbers(held: Flags) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(expert) for expert in np.flatnonzero(one)) for one in held)


def evaluate(
    layers: Sequence[RouteSets], held: Sequence[Sequence[Sequence[int]]], hosts: Sequence[ExpertHost]
) -> list[Covers]:
    """How other tokens are spread over a placement: held[layer][device] are experts."""
    touch, speeds = [host.touch for host in hosts], [host.speed for host in hosts]
    return [
        spread(routes, flags_of(one, routes.experts), touch, speeds) for routes, one in zip(layers, held, strict=True)
    ]


def flags_of(held: Sequence[Sequence[int]], experts: int) -> Flags:
    """Experts by device as flags [devices, experts]."""
    flags = np.zeros((len(held), experts), np.bool_)
    for device, one in enumerate(held):
        flags[device, list(one)] = True
    return flags


def divide_memory(layers: Sequence[ExpertLayer], memory_bytes: Sequence[int]) -> list[tuple[int, ...]]:
    """Experts of each layer that each device may hold: as many of every layer, then one more where most are missing.

    Raises DoesNotFit where some expert finds no place.
    """
    whole = sum(layer.expert_bytes for layer in layers if layer.routes.experts)
    most = [layer.routes.experts for layer in layers]
    equal = [memory // whole if whole else 0 for memory in memory_bytes]
    counts = [[min(one, limit) for one in equal] for limit in most]
    left = [
        memory - sum(layer.expert_bytes * row[device] for layer, row in zip(layers, counts, strict=True))
        for device, memory in enumerate(memory_bytes)
    ]

    def lacking(number: int) -> int:
        return most[number] - sum(counts[number])

    while True:
        open_places = [
            (-lacking(number), sum(row), -left[device], number, device)
            for number, row in enumerate(counts)
            for device in range(len(left))
            if row[device] < most[number] and layers[number].expert_bytes <= left[device]
        ]
        if not open_places:
            break
        *_, number, device = min(open_places)
        counts[number][device] += 1
        left[device] -= layers[number].expert_bytes
    short = [number for number in range(len(layers)) if lacking(number) > 0]
    if short:
        missing = sum(lacking(number) * layers[number].expert_bytes for number in short)
        raise DoesNotFit(
            f"the experts of {len(layers)} layers lack {missing / 1e6:.1f} MB beyond the"
            f" {sum(memory_bytes) / 1e6:.1f} MB that the devices have for them: raise a memory budget, add a device, or"
            " use int4"
        )
    return [tuple(row) for row in counts]


def _room(
    routes: RouteSets, hosts: Sequence[ExpertHost], capacity: tuple[int, ...], slack: float, spare: float
) -> Room:
    speeds = tuple(host.speed for host in hosts)
    places = min(sum(capacity), routes.experts + int(spare * routes.experts))
    return Room(capacity, places, fair_limits(routes, speeds, slack), tuple(host.touch for host in hosts), speeds)


def _start(routes: RouteSets, room: Room, kicks: int, effort: Effort) -> Flags:
    """What descent finds, with replicas where there is room for them [devices, experts]."""
    if not routes.experts:
        return np.zeros((len(room.capacity), 0), np.bool_)
    owner = partition(routes, room, kicks, effort)
    held = np.zeros((len(room.capacity), routes.experts), np.bool_)
    held[owner, np.arange(routes.experts)] = True
    if room.places == routes.experts:
        return held
    return replicate(routes, room, held, PASSES if kicks and routes.experts <= PASSES_EXPERTS else 0, effort)


def _layer(routes: RouteSets, room: Room, slack: float, held: Flags, left_s: float) -> LayerPlacement:
    """One layer; with no time for the programme the start stands."""
    if not routes.experts:
        covers = spread(routes, held, room.touch, room.speeds)
        return LayerPlacement(((),) * len(room.capacity), covers, 0.0, slack, True)
    bound, proved = 0.0, False
    covers = spread(routes, held, room.touch, room.speeds)
    if overload(covers.rows, room) > LEAST_OVERLOAD:
        # The balance may be possible although descent did not find it.
        first = solve(routes, room, None, left_s / 2) if left_s > 0 else None
        within = _within(routes, room, first.held if first is not None else None)
        if first is not None and first.held is not None and within is not None:
            held, covers = first.held, within
        else:
            slack = _slack_of(routes, room, covers)
            room = replace(room, limits=fair_limits(routes, room.speeds, slack))
    if left_s > 0:
        solved = solve(routes, room, held, left_s)
        bound, better = solved.bound, _within(routes, room, solved.held)
        if solved.held is not None and better is not None and better.cost < covers.cost - LEAST_OVERLOAD:
            held, covers = solved.held, better
        proved = solved.proved and better is not None
    bound = max(bound, _least_cost(routes, room))
    return LayerPlacement(
        _numbers(held), covers, min(bound, covers.cost), slack, proved or covers.cost <= bound * (1 + 1e-6)
    )


def _least_cost(routes: RouteSets, room: Room) -> float:
    """What tokens cost at least, whatever lies where: so many of the cheapest devices as can hold a token's experts."""
    most, cheapest = max(room.capacity), np.concatenate([[0.0], np.cumsum(sorted(room.touch))])
    return float(sum(w * cheapest[-(-len(one) // most)] for one, w in zip(routes.sets, routes.weights, strict=True)))


def _within(routes: RouteSets, room: Room, held: Flags | None) -> Covers | None:
    """How tokens are spread over a placement; None where there is none, or rows are beyond the limits."""
    covers = spread(routes, held, room.touch, room.speeds) if held is not None else None
    return covers if covers is not None and overload(covers.rows, room) <= LEAST_OVERLOAD else None


def _slack_of(routes: RouteSets, room: Room, covers: Covers) -> float:
    """The balance that a placement has, rounded up."""
    fair = fair_limits(routes, room.speeds, 0.0)
    worst = float((covers.rows / np.maximum(fair, 1e-12)).max()) - 1
    return math.ceil(worst / SLACK_GRAIN - 1e-6) * SLACK_GRAIN


def _remarks(layers: Sequence[LayerPlacement], slack: float) -> tuple[str, ...]:
    relaxed = [one.slack for one in layers if one.slack > slack]
    if not relaxed:
        return ()
    return (
        f"in {len(relaxed)} of {len(layers)} layers no placement was found with at most {slack:.0%} more rows than a"
        f" device's part by speed: there it is up to {max(relaxed):.0%}",
    )
