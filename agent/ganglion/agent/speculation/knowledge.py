"""What a drafting device has learned of a verifier and of its own drafter, over all answers. Pure."""

from __future__ import annotations

import math
from typing import Final, Literal

from ganglion.agent.speculation.corrections import Corrections
from ganglion.agent.speculation.window import PassCost

Mode = Literal["plain", "own", "sync", "ahead", "edge", "branch"]
Hidden = Literal["ahead", "edge", "branch"]  # modes that hide a part of the round trip where they hit

_WIDTHS: Final = (1, 2, 3, 4, 6, 8)
_OWN_PRIOR: Final = (0.6, 4.0)  # acceptance of the verifier's own drafter, and how many tokens that counts as
_HIT_WEIGHT: Final = 12.0  # passes that a predicted hit rate counts as
_KEPT: Final = 0.98
_ROUND_TRIP_KEPT: Final = 0.8


class _Share:
    """A share of what was seen, the older the less."""

    def __init__(self) -> None:
        self.part, self.seen = 0.0, 0.0

    def saw(self, part: float, of: float = 1.0) -> None:
        self.part, self.seen = self.part * _KEPT + part, self.seen * _KEPT + of

    def given(self, prior: float, weight: float) -> float:
        return (self.part + prior * weight) / (self.seen + weight)


class Knowledge:
    """Of one verifier. passes, drafts: seconds of a pass of the target, of a step of the drafter, by their rows."""

    def __init__(self, *, pass_s: float = 0.05, draft_s: float = 0.01) -> None:
        """What is assumed of a pass of one row and of one guess until they are measured, in seconds."""
        self.passes = PassCost(pass_s, 0.02 * pass_s)
        self.drafts = PassCost(draft_s, 0.1 * draft_s)
        self.greedy, self.sampled = Corrections(), Corrections()
        self.bias: dict[Mode, float] = {}  # measured over predicted seconds a token
        self._round_trip_s: float | None = None
        self._opened_s: float | None = None
        self._own = _Share()
        self._own_s = _Share()
        self._hits: dict[tuple[Hidden, int], _Share] = {}

    # Told.

    def opened(self, took_s: float) -> None:
        """Opening a session took so long: at least two round trips."""
        self._opened_s = took_s if self._opened_s is None else min(took_s, self._opened_s)

    def went_round(self, took_s: float) -> None:
        """A window came back as an outcome; its pass is not counted."""
        took_s = max(0.0, took_s)
        before = self._round_trip_s
        kept = _ROUND_TRIP_KEPT if before is not None else 0.0
        self._round_trip_s = kept * (before or 0.0) + (1.0 - kept) * took_s

    def drafted_own(self, tokens: int, accepted: int, took_s: float | None) -> None:
        """The verifier drafted so many tokens of a window itself; took_s: where it is known what that took."""
        self._own.saw(accepted, min(tokens, accepted + 1))
        if took_s is not None:
            self._own_s.saw(took_s, tokens)

    def hit(self, mode: Hidden, part: float) -> None:
        """Of a next window this part was at hand when an outcome came, 0 to 1."""
        self._hits.setdefault((mode, self.depth), _Share()).saw(part)

    # Asked.

    @property
    def round_trip_s(self) -> float:
        """Between device and verifier; until it was measured, what opening a session lets think."""
        if self._round_trip_s is not None:
            return self._round_trip_s
        return (self._opened_s or 0.0) / 2

    @property
    def depth(self) -> int:
        """Passes that end at the verifier before the outcome of one is known here and answered."""
        return max(1, math.ceil(self.round_trip_s / self.passes.seconds(4)))

    @property
    def own_accept(self) -> float:
        """How likely a token of the verifier's own drafter is accepted."""
        return self._own.given(*_OWN_PRIOR)

    @property
    def own_token_s(self) -> float:
        """What the verifier's own drafter takes for a token."""
        return self._own_s.given(0.12 * self.passes.seconds(1), 4.0)

    @property
    def tokens_per_s(self) -> float:
        """Guesses of the drafter a second, in steps of the best width."""
        return max(width / self.drafts.seconds(width) for width in _WIDTHS)

    @property
    def hit_rates(self) -> dict[tuple[Hidden, int], float]:
        """By mode and lookahead depth: how much of the next windows was at hand, of late."""
        return {key: found.given(0.0, 0.0) for key, found in self._hits.items() if found.seen}

    def hit_rate(self, mode: Hidden, predicted: float) -> float:
        """At the present lookahead depth, beginning with what is predicted."""
        found = self._hits.get((mode, self.depth))
        return predicted if found is None else found.given(predicted, _HIT_WEIGHT)
