"""The cache of experts: which lie in memory, which is read next and whose place it takes. No clock, no disk.

One cache over all layers. What is kept is what is expected back soonest: `Forecast.expected` counts the layers until an
expert's next use from frequency, recency, what predictors say of the next layer, and its distance from where the
computation is. A read ahead begins only where the expert it brings is expected before the one that it pushes out.

    cache.arrive(layer, experts)          # the computation needs them, hottest first: pinned until they ran
    while read := cache.next_read(): ...  # what to read now; `finished` or `failed` tells how it ended
    cache.ready() -> experts that can run;  cache.ran(experts)

Invariants: an expert that runs is never pushed out; a slot holds or receives one expert; what is awaited is read before
what is foretold; nothing that is awaited waits for a slot while an expert that is not pinned holds one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import Internal, InvalidRequest

Key = tuple[int, int]
"""(layer with experts, counted from 0; expert)."""
NOWHERE, ABSENT, READING, RESIDENT = -1, 0, 1, 2
MARGIN: Final = 1.25  # so much later must what is pushed out be expected than what is read ahead


@dataclass(frozen=True, slots=True)
class Read:
    """Bring `key` into `slot`; `evicted`: whose pages are in it now. awaited: the computation waits for it."""

    key: Key
    slot: int
    evicted: Key | None
    awaited: bool


class ExpertCache:
    """Experts of `layers` layers, `experts` each, in `slots` slots; raises InvalidRequest without a slot."""

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        if slots < 1:
            raise InvalidRequest("experts: the cache holds none; raise --expert-memory", param="expert_memory")
        self.state = np.zeros((layers, experts), np.int8)
        self._slot = np.full((layers, experts), -1, np.int64)
        self._pinned = np.zeros((layers, experts), bool)
        self._expected = np.full((layers, experts), np.inf, np.float32)
        self._free = list(range(slots - 1, -1, -1))
        self._layer = 0
        self._needed: list[int] = []  # of the present layer, not run yet, hottest first

    def limit(self, layer: int, experts: int) -> None:
        """A layer has only so many experts."""
        self.state[layer, experts:] = NOWHERE

    @property
    def resident(self) -> int:
        """Experts in memory."""
        return int((self.state == RESIDENT).sum())

    def slot_of(self, key: Key) -> int:
        """Where an expert lies or is read to; -1 where it does neither."""
        return int(self._slot[key])

    def expect(self, expected: NDArray[np.float32]) -> None:
        """Layers until each expert's next use [layers, experts], kept; what is not known is infinite."""
        self._expected = expected

    def arrive(self, layer: int, experts: Sequence[int]) -> None:
        """The computation is at `layer` and needs these of its experts, hottest first; raises Internal too early."""
        if self._needed:
            raise Internal(f"experts {self._needed} of layer {self._layer} have not run")
        self._layer, self._needed = layer, list(experts)
        self._expected[layer] += len(self.state)  # what is not needed now comes one round later
        self._pinned[layer, self._needed] = True

    def ready(self) -> list[int]:
        """Experts of the present layer that are needed and in memory."""
        state = self.state[self._layer]
        return [expert for expert in self._needed if state[expert] == RESIDENT]

    def awaited(self) -> list[int]:
        """Experts of the present layer that are needed and not in memory, hottest first."""
        state = self.state[self._layer]
        return [expert for expert in self._needed if state[expert] != RESIDENT]

    def ran(self, experts: Iterable[int]) -> None:
        """These ran: they may be pushed out."""
        for expert in experts:
            self._needed.remove(expert)
            self._pinned[self._layer, expert] = False

    def leave(self) -> None:
        """Nothing of the present layer is needed any more: a step was given up."""
        self.ran(list(self._needed))

    def next_read(self, *, ahead: bool = True) -> Read | None:
        """What to read next, from now on READING; None if nothing is, or no slot can be had. ahead: guesses too."""
        for expert in self._needed:
            key = (self._layer, expert)
            if self.state[key] == ABSENT:
                return self._begin(key, awaited=True)
        if not ahead:
            return None
        expected = np.where(self.state == ABSENT, self._expected, np.inf)
        place = int(expected.argmin())
        key = divmod(place, self.state.shape[1])
        if not np.isfinite(expected[key]):
            return None
        if not self._free:
            victim = self._victim()
            if victim is None or self._expected[victim] <= MARGIN * expected[key]:
                return None
        return self._begin(key, awaited=False)

    def is_awaited(self, key: Key) -> bool:
        """Whether the computation waits for it."""
        return bool(self._pinned[key])

    def finished(self, key: Key) -> None:
        """Its bytes are in its slot."""
        self.state[key] = RESIDENT

    def failed(self, key: Key) -> None:
        """It could not be read: its slot is free."""
        self.state[key] = ABSENT
        self._free.append(int(self._slot[key]))
        self._slot[key] = -1

    def _begin(self, key: Key, *, awaited: bool) -> Read | None:
        victim = None
        if self._free:
            slot = self._free.pop()
        else:
            victim = self._victim()
            if victim is None:
                return None
            slot = int(self._slot[victim])
            self.state[victim], self._slot[victim] = ABSENT, -1
        self.state[key], self._slot[key] = READING, slot
        return Read(key, slot, victim, awaited)

    def _victim(self) -> Key | None:
        """Of the experts in memory that are not pinned, the one expected last."""
        waits = np.where((self.state == RESIDENT) & ~self._pinned, self._expected, -1.0)
        place = int(waits.argmax())
        key = divmod(place, self.state.shape[1])
        return key if waits[key] >= 0 else None
