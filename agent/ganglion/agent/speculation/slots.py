"""Which slot of the drafter holds what of one answer: a pure table beside the engine's own.

A step's asks lie on several paths below the tip, each in a slot of its own. A path goes to the slot that holds most of
it; where that slot holds another path that is still in the tree, the common beginning is copied to the slot that was
used longest ago.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Placed:
    """A path goes to `slot`, after the first `tokens` tokens of slot `source` were copied there, where it has one."""

    slot: int
    source: int | None = None
    tokens: int = 0


@dataclass(slots=True)
class _Held:
    """A slot holds `settled` committed tokens, and `tail` after them where those are all that are committed."""

    slot: int
    settled: int = 0
    tail: tuple[int, ...] = ()
    used: int = 0


class SlotTable:
    """Slots of one answer. `committed`: tokens that are committed."""

    def __init__(self, slots: Sequence[int], committed: int) -> None:
        """At least one slot, holding nothing."""
        self._held = [_Held(slot) for slot in slots]
        self._committed = committed
        self._clock = 0

    @property
    def slots(self) -> tuple[int, ...]:
        """All of them: a step takes at most as many paths."""
        return tuple(one.slot for one in self._held)

    def add(self, slot: int) -> None:
        """One more slot, holding nothing."""
        self._held.append(_Held(slot))

    def give_up(self) -> int | None:
        """A slot less, the one used longest ago; None where there is only one."""
        if len(self._held) < 2:
            return None
        last = min(self._held, key=lambda one: one.used)
        self._held.remove(last)
        return last.slot

    def committed(self, tokens: Sequence[int]) -> None:
        """The tip has moved along `tokens`."""
        for one in self._held:
            if one.settled == self._committed:
                same = _common(one.tail, tokens)
                one.settled += same
                one.tail = one.tail[same:] if same == len(tokens) else ()
        self._committed += len(tokens)

    def place(self, paths: Sequence[tuple[int, ...]]) -> list[Placed]:
        """A slot for each path below the tip, in the order in which copies are to be made; at most one path a slot."""
        self._clock += 1
        found = []
        for path in paths:
            source = max(self._held, key=lambda one: (self._alike(one, path), one.used == self._clock))
            alike = self._alike(source, path)
            free = [one for one in self._held if one.used != self._clock]
            beyond = source.settled + len(source.tail) - alike  # what it would lose
            if source in free and (not beyond or len(free) == 1):
                chosen, placed = source, Placed(source.slot)
            else:
                others = [one for one in free if one is not source] or free
                chosen = min(others, key=lambda one: one.used)
                worth = alike > self._alike(chosen, path)
                placed = Placed(chosen.slot, source.slot, alike) if worth else Placed(chosen.slot)
            chosen.settled, chosen.tail, chosen.used = self._committed, path, self._clock
            found.append(placed)
        return found

    def _alike(self, one: _Held, path: tuple[int, ...]) -> int:
        """How many tokens of prompt, answer and path a slot holds."""
        return one.settled + (_common(one.tail, path) if one.settled == self._committed else 0)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count
