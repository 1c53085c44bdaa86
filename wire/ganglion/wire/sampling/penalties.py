"""A session's bias and penalties at the lead: what every id's adjustment is, and which have changed. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from ganglion.wire.sampling.adjusting import Adjustments
from ganglion.wire.sampling.parameters import Sampling


class Penalties:
    """Repetition counts prompt and answer (as in transformers), presence and frequency the answer alone (OpenAI)."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._bias = dict(sampling.logit_bias)
        self._repeats = sampling.repetition_penalty != 1.0
        self._repeated = Counter(prompt) if self._repeats else Counter[int]()
        self._counts: dict[int, int] = {}
        self._changed = set(self._bias) | set(self._repeated)

    def drawn(self, token: int) -> None:
        """A token of the answer."""
        if self._presence or self._frequency:
            self._counts[token] = self._counts.get(token, 0) + 1
            self._changed.add(token)
        if self._repeats:
            self._repeated[token] += 1
            if self._repeated[token] == 1:
                self._changed.add(token)

    def undo(self, token: int) -> None:
        """A token was not drawn after all."""
        if self._presence or self._frequency:
            self._counts[token] -= 1
            self._changed.add(token)
        if self._repeats:
            self._repeated[token] -= 1
            if not self._repeated[token]:
                self._changed.add(token)

    def take(self) -> Adjustments:
        """The adjustments that are new or another since the last call."""
        changed, self._changed = self._changed, set()
        return Adjustments.of([self._adjustment(token) for token in changed])

    def _adjustment(self, token: int) -> tuple[int, float, bool, float]:
        count = self._counts.get(token, 0)
        subtract = self._presence + self._frequency * count if count else 0.0
        return token, self._bias.get(token, 0.0), self._repeated[token] > 0, subtract
