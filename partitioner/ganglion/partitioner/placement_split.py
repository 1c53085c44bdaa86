"""Dividing groups and layers among devices: the slowest as fast as can be, within each one's memory. Pure.

Splitting is a bottleneck problem: each axis costs the time of its slowest share, and the axes add up. Without memory
limits, giving each next group to the device that would finish it first is optimal for each axis. Memory couples the
axes; there the same rule is followed among the devices with room, and moves and swaps of single groups improve it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AxisLoad:
    """One axis of a split: `groups` to give out; seconds by device, and bytes, of a group and of any share."""

    groups: int
    each_s: tuple[float, ...]
    fixed_s: tuple[float, ...]
    each_bytes: int
    fixed_bytes: int
    least: int  # groups that every device must get

    def seconds(self, device: int, count: int) -> float:
        """Time of `count` groups on `device`."""
        return self.fixed_s[device] + count * self.each_s[device] if count else 0.0

    def bytes(self, count: int) -> int:
        """Memory of `count` groups."""
        return self.fixed_bytes + count * self.each_bytes if count else 0


Counts = list[list[int]]
"""Groups by axis and device."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """No division fits: bytes missing on the device that lacks most, by index."""

    device: int
    missing_bytes: int


def largest_remainder(total: int, weights: Sequence[float], least: int) -> list[int]:
    """Divide `total` in proportion to `weights`, at least `least` each where total allows; ties to the lower index."""
    count = len(weights)
    least = least if total >= least * count else 0
    whole = sum(weights)
    ideal = [total * weight / whole for weight in weights]
    counts = [max(least, int(value)) for value in ideal]
    while sum(counts) > total:
        index = max((i for i in range(count) if counts[i] > least), key=lambda i: (counts[i] - ideal[i], -i))
        counts[index] -= 1
    while sum(counts) < total:
        index = max(range(count), key=lambda i: (ideal[i] - counts[i], -i))
        counts[index] += 1
    return counts


def objective_s(axes: Sequence[AxisLoad], counts: Counts) -> float:
    """Sum over the axes of the slowest share's time."""
    return sum(
        max(axis.seconds(device, count) for device, count in enumerate(row))
        for axis, row in zip(axes, counts, strict=True)
    )


def shortage(axes: Sequence[AxisLoad], counts: Counts, room: Sequence[int]) -> Shortage | None:
    """The device over its `room` (bytes) by most, or None when all fit."""
    worst: Shortage | None = None
    for device, available in enumerate(room):
        used = sum(axis.bytes(row[device]) for axis, row in zip(axes, counts, strict=True))
        if used > available and (worst is None or used - available > worst.missing_bytes):
            worst = Shortage(device, used - available)
    return worst


def divide(axes: Sequence[AxisLoad], room: Sequence[int]) -> Counts | Shortage:
    """Give out every axis within `room` (bytes per device), the slowest share as fast as this rule finds.

    Axes with the heaviest groups are given out first, so that what is left over is filled by light ones.
    """
    devices = range(len(room))
    counts: Counts = [[axis.least] * len(room) for axis in axes]
    short = shortage(axes, counts, room)
    if short is not None:
        return short
    left = [room[d] - sum(axis.bytes(row[d]) for axis, row in zip(axes, counts, strict=True)) for d in devices]
    for index in sorted(range(len(axes)), key=lambda a: (-axes[a].each_bytes, a)):
        axis, row = axes[index], counts[index]
        for given in range(sum(row), axis.groups):
            fits = [d for d in devices if axis.bytes(row[d] + 1) - axis.bytes(row[d]) <= left[d]]
            if not fits:
                roomy = max(devices, key=lambda d: (left[d], -d))
                rest = (axis.groups - given) * axis.each_bytes
                return Shortage(roomy, max(1, rest - left[roomy]))
            best = min(fits, key=lambda d: (axis.seconds(d, row[d] + 1), d))
            left[best] -= axis.bytes(row[best] + 1) - axis.bytes(row[best])
            row[best] += 1
    return counts


def improve(axes: Sequence[AxisLoad], counts: Counts, room: Sequence[int]) -> Counts:
    """Move single groups, or swap groups of two axes, while that shortens the time and every device still fits."""
    best, best_s = counts, objective_s(axes, counts)
    while True:
        found: Counts | None = None
        found_s = best_s * (1 - 1e-9)
        for trial in _neighbours(axes, best):
            if shortage(axes, trial, room) is None and (trial_s := objective_s(axes, trial)) < found_s:
                found, found_s = trial, trial_s
        if found is None:
            return best
        best, best_s = found, found_s


def _neighbours(axes: Sequence[AxisLoad], counts: Counts) -> list[Counts]:
    moves: list[tuple[int, int, int]] = []
    for index, (axis, row) in enumerate(zip(axes, counts, strict=True)):
        for source, held in enumerate(row):
            if held > axis.least:
                moves.extend((index, source, target) for target in range(len(row)) if target != source)
    found = [_moved(counts, (move,)) for move in moves]
    for move in moves:  # one group one way, groups of another axis the other way: what memory forces apart
        index, source, target = move
        for other, axis in enumerate(axes):
            held = counts[other][target] - axis.least
            if other == index or held <= 0:
                continue
            even = max(1, round(axes[index].each_bytes / max(1, axis.each_bytes)))
            found.extend(_moved(counts, (move, *((other, target, source),) * n)) for n in {1, even} if n <= held)
    return found


def _moved(counts: Counts, moves: Sequence[tuple[int, int, int]]) -> Counts:
    copy = [list(row) for row in counts]
    for axis, source, target in moves:
        copy[axis][source] -= 1
        copy[axis][target] += 1
    return copy


def fill_layers(layers: int, order: Sequence[int], capacity: Sequence[int]) -> list[int] | None:
    """Give each device one layer, then fill them in `order` up to `capacity` layers; None when not all layers fit."""
    counts = [1] * len(capacity)
    if layers < len(capacity) or any(limit < 1 for limit in capacity):
        return None
    left = layers - len(capacity)
    for device in order:
        more = min(left, capacity[device] - 1)
        counts[device] += more
        left -= more
    return None if left else counts


def proportional_layers(layers: int, speeds: Sequence[float], capacity: Sequence[int]) -> list[int] | None:
    """Layers in proportion to `speeds`, the excess over `capacity` going to the others; None when not all fit."""
    if layers < len(capacity) or any(limit < 1 for limit in capacity) or sum(capacity) < layers:
        return None
    counts = largest_remainder(layers, speeds, 1)
    while True:
        over = [d for d, count in enumerate(counts) if count > capacity[d]]
        if not over:
            return counts
        counts[over[0]] -= 1
        free = [d for d, count in enumerate(counts) if count < capacity[d]]
        target = min(free, key=lambda d: ((counts[d] + 1) / speeds[d], d))
        counts[target] += 1
