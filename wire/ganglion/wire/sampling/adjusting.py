"""What is done to a share's logits before a draw: bias, penalties, and the tokens that may be drawn at all.

Order: bias, repetition penalty, presence and frequency penalties, then the mask; all in float32, as transformers'
processors (SequenceBias, RepetitionPenalty) do it over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class VocabShare:
    """A share's token ids first..first+count-1, in groups of `group_rows` (the last one may be shorter)."""

    first: int
    count: int
    group_rows: int

    @property
    def groups(self) -> int:
        """Vocabulary groups of the share."""
        return -(-self.count // self.group_rows)


@dataclass(frozen=True, slots=True, eq=False)
class Adjustments:
    """By rising id: ids [n] uint32; bias, subtract [n] float32; repeated [n] bool."""

    ids: NDArray[np.uint32]
    bias: NDArray[np.float32]
    repeated: NDArray[np.bool_]
    subtract: NDArray[np.float32]

    @staticmethod
    def of(rows: Sequence[tuple[int, float, bool, float]]) -> Adjustments:
        """From rows (id, bias, repeated, subtract) in any order, each id once."""
        ids, bias, repeated, subtract = zip(*sorted(rows), strict=True) if rows else ((), (), (), ())
        return Adjustments(
            np.array(ids, np.uint32),
            np.array(bias, np.float32),
            np.array(repeated, np.bool_),
            np.array(subtract, np.float32),
        )

    def __len__(self) -> int:
        return self.ids.size

    def within(self, share: VocabShare) -> Adjustments:
        """Those of a share's ids."""
        start, stop = np.searchsorted(self.ids, (share.first, share.first + share.count))
        return self.chosen(slice(int(start), int(stop)))

    def chosen(self, part: slice | NDArray[np.bool_]) -> Adjustments:
        """Some of them."""
        return Adjustments(self.ids[part], self.bias[part], self.repeated[part], self.subtract[part])

    def applied(self, logits: Floats, repetition_penalty: float) -> Floats:
        """The logits [n] of `ids`, adjusted in their precision. A higher one never gives less; overflow: infinite."""
        penalty = np.float32(repetition_penalty)
        with np.errstate(over="ignore"):
            values = logits + self.bias
            penalized = np.where(values < 0, values * penalty, values / penalty)
            return np.where(self.repeated, penalized, values) - self.subtract

    def updated(self, newer: Adjustments) -> Adjustments:
        """These with `newer` ones in place of older ones of the same id, and among them."""
        if not len(newer):
            return self
        stays = ~np.isin(self.ids, newer.ids, assume_unique=True)
        ids = np.concatenate((self.ids[stays], newer.ids))
        order = np.argsort(ids, kind="stable")
        return Adjustments(
            ids[order],
            np.concatenate((self.bias[stays], newer.bias))[order],
            np.concatenate((self.repeated[stays], newer.repeated))[order],
            np.concatenate((self.subtract[stays], newer.subtract))[order],
        )


NO_ADJUSTMENTS = Adjustments.of(())


@dataclass(frozen=True, slots=True, eq=False)
class Adjusting:
    """All that a share does to its logits: `adjustments` of its ids, `allowed` [share.count] bool (None: every token).

    A repetition penalty of 1 is off.
    """

    repetition_penalty: float
    adjustments: Adjustments
    allowed: NDArray[np.bool_] | None

    def available(self, share: VocabShare) -> int:
        """How many of the share's tokens may be drawn."""
        return share.count if self.allowed is None else int(np.count_nonzero(self.allowed))

    def apply(self, logits: NDArray[np.float32], share: VocabShare) -> NDArray[np.float32]:
        """A new row [share.count] float32: adjusted, -inf where a token is not allowed. Overflows become infinite."""
        adjusted, these = logits.copy(), self.adjustments
        if len(these):
            where = these.ids - np.uint32(share.first)
            adjusted[where] = these.applied(adjusted[where], self.repetition_penalty)
        if self.allowed is not None:
            adjusted[~self.allowed] = -np.inf
        return adjusted
