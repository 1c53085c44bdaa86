"""What guesses on a drafting device: a model's engine, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.speculation.guessing import NO_GUESS, Ask, Guess

_LONGEST: Final = 3  # tokens of the suffix that is looked up
_LOOKED_AT: Final = 4096  # last tokens of the text


class Guesser(Protocol):
    """slots: token sequences that it remembers. context: it guesses from fewer tokens. ran_rows: of the last step."""

    name: str
    slots: int
    context: int
    ran_rows: int

    def step(self, asks: Sequence[Ask]) -> list[Guess]:
        """A guess for each ask; no slot twice. An empty one where it cannot tell."""
        ...

    def lead_in(self, asks: Sequence[Ask], rows: int) -> int:
        """Run at most so many of the rows that a step with `asks` lacks, but for the last ones; how many are left."""
        ...

    def held(self, slot: int, tokens: Sequence[int]) -> int:
        """How many of `tokens` a slot remembers."""
        ...

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Let `target` remember the first `tokens` tokens that `source` does."""
        ...

    def forget(self, slot: int) -> None:
        """Drop what a slot remembers."""
        ...


class Lookup:
    """Prompt lookup: what followed earlier occurrences of the text's last 3 to 1 tokens. No model, no state."""

    name = "ngram"
    slots = 64
    context = 1 << 31

    def __init__(self) -> None:
        self.ran_rows = 0

    def step(self, asks: Sequence[Ask]) -> list[Guess]:
        """Candidates by length of the suffix, then the latest first; a score is that length, its fraction the rank."""
        self.ran_rows = len(asks)
        return [_look_up(np.asarray(ask.tokens[-_LOOKED_AT:], np.int64), ask.top) for ask in asks]

    def lead_in(self, asks: Sequence[Ask], rows: int) -> int:
        """Nothing is ever missing."""
        del asks, rows
        return 0

    def held(self, slot: int, tokens: Sequence[int]) -> int:
        """All."""
        del slot
        return len(tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Nothing to do."""

    def forget(self, slot: int) -> None:
        """Nothing to do."""


def _look_up(ids: NDArray[np.int64], top: int) -> Guess:
    found: dict[int, float] = {}
    for length in range(min(_LONGEST, ids.size - 1), 0, -1):
        alike = np.ones(ids.size - length, np.bool_)
        for back in range(length):
            alike &= ids[length - 1 - back : ids.size - 1 - back] == ids[ids.size - 1 - back]
        for at in np.flatnonzero(alike)[::-1][: 4 * top]:
            found.setdefault(int(ids[at + length]), length + 0.5 / (1 + len(found)))
            if len(found) == top:
                break
        if len(found) == top:
            break
    return Guess(tuple(found), tuple(found.values())) if found else NO_GUESS
