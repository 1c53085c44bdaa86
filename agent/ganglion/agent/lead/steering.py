"""What a session does to the logits it is drawn from, by share: its penalties and its grammar. Only at the lead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.lead.grammar import Constraint
from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjusting, Adjustments, VocabShare
from ganglion.wire.sampling.parameters import Sampling
from ganglion.wire.sampling.penalties import Penalties


class Steering:
    """Invariant: `_held` is what every share holds of the session's adjustments, as of the last `ask`."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None) -> None:
        self._penalty = sampling.repetition_penalty
        self._penalties = Penalties(sampling, prompt) if sampling.penalized else None
        self._constraint = constraint
        self._held: dict[int, Adjustments] = {}

    def cut(self, window: Sequence[int]) -> Sequence[int]:
        """The drafted tokens as far as a grammar lets them be drawn and something follow."""
        return window if self._constraint is None else window[: len(self._constraint.ahead(window))]

    def ask(
        self, shares: Mapping[int, VocabShare], window: Sequence[int] = ()
    ) -> list[dict[int, tuple[Adjusting | None, Adjustments]]]:
        """For the next draw, and for the one after each token of a window that was cut: by rank, what the share does.

        That is what it does to its logits, and which adjustments it has to be told.
        """
        if self._constraint is None:
            masks: Sequence[NDArray[np.bool_] | None] = [None] * (len(window) + 1)
        else:
            masks = [self._constraint.allowed, *self._constraint.ahead(window)]
        asked = [self._ask(shares, masks[0])]
        for token, mask in zip(window, masks[1:], strict=True):
            if self._penalties is not None:
                self._penalties.drawn(token)
            asked.append(self._ask(shares, mask))
        if self._penalties is not None:
            for token in reversed(window):
                self._penalties.undo(token)
        return asked

    def _ask(
        self, shares: Mapping[int, VocabShare], allowed: NDArray[np.bool_] | None
    ) -> dict[int, tuple[Adjusting | None, Adjustments]]:
        changed = self._penalties.take() if self._penalties is not None else NO_ADJUSTMENTS
        asked = {}
        for rank, share in shares.items():
            newer = changed.within(share)
            held = self._held[rank] = self._held.get(rank, NO_ADJUSTMENTS).updated(newer)
            mask = None if allowed is None else allowed[share.first : share.first + share.count]
            adjusts = len(held) > 0 or mask is not None
            asked[rank] = (Adjusting(self._penalty, held, mask) if adjusts else None, newer)
        return asked

    def drawn(self, token: int) -> bool:
        """A token of the answer; True when the grammar lets nothing follow. Raises what `Constraint.take` raises."""
        if self._penalties is not None:
            self._penalties.drawn(token)
        return self._constraint is not None and self._constraint.take(token)
