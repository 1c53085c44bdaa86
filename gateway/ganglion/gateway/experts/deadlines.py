"""Pure: how long an expert is waited for.

An answer of T tokens is expected within E seconds: the latency budget of its class, scaled from the tokens that this
counts on to T, or where there is none the expert's own 95th percentiles, ttft + T * tpot. It is waited for 3 E, so that
what is merely slow still answers, and at least 1 s. Without any figure: 60 s. The first token is waited for three times
its own percentile, at least 1 s, where that is known, else as long as the answer: an expert that says nothing is
then left while there is time to ask another one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from ganglion.gateway.experts.table import Budget, Expert

FACTOR: Final = 3.0
LEAST_S: Final = 1.0
MOST_S: Final = 600.0
UNKNOWN_S: Final = 60.0
DUE: Final = 0.9  # of a latency budget, after which one of several answers is chosen: the rest is for the way back


@dataclass(frozen=True)
class Patience:
    """Seconds from the question to the first token, and to the end of the answer."""

    first_s: float
    whole_s: float


def within_s(budget: Budget, tokens: int) -> float:
    """Seconds from the arrival of a request within which its answer of `tokens` is due; infinite without a budget."""
    return budget.latency_s * max(1.0, tokens / budget.tokens) if budget.latency_s else math.inf


def patience(expert: Expert, budget: Budget, tokens: int) -> Patience:
    """As the module says."""
    expected_s = 0.0
    if budget.latency_s:
        expected_s = within_s(budget, tokens)
    elif expert.ttft_p95_s and expert.tpot_p95_s:
        expected_s = expert.ttft_p95_s + tokens * expert.tpot_p95_s
    whole_s = min(MOST_S, max(LEAST_S, FACTOR * expected_s)) if expected_s else UNKNOWN_S
    first_s = max(LEAST_S, FACTOR * expert.ttft_p95_s) if expert.ttft_p95_s else whole_s
    return Patience(min(first_s, whole_s), whole_s)
