"""How many tokens to draft before a pass of the target: what passes cost, what is accepted, and what pays. Pure.

With the chance a(i) that the i-th drafted token is accepted when all before it were, a window of w tokens gives
E(w) = 1 + a(1) + a(1) a(2) + ... tokens a pass (arXiv 2211.17192), and is worth what E(w) over the seconds of a round
is. All three figures are learned, as a pass of more rows is not free on a processor.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Final

_KNOTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
_OCTAVES: Final = 0.35  # how far, in powers of two of the rows, a measurement speaks
_HERE_KEPT: Final = 0.9  # of what was known of these rows, when a measurement of them comes in
_ALL_KEPT: Final = 0.999  # and of what was known of all others
_PRIOR_PASSES: Final = 0.5  # how many measurements the prior is worth
_STEADY_PASSES: Final = 3.0  # from here on a measurement counts as at most _SURPRISE times what was known
_SURPRISE: Final = 2.0


class PassCost:
    """Seconds of a pass by its rows: the prior, times what measurements near these rows make of it.

    Never falling with more rows, and continuous. A single slow pass moves it little, a lasting change fully.
    """

    def __init__(self, first_s: float, row_s: float) -> None:
        """The prior: `first_s` for one row, and `row_s` for each further one."""
        self._first_s, self._row_s = first_s, row_s
        self._weights = [0.0] * len(_KNOTS)
        self._ratios = [0.0] * len(_KNOTS)  # logarithms of measured over prior, each times its weight
        self._curve: list[float] | None = None

    def measured(self, rows: int, took_s: float) -> None:
        """A pass of `rows` rows took `took_s` seconds; times that are not positive say nothing."""
        if rows < 1 or not 0.0 < took_s < math.inf:
            return
        ratio = math.log(took_s / self._prior(rows))
        for knot, at in enumerate(_KNOTS):
            near = math.exp(-0.5 * (math.log2(rows / at) / _OCTAVES) ** 2)
            counted, known = ratio, self._weights[knot]
            if known > _STEADY_PASSES:
                mean, most = self._ratios[knot] / known, math.log(_SURPRISE)
                counted = min(max(ratio, mean - most), mean + most)
            kept = _ALL_KEPT * (1.0 - (1.0 - _HERE_KEPT) * near)
            self._weights[knot] = known * kept + near
            self._ratios[knot] = self._ratios[knot] * kept + near * counted
        self._curve = None

    def seconds(self, rows: int) -> float:
        """Seconds of a pass of `rows` rows."""
        if self._curve is None:
            self._curve = self._fitted()
        curve = self._curve
        if rows >= _KNOTS[-1]:
            return curve[-1] * self._prior(rows) / self._prior(_KNOTS[-1])
        knot = bisect_right(_KNOTS, max(1, rows)) - 1
        part = (rows - _KNOTS[knot]) / (_KNOTS[knot + 1] - _KNOTS[knot])
        return curve[knot] + max(0.0, part) * (curve[knot + 1] - curve[knot])

    def _prior(self, rows: int) -> float:
        return self._first_s + self._row_s * (rows - 1)

    def _fitted(self) -> list[float]:
        """Seconds at the knots: where little was measured, the prior times what was measured elsewhere."""
        elsewhere = sum(self._ratios) / (sum(self._weights) + _PRIOR_PASSES)
        found, weights = [], []
        for at, weight, ratio in zip(_KNOTS, self._weights, self._ratios, strict=True):
            share = (ratio + _PRIOR_PASSES * elsewhere) / (weight + _PRIOR_PASSES)
            found.append(self._prior(at) * math.exp(share))
            weights.append(weight + 1e-3)
        return _rising(found, weights)


def _rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, by weighted squares: neighbours that fall are pooled."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for value, weight in zip(values, weights, strict=True):
        mean, mass, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            before, more, others = pools.pop()
            mean = (mean * mass + before * more) / (mass + more)
            mass, count = mass + more, count + others
        pools.append((mean, mass, count))
    return [mean for mean, _, count in pools for _ in range(count)]


_PRIOR_CHANCE: Final = 0.6
_PRIOR_TOKENS: Final = 4.0  # how many tokens the prior is worth
_SESSION_TOKENS: Final = 8.0  # how many tokens of its own a session needs to count as much as all sessions do
_DEPTH_TOKENS: Final = 24.0
_SESSION_KEPT: Final = 0.985  # of what was known, a token later
_SHARED_KEPT: Final = 0.998
_DEPTHS: Final = 16  # the last one stands for all beyond


class _Chance:
    """A chance by decayed counts of tokens that were accepted and tokens that were looked at."""

    def __init__(self, kept: float) -> None:
        self._kept = kept
        self._accepted = 0.0
        self._seen = 0.0

    def saw(self, *, accepted: bool) -> None:
        self._accepted = self._accepted * self._kept + accepted
        self._seen = self._seen * self._kept + 1.0

    def given(self, prior: float, tokens: float) -> float:
        """The chance, where `prior` is worth `tokens` tokens: between 0 and 1, neither reached."""
        return (self._accepted + prior * tokens) / (self._seen + tokens)


class Acceptance:
    """Chances that drafted tokens are accepted: a session's own beside those of all, and how they change with depth."""

    def __init__(self, prior: float = _PRIOR_CHANCE) -> None:
        self._prior = prior
        self._shared = _Chance(_SHARED_KEPT)
        self._depths = [_Chance(_SHARED_KEPT) for _ in range(_DEPTHS)]
        self._sessions: dict[int, _Chance] = {}
        self._counts: dict[tuple[int, int], int] = {}

    def observed(self, session: int, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens in a window the first `accepted` were; nothing is learned of those after the next."""
        if not 0 <= accepted <= drafted or drafted == 0:
            return
        own = self._sessions.setdefault(session, _Chance(_SESSION_KEPT))
        for depth in range(min(accepted + 1, drafted)):
            taken = depth < accepted
            for chance in (self._shared, own, self._depths[min(depth, _DEPTHS - 1)]):
                chance.saw(accepted=taken)
        key = drafted, accepted
        self._counts[key] = self._counts.get(key, 0) + 1

    def close(self, session: int) -> None:
        """Forget a session; what it taught of all stays."""
        self._sessions.pop(session, None)

    def chance(self, session: int | None = None) -> float:
        """That a drafted token is accepted given all before it were, at whatever depth; None: of any session."""
        shared = self._shared.given(self._prior, _PRIOR_TOKENS)
        own = self._sessions.get(session) if session is not None else None
        return shared if own is None else own.given(shared, _SESSION_TOKENS)

    def chances(self, session: int | None, most: int) -> tuple[float, ...]:
        """The same for the first, second, ... of `most` tokens: the session's odds, times what depth makes of odds."""
        shared, own = self.chance(), self.chance(session)
        found = []
        for depth in range(most):
            here = self._depths[min(depth, _DEPTHS - 1)].given(shared, _DEPTH_TOKENS)
            odds = _odds(own) * _odds(here) / _odds(shared)
            found.append(odds / (1.0 + odds))
        return tuple(found)

    def distribution(self, session: int | None, drafted: int) -> tuple[float, ...]:
        """The probability that 0, 1, ..., `drafted` tokens of a window are accepted."""
        reached = [1.0, *accumulate(self.chances(session, drafted), lambda one, chance: one * chance)]
        return (*(one - further for one, further in pairwise(reached)), reached[-1])

    @property
    def counts(self) -> dict[tuple[int, int], int]:
        """How many windows of so many drafted tokens had so many accepted: (drafted, accepted) -> windows."""
        return dict(self._counts)


def _odds(chance: float) -> float:
    return chance / (1.0 - chance)


def expected_tokens(chances: Sequence[float], window: int) -> float:
    """Tokens that a pass with `window` drafted tokens gives; the last of `chances` holds for all beyond."""
    total = reached = 1.0
    for depth in range(window):
        reached *= chances[min(depth, len(chances) - 1)]
        total += reached
    return total


def best_window(
    chances: Sequence[float],
    pass_s: Callable[[int], float],
    *,
    other_rows: int,
    draft_token_s: float,
    round_trip_s: float,
    most: int,
    other_tokens: float = 0.0,
) -> int:
    """The window of at most `most` tokens with the most expected tokens a second; 0 where none is worth it.

    chances: `Acceptance.chances`, at least one. pass_s: seconds of a pass of so many rows, of which the window has one
    more than drafted tokens and other sessions `other_rows`. round_trip_s: what a round with a window waits for besides
    drafting and the pass. other_tokens: what those rows are expected to give, which also wait for a wider pass. Of
    windows that are worth the same the shortest.
    """
    best, rate = 0, (1.0 + other_tokens) / pass_s(other_rows + 1)
    total = reached = 1.0
    for window in range(1, most + 1):
        reached *= chances[min(window, len(chances)) - 1]
        total += reached
        took_s = round_trip_s + window * draft_token_s + pass_s(other_rows + 1 + window)
        if (found := (total + other_tokens) / took_s) > rate:
            best, rate = window, found
    return best


PROBE_WINDOW: Final = 2
_FIRST_WAIT: Final = 16
_LONGEST_WAIT: Final = 256


class Probing:
    """Tries a window again now and then where none is worth it: after 16 passes, 32, ... and every 256 at last.

    So at most one pass in 17 is spent on it, and one in 257 in the end.
    """

    def __init__(self) -> None:
        self._wait = _FIRST_WAIT
        self._passed = 0

    def window(self, best: int, most: int) -> int:
        """The window of the next pass, when `best` of at most `most` is the one that is worth most."""
        if best > 0 or most < 1:
            if best > 0:
                self._wait, self._passed = _FIRST_WAIT, 0
            return best
        if self._passed < self._wait:
            self._passed += 1
            return 0
        self._wait, self._passed = min(2 * self._wait, _LONGEST_WAIT), 0
        return min(PROBE_WINDOW, most)


class Windows:
    """Chooses the windows of a lead's sessions from what it is told of passes and outcomes."""

    def __init__(self, cost: PassCost, acceptance: Acceptance | None = None) -> None:
        self.cost = cost
        self.acceptance = acceptance or Acceptance()
        self._probing: dict[int, Probing] = {}

    def choose(
        self,
        session: int,
        *,
        other_rows: int = 0,
        draft_token_s: float,
        round_trip_s: float = 0.0,
        most: int,
        other_tokens: float = 0.0,
    ) -> int:
        """How many tokens to draft for the session's next pass, probes among them."""
        best = 0
        if most > 0:
            best = best_window(
                self.acceptance.chances(session, most),
                self.cost.seconds,
                other_rows=other_rows,
                draft_token_s=draft_token_s,
                round_trip_s=round_trip_s,
                most=most,
                other_tokens=other_tokens,
            )
        return self._probing.setdefault(session, Probing()).window(best, most)

    def close(self, session: int) -> None:
        """Forget a session."""
        self._probing.pop(session, None)
        self.acceptance.close(session)
