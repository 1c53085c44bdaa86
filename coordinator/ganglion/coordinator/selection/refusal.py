"""Why no subset meets a budget: the tightest limit, and what would meet it. Pure.

An expert that meets a budget alone is a subset that does, so only single experts need to be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ganglion.coordinator.selection.experts import Expert
from ganglion.coordinator.selection.figures import AnswerTime
from ganglion.coordinator.selection.request import Budget


def refusal(fit: Sequence[tuple[Expert, AnswerTime, float]], budget: Budget, left_out: Mapping[str, str]) -> str:
    """One line. fit: experts that might be asked, with time and energy (J) of an answer, every one over a limit.

    The tightest limit is the one that has to be raised least, where raising one is enough; otherwise both are named.
    left_out: why others may not be asked at all.
    """
    if not left_out:
        return "there are no experts: add one with ganglion experts add NAME"
    if not fit:
        reasons = "; ".join(f"{name}: {why}" for name, why in sorted(left_out.items())[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        return f"no expert may be asked: {reasons}{more}"
    needs = [
        (
            time.p95_s / budget.latency_p95_s if budget.latency_p95_s else 0.0,
            energy_j / budget.energy_j if budget.energy_j else 0.0,
            expert.name,
            time,
            energy_j,
        )
        for expert, time, energy_j in fit
    ]
    slow = min((need for need in needs if need[1] <= 1.0), key=lambda need: need[0], default=None)
    dear = min((need for need in needs if need[0] <= 1.0), key=lambda need: need[1], default=None)
    if slow is not None and (dear is None or slow[0] <= dear[1]):
        return _latency(budget, slow[2], slow[3], "within its energy " if dear is not None else "")
    if dear is not None:
        return _energy(budget, dear[2], dear[4], "within its time " if slow is not None else "")
    least = min(needs, key=lambda need: max(need[0], need[1]))
    return (
        f"latency_s {budget.latency_p95_s:g} and energy_j {budget.energy_j:g}: nearest is expert {least[2]}, which "
        f"needs {_up(least[3].p95_s)} s and {_up(least[4])} J for {budget.tokens} tokens; ask for latency_s >= "
        f"{_up(least[3].p95_s)} and energy_j >= {_up(least[4])}, or for fewer tokens"
    )


def _latency(budget: Budget, name: str, time: AnswerTime, among: str) -> str:
    need = _up(time.p95_s)
    return (
        f"latency_s {budget.latency_p95_s:g}: the fastest expert {among}is {name}, which needs {need} s for "
        f"{budget.tokens} tokens (p95); ask for latency_s >= {need}, for fewer tokens, or add a faster expert"
    )


def _energy(budget: Budget, name: str, energy_j: float, among: str) -> str:
    need = _up(energy_j)
    tokens = math.floor(budget.tokens * budget.energy_j / energy_j)
    fewer = f"for at most {tokens} tokens" if tokens else "for fewer tokens"
    return (
        f"energy_j {budget.energy_j:g}: the most frugal expert {among}is {name}, which needs {need} J for "
        f"{budget.tokens} tokens; ask for energy_j >= {need}, {fewer}, or add a more frugal expert"
    )


def _up(figure: float) -> str:
    """Three digits, rounded up: what a person asks for by this figure is enough."""
    digits = 2 - math.floor(math.log10(figure))
    return f"{math.ceil(figure * 10**digits) / 10**digits:g}"
