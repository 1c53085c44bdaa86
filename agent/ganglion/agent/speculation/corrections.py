"""What follows a guess: how often the target drew the drafter's first, second, … candidate, learned online."""

from __future__ import annotations

import bisect
from typing import Final

from ganglion.agent.speculation.guessing import Guess

RANKS: Final = 4  # candidates of a guess that are told apart; what is none of them is a miss
_MARGINS: Final = (0.25, 0.5, 1.0, 2.0, 4.0)  # between the best two scores: the wider, the surer is the first
_PRIOR: Final = (0.7, 0.12, 0.05, 0.03, 0.1)  # by rank, the last one none of them
_PRIOR_WEIGHT: Final = 8.0  # observations that the prior counts as, and all margins together for one of them
_KEPT: Final = 0.998  # of what was seen, with every new observation


class Corrections:
    """Probabilities by rank of a guess's candidates, by the margin between its best two scores.

    With keyed noise a correction is mostly among the drafter's best perturbed candidates (shared noise), so the ranks
    say which continuations are worth drafting.
    """

    def __init__(self) -> None:
        self._seen = [[0.0] * (RANKS + 1) for _ in range(len(_MARGINS) + 1)]
        self._all = [0.0] * (RANKS + 1)

    @property
    def accept(self) -> float:
        """How likely the drafter's draw is the target's, whatever the margin."""
        return self._overall()[0]

    @property
    def ranks(self) -> tuple[float, ...]:
        """How likely the target draws the first, second, … candidate, whatever the margin."""
        return tuple(self._overall()[:RANKS])

    def likely(self, guess: Guess) -> tuple[float, ...]:
        """The probability of each candidate to be what the target draws there; their sum is at most 1."""
        overall, seen = self._overall(), self._seen[_bucket(guess)]
        total = sum(seen) + _PRIOR_WEIGHT
        ranks = min(len(guess.tokens), RANKS)
        return tuple((seen[rank] + _PRIOR_WEIGHT * overall[rank]) / total for rank in range(ranks))

    def saw(self, guess: Guess, token: int) -> None:
        """The target drew `token` where the drafter had guessed."""
        rank = guess.tokens[:RANKS].index(token) if token in guess.tokens[:RANKS] else RANKS
        for seen in (self._all, self._seen[_bucket(guess)]):
            seen[:] = [count * _KEPT for count in seen]
            seen[rank] += 1.0

    def _overall(self) -> list[float]:
        total = sum(self._all) + _PRIOR_WEIGHT
        return [(count + _PRIOR_WEIGHT * prior) / total for count, prior in zip(self._all, _PRIOR, strict=True)]


def _bucket(guess: Guess) -> int:
    if len(guess.scores) < 2:
        return len(_MARGINS)
    return bisect.bisect_left(_MARGINS, guess.scores[0] - guess.scores[1])
