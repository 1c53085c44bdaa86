"""What an expert costs: claims are priors, weighed against what was measured. Pure.

Times are estimated in logarithms. The median is a weighted one, in which the claim counts as PRIOR_WEIGHT answers, so
that a wrong claim is outvoted after three; half of the answers could be outliers before it follows them. The 95 %
quantile begins as the claim's spread and that of the answers (median absolute deviation), and becomes the answers' own
quantile as they grow to ENOUGH. An answer weighs less with every newer one and with its age: an expert that was slow
for a while, and is no longer asked, goes back to its claim. The answers' own quantile gives way sooner, by half when
the last one is TAIL_HALF_LIFE_S old: what makes answers slow now and then (a queue, a link) passes, and an expert that
is not asked for its tail is not measured.

The time of a whole answer is estimated from whole answers, each as its first token and its stream were together: their
95 % quantiles add up to more than that of the sum, by as much as they are independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

Z95: Final = 1.6448536269514722  # of the normal distribution
PRIOR_WEIGHT: Final = 2.0  # answers
ENOUGH: Final = 20.0  # answers, for a quantile of their own
DECAY: Final = 0.97  # weight of an answer, for each newer one
HALF_LIFE_S: Final = 3600.0
TAIL_HALF_LIFE_S: Final = 60.0
SAMPLES: Final = 64  # kept of each expert
SPREAD: Final = 1.5  # 95 % quantile over median, where neither is measured
LEAST_SIGMA: Final = 0.05

ASSUMED_TOKENS_PER_S: Final = 10.0  # of an expert of which nothing is known
ASSUMED_TTFT_S: Final = 0.5
ASSUMED_POWER_W: Final = 30.0  # of a device while it answers: the package of a laptop's or small desktop's processor


@dataclass(frozen=True, kw_only=True)
class Figures:
    """An expert's costs in force. energy_measured: not from an assumed power. assumed: no claim and no answer yet.

    answers: what was measured, with weights; fresh: how much their tail counts; claimed: what they are weighed against
    (None: these figures).
    """

    ttft_s: float
    ttft_p95_s: float
    tpot_s: float
    tpot_p95_s: float
    link_s: float
    energy_j_per_token: float
    energy_measured: bool
    samples: int
    assumed: bool
    answers: tuple[tuple[Sample, float], ...] = ()
    fresh: float = 1.0
    claimed: Stream | None = None
    _times: dict[int, tuple[float, float]] = field(init=False, default_factory=dict, compare=False, repr=False)

    @property
    def tokens_per_s(self) -> float:
        """Of one answer while it streams, median."""
        return 1.0 / self.tpot_s

    def whole(self, tokens: int) -> tuple[float, float]:
        """(median, 95 % quantile) of the time of an answer of `tokens`, in seconds."""
        if tokens not in self._times:
            claim = self.claimed or Stream(self.ttft_s, self.ttft_p95_s, self.tpot_s, self.tpot_p95_s)
            taken = [(each.ttft_s + tokens * (each.tpot_s or self.tpot_s), weight) for each, weight in self.answers]
            median, p95 = claim.ttft_s + tokens * claim.tpot_s, claim.ttft_p95_s + tokens * claim.tpot_p95_s
            self._times[tokens] = estimate(taken, median, p95, self.fresh)
        return self._times[tokens]


@dataclass(frozen=True)
class Stream:
    """How an answer comes: medians and 95 % quantiles, in seconds."""

    ttft_s: float
    ttft_p95_s: float
    tpot_s: float
    tpot_p95_s: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What somebody says of an expert; 0: not known. devices: that answer together, for their power."""

    tokens_per_s: float = 0.0
    ttft_s: float = 0.0
    ttft_p95_s: float = 0.0
    tpot_p95_s: float = 0.0
    link_s: float = 0.0
    energy_j_per_token: float = 0.0
    energy_measured: bool = False
    devices: int = 1


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One answer: when it ended (Unix seconds), its time to the first token, its time per token after it (0: one)."""

    at_unix_s: float
    ttft_s: float
    tpot_s: float


def figures_of(claim: Claim, samples: Sequence[Sample], link_s: float, now_s: float) -> Figures:
    """The figures in force: `claim` corrected by `samples`, oldest first. link_s: measured round trip; 0: not known."""
    link_s = link_s or claim.link_s
    tpot_s = 1.0 / (claim.tokens_per_s or ASSUMED_TOKENS_PER_S)
    ttft_s = claim.ttft_s or ASSUMED_TTFT_S + link_s
    claimed = Stream(ttft_s, claim.ttft_p95_s or SPREAD * ttft_s, tpot_s, claim.tpot_p95_s or SPREAD * tpot_s)
    answers = tuple(weighed(samples, now_s))
    idle_s = max(0.0, now_s - samples[-1].at_unix_s) if samples else 0.0
    fresh = 0.5 ** (idle_s / TAIL_HALF_LIFE_S)
    ttft, ttft_p95 = estimate([(each.ttft_s, weight) for each, weight in answers], ttft_s, claimed.ttft_p95_s, fresh)
    streamed = [(each.tpot_s, weight) for each, weight in answers if each.tpot_s > 0.0]
    tpot, tpot_p95 = estimate(streamed, tpot_s, claimed.tpot_p95_s, fresh)
    return Figures(
        ttft_s=ttft,
        ttft_p95_s=ttft_p95,
        tpot_s=tpot,
        tpot_p95_s=tpot_p95,
        link_s=link_s,
        energy_j_per_token=claim.energy_j_per_token or ASSUMED_POWER_W * claim.devices * tpot,
        energy_measured=claim.energy_measured and claim.energy_j_per_token > 0.0,
        samples=len(samples),
        assumed=claim.tokens_per_s == 0.0 and not samples,
        answers=answers,
        fresh=fresh,
        claimed=claimed,
    )


def weighed(samples: Sequence[Sample], now_s: float) -> Iterable[tuple[Sample, float]]:
    """Each answer with its weight, the newest first. samples: oldest first."""
    for newer, each in enumerate(reversed(samples)):
        age_s = max(0.0, now_s - each.at_unix_s)
        yield each, DECAY**newer * 0.5 ** (age_s / HALF_LIFE_S)


def estimate(
    measured: Sequence[tuple[float, float]], median: float, p95: float, fresh: float = 1.0
) -> tuple[float, float]:
    """(median, 95 % quantile) of times in seconds, from (time, weight) and a claim of both; all above 0.

    fresh: 0 to 1, how much the measured tail counts.
    """
    p95 = max(p95, median * math.exp(Z95 * LEAST_SIGMA))
    if not measured:
        return median, p95
    logs = [(math.log(max(value, 1e-9)), weight) for value, weight in measured]
    middle = quantile([*logs, (math.log(median), PRIOR_WEIGHT)], 0.5)
    total = sum(weight for _, weight in logs)
    claimed = math.log(p95 / median) / Z95
    # About the answers' own middle: that they are quicker than was claimed is no spread. Slower ones count at once.
    own = quantile(logs, 0.5)
    seen = 1.4826 * quantile([(abs(value - own), weight) for value, weight in logs], 0.5)
    sigma = math.sqrt((PRIOR_WEIGHT * claimed**2 + total * seen**2) / (PRIOR_WEIGHT + total))
    fitted = max(middle, own) + Z95 * max(sigma, LEAST_SIGMA)
    share = min(1.0, fresh * total / ENOUGH)
    # Of few answers the slowest alone is above any 95 %: it may be an accident.
    counted = logs if total >= ENOUGH else sorted(logs)[:-1]
    high = (1.0 - share) * fitted + share * max(quantile(counted or logs, 0.95), middle + Z95 * LEAST_SIGMA)
    return math.exp(middle), math.exp(high)


def quantile(weighted: Sequence[tuple[float, float]], at: float) -> float:
    """The smallest value at or below which lies `at` of the weight."""
    ordered = sorted(weighted)
    need = at * sum(weight for _, weight in ordered)
    for value, weight in ordered:
        need -= weight
        if need <= 1e-12:
            return value
    return ordered[-1][0]


# Times of whole answers: log-normal between them, with the median and the quantile of Figures.whole.


@dataclass(frozen=True)
class AnswerTime:
    """How long an answer takes: median and 95 % quantile, in seconds."""

    median_s: float
    p95_s: float

    def slower(self, factor: float) -> AnswerTime:
        """By a factor."""
        return AnswerTime(self.median_s * factor, self.p95_s * factor)

    def chance(self, within_s: float) -> float:
        """The chance to be over within so many seconds."""
        sigma = max(math.log(self.p95_s / self.median_s) / Z95, 1e-3)
        return 0.5 * math.erfc(-math.log(within_s / self.median_s) / (sigma * math.sqrt(2.0)))


def answer_time(figures: Figures, tokens: int, queued: int, slots: int) -> AnswerTime:
    """Of an answer of `tokens`; beyond `slots` answers at a time one waits for the `queued` before it."""
    median, p95 = figures.whole(tokens)
    wait = median * max(0, queued + 1 - slots) / slots if slots else 0.0
    return AnswerTime(median + wait, p95 + wait)


def p95_of_all(times: Sequence[AnswerTime]) -> float:
    """Seconds within which all of them are over with a chance of 95 %, to a thousandth."""
    low, high = max(each.p95_s for each in times), 2.0 * max(each.p95_s for each in times)

    def chance(within_s: float) -> float:
        return math.prod(each.chance(within_s) for each in times)

    while chance(high) < 0.95:
        low, high = high, 2.0 * high
    if chance(low) >= 0.95:
        return low
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= 0.95 else (middle, high)
    return high
