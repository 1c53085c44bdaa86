"""What a session does to the logits it is drawn from, by share: its penalties and its grammar. Only at the lead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ganglion.agent.lead.adjusting import NO_ADJUSTMENTS, Adjusting, Adjustments, VocabShare
from ganglion.agent.lead.grammar import Constraint
from ganglion.agent.lead.penalties import Penalties
from ganglion.agent.lead.sampling import Sampling


class Steering:
    """Invariant: `_held` is what every share holds of the session's adjustments, as of the last `ask`."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None) -> None:
        self._penalty = sampling.repetition_penalty
        self._penalties = Penalties(sampling, prompt) if sampling.penalized else None
        self._constraint = constraint
        self._held: dict[int, Adjustments] = {}

    def ask(self, shares: Mapping[int, VocabShare]) -> dict[int, tuple[Adjusting | None, Adjustments]]:
        """By rank, for the next draw: what the share does to its logits, and which adjustments it has to be told."""
        changed = self._penalties.take() if self._penalties is not None else NO_ADJUSTMENTS
        allowed = self._constraint.allowed if self._constraint is not None else None
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
