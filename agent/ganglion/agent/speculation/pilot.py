"""How to draft: the modes, what each is predicted to take for a token, and the choice. A pure core.

    plain   the verifier runs token by token             t_v(1)
    own     its own drafter fills the windows            (t_v + w·t_s) / E(a_s)
    sync    a chain after each outcome                   (r + w·t_a + t_v) / E
    ahead   the chain goes on during the flight          (p·max(t_v, (w+1)·t_a) + (1-p)·(r + w·t_a + t_v)) / E
    edge    branches during the flight, kept here        (r + (1-h)·w·t_a + t_v) / E
    branch  branches during the flight, queued there     (t_v + (1-h)·w·t_s) / (h·E + (1-h)·E(a_s))

r: round trip; t_v: a pass of the target, of w+1 rows; t_a, t_s: a token of the device's and of the verifier's
drafter; w: window; E = (1 - a^(w+1)) / (1 - a): tokens of a pass at acceptance a; p, h: how often the next window is at
hand. Without a drafter at the verifier a miss of `branch` is a pass of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ganglion.agent.speculation.corrections import Corrections
from ganglion.agent.speculation.knowledge import Hidden, Knowledge, Mode

MODES: Final[tuple[Mode, ...]] = ("plain", "own", "sync", "ahead", "edge", "branch")
WAITING: Final[frozenset[Mode]] = frozenset(
    {"sync", "ahead", "edge"}
)  # modes in which the verifier waits for the device
WINDOW_TOKENS: Final = 16  # drafted for a pass at most, whatever the verifier allows

_SWITCH: Final = 0.9  # another mode must be predicted at most this much of the present one's time
_SETTLE_PASSES: Final = 3  # after a switch: they still show the mode before
_TRIED_PASSES: Final = 8  # counted before the mode that runs is judged
_MEASURED_KEPT: Final = 0.9
_BIAS_FADES: Final = 0.99  # with a pass, of what was found of modes that do not run, so that they are tried again
_BIAS_MOST: Final = 4.0


def tokens_of_pass(accept: float, window: int) -> float:
    """Expected tokens of a pass with `window` drafted ones, each accepted at `accept` where those before it were."""
    return sum(accept**drafted for drafted in range(window + 1))


def coverage(ranks: Sequence[float], window: int, nodes: float) -> float:
    """How much of a next window is at hand when `nodes` tokens were drafted, for the likeliest outcomes first.

    ranks: probabilities of the drafter's first, second, … candidate.
    """
    accept = ranks[0]
    outcomes = [accept**taken * other for taken in range(window + 1) for other in ranks[1:]] + [accept ** (window + 1)]
    found, left = 0.0, nodes / max(1, window)
    for outcome in sorted(outcomes, reverse=True):
        found += outcome * min(1.0, left)
        left -= 1.0
        if left <= 0.0:
            break
    return min(1.0, found)


class Pilot:
    """Of one session: which mode, and how long a window. `forced`: None chooses.

    drafts: whether the device drafts at all. own: whether the verifier has a drafter. window_tokens: of its Terms.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        corrections: Corrections,
        *,
        forced: Mode | None = None,
        drafts: bool = True,
        own: bool = False,
        window_tokens: int = WINDOW_TOKENS,
    ) -> None:
        self.knowledge = knowledge
        self._corrections = corrections
        self.forced = forced
        self._own = own
        self._most = min(window_tokens, WINDOW_TOKENS)
        self._predicted: dict[Mode, tuple[float, int]] = {}
        self._modes: list[Mode] = [
            mode for mode in MODES if mode == "plain" or (own if mode == "own" else drafts and self._most > 0)
        ]
        self.mode: Mode = forced if forced is not None else min(self._modes, key=self.expected_s)
        self._since: float | None = None  # the outcome before
        self._passes = 0  # since the switch
        self._spent_s = 0.0
        self._tokens = 0.0

    # Predicted.

    def predict(self, mode: Mode) -> tuple[float, int]:
        """(seconds a token, the window that gives it) by the figures known at the last outcome; by the formulas."""
        if mode not in self._predicted:
            windows = range(1, max(1, self._most) + 1)
            if mode == "plain":
                self._predicted[mode] = self.knowledge.passes.seconds(1), 0
            else:
                self._predicted[mode] = min((self._predict(mode, window), window) for window in windows)
        return self._predicted[mode]

    def _predict(self, mode: Mode, window: int) -> float:
        known, accept = self.knowledge, self._corrections.accept
        pass_s, draft_s, round_s = known.passes.seconds(window + 1), known.drafts.seconds(1), known.round_trip_s
        gives = tokens_of_pass(accept, window)
        if mode == "own":
            return (pass_s + window * known.own_token_s) / tokens_of_pass(known.own_accept, window)
        if mode == "sync":
            return (round_s + window * draft_s + pass_s) / gives
        if mode == "ahead":
            hits = known.hit_rate("ahead", accept ** (window + 1))
            missed_s = round_s + window * draft_s + pass_s
            return (hits * max(pass_s, (window + 1) * draft_s) + (1.0 - hits) * missed_s) / gives
        if mode == "edge":
            nodes = (round_s + pass_s) * known.tokens_per_s
            hits = known.hit_rate("edge", coverage(self._corrections.ranks, window, nodes))
            return (round_s + (1.0 - hits) * window * draft_s + pass_s) / gives
        found = coverage(self._corrections.ranks, window, pass_s * known.tokens_per_s)
        hits = known.hit_rate("branch", found**known.depth)
        if self._own:
            missed_s, missed = pass_s + window * known.own_token_s, tokens_of_pass(known.own_accept, window)
        else:
            missed_s, missed = known.passes.seconds(1), 1.0
        return (hits * pass_s + (1.0 - hits) * missed_s) / (hits * gives + (1.0 - hits) * missed)

    def expected_s(self, mode: Mode) -> float:
        """Seconds a token, as predicted and corrected by what the mode was measured to take."""
        return self.predict(mode)[0] * self.knowledge.bias.get(mode, 1.0)

    @property
    def window(self) -> int:
        """Drafted tokens to send for a pass."""
        return max(1, self.predict(self.mode)[1])

    def enough(self, tokens: int, path: float) -> bool:
        """Whether a chain of `tokens`, with an end of probability `path`, is to be sent rather than drafted on.

        Another token has to give more than its time does otherwise.
        """
        if tokens == 0:
            return False
        gives = path * self._corrections.accept / self.knowledge.drafts.seconds(1)
        seconds, window = self.predict(self.mode)
        return tokens >= max(1, window) or gives * seconds < 1.0

    # Measured.

    def passed(self, tokens: int, now: float) -> None:
        """An outcome with `tokens` came at `now` (seconds); may change `mode`."""
        self._predicted.clear()
        before, self._since = self._since, now
        if before is None or tokens < 1:
            return
        self._passes += 1
        if self._passes <= _SETTLE_PASSES:
            return
        self._spent_s = self._spent_s * _MEASURED_KEPT + now - before
        self._tokens = self._tokens * _MEASURED_KEPT + tokens
        self._learn()
        if self.forced is None:
            self._choose()

    @property
    def measured_s(self) -> float | None:
        """Seconds a token in the present mode; None while too few passes were seen."""
        if self._passes < _SETTLE_PASSES + _TRIED_PASSES or not self._tokens:
            return None
        return self._spent_s / self._tokens

    def _learn(self) -> None:
        bias = self.knowledge.bias
        for mode in bias:
            if mode != self.mode:
                bias[mode] **= _BIAS_FADES
        if (measured := self.measured_s) is not None:
            predicted = self.predict(self.mode)[0]
            bias[self.mode] = min(_BIAS_MOST, max(1.0 / _BIAS_MOST, measured / predicted))

    def _choose(self) -> None:
        if self.measured_s is None:
            return
        best = min(self._modes, key=self.expected_s)
        if best != self.mode and self.expected_s(best) < _SWITCH * self.expected_s(self.mode):
            self.mode = best
            self._passes, self._spent_s, self._tokens = 0, 0.0, 0.0


def hidden(mode: Mode) -> Hidden | None:
    """The mode, where it is one that has hits."""
    return mode if mode == "ahead" or mode == "edge" or mode == "branch" else None  # noqa: PLR1714 - types follow this
