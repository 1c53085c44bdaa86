"""From experts, a budget and what the gates think to the subset, with a reason for everyone left out. Pure.

The energy of a request is that of everyone who is asked; of `best`, where one is, that of the dearest member. Members
that all answer are in time when the slowest is: their chances multiply. An expert outside the subset that serves now
has to keep within the limits with MARGIN to spare, so that noise in its figures does not move it in and out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from ganglion.coordinator.selection.experts import Expert
from ganglion.coordinator.selection.figures import AnswerTime, answer_time, p95_of_all
from ganglion.coordinator.selection.objective import Floats, Objective, Problem, problem_of, risk_of_chance, value
from ganglion.coordinator.selection.refusal import refusal
from ganglion.coordinator.selection.request import Budget
from ganglion.coordinator.selection.selector import WORK, Solution, solve

MARGIN: Final = 1.1
IN_TIME: Final = 0.95
# Quality before a gate said any: in a domain of its own, with no domains, outside its domains.
SKILLED, GENERAL, UNSKILLED = 0.7, 0.5, 0.3


@dataclass(frozen=True)
class Profile:
    """A gate's view. share: [kinds], adds up to 1. quality: [kinds, experts], 0 to 1."""

    experts: tuple[str, ...]
    share: Floats
    quality: Floats


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The subset, as Selection in admin.proto. left_out: (name, why) of everyone else."""

    experts: tuple[str, ...] = ()
    value: float = 0.0
    latency_p95_s: float = 0.0
    energy_j: float = 0.0
    optimal: bool = True
    gap: float = 0.0
    refused: str = ""
    left_out: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Costed:
    """An expert with what an answer of it costs."""

    expert: Expert
    time: AnswerTime
    energy_j: float


def choose(
    experts: Sequence[Expert], budget: Budget, profile: Profile | None, serving: Collection[str] | None = None
) -> Choice:
    """The best subset for a budget. serving: the subset that serves now, where only figures changed (see MARGIN)."""
    left_out = {each.name: _unfit(each, budget) for each in experts}
    fit = [_costed(each, budget, serving) for each in experts if not left_out[each.name]]
    left_out = {name: why for name, why in left_out.items() if why}
    within = []
    for each in fit:
        over = _over_alone(each, budget)
        if over:
            left_out[each.expert.name] = over
        else:
            within.append(each)
    if not within:
        refused = refusal([(each.expert, each.time, each.energy_j) for each in fit], budget, left_out)
        return Choice(refused=refused, left_out=tuple(sorted(left_out.items())))
    share, quality = kinds([each.expert for each in within], budget.domains, profile)
    members, solution = _solve(within, budget, share, quality)
    problem = _problem(within, range(len(within)), budget, share, quality)
    chosen = [_costed(within[each].expert, budget, None) for each in members]
    for at, each in enumerate(within):
        if at not in members:
            left_out[each.expert.name] = _why_not(at, within, members, problem, budget)
    energies = [each.energy_j for each in chosen]
    one_answers = budget.combine == "best"
    return Choice(
        experts=tuple(sorted(each.expert.name for each in chosen)),
        value=value(problem, list(members)),
        latency_p95_s=(
            max(each.time.p95_s for each in chosen) if one_answers else p95_of_all([each.time for each in chosen])
        ),
        energy_j=max(energies) if one_answers else sum(energies),
        optimal=solution.optimal,
        gap=solution.gap,
        left_out=tuple(sorted(left_out.items())),
    )


def _costed(expert: Expert, budget: Budget, serving: Collection[str] | None) -> Costed:
    factor = MARGIN if serving is not None and expert.name not in serving else 1.0
    time = answer_time(expert.figures, budget.tokens, expert.queue, expert.slots)
    return Costed(expert, time.slower(factor), factor * budget.tokens * expert.figures.energy_j_per_token)


def _unfit(expert: Expert, budget: Budget) -> str:
    """Why it may not be asked whatever it costs; "" when it may."""
    if expert.state != "ready":
        return f"{expert.state}: {expert.why}"
    if budget.private and expert.label != "owner":
        return f"private: it is labelled {expert.label}, not owner"
    if budget.combine == "blend" and not expert.tokenizer_digest:
        return "blend: only models of this fleet can be mixed token by token"
    return ""


def _over_alone(each: Costed, budget: Budget) -> str:
    if budget.latency_p95_s and each.time.p95_s > budget.latency_p95_s:
        return (
            f"latency: 95 % of its answers of {budget.tokens} tokens are over within {each.time.p95_s:.3g} s, "
            f"{budget.latency_p95_s:g} s are allowed"
        )
    if budget.energy_j and each.energy_j > budget.energy_j:
        return f"energy: {each.energy_j:.3g} J for {budget.tokens} tokens, {budget.energy_j:g} J are allowed"
    return ""


def kinds(experts: Sequence[Expert], domains: Sequence[str], profile: Profile | None) -> tuple[Floats, Floats]:
    """(share [kinds], quality [kinds, experts]) of requests of these domains; of all without any.

    With a profile: the kinds whose best expert lists one of the domains, or all when there are none; an expert that the
    gate does not know yet counts as the mean of the others. Without: a kind for each domain that was named.
    """
    if profile is None or not profile.share.size:
        named = tuple(domains) or tuple(sorted({each for expert in experts for each in expert.spec.domains})) or ("",)
        quality = np.array(
            [
                [
                    SKILLED if kind in expert.spec.domains else UNSKILLED if expert.spec.domains else GENERAL
                    for expert in experts
                ]
                for kind in named
            ]
        )
        return np.full(len(named), 1.0 / len(named)), quality
    at = {name: column for column, name in enumerate(profile.experts)}
    known = [at.get(expert.name) for expert in experts]
    usual = profile.quality.mean(axis=1)
    quality = np.stack([usual if column is None else profile.quality[:, column] for column in known], axis=1)
    share = profile.share
    if domains:
        lists = np.array([bool(set(domains) & set(expert.spec.domains)) for expert in experts])
        asked = lists[quality.argmax(axis=1)] & (share > 0.0)
        if asked.any():
            share, quality = share[asked], quality[asked]
    return share, quality


def _solve(
    within: Sequence[Costed], budget: Budget, share: Floats, quality: Floats
) -> tuple[tuple[int, ...], Solution]:
    """The best subset, as places in `within`; of blends that of the best tokenizer."""
    groups: dict[str, list[int]] = {}
    for at, each in enumerate(within):
        groups.setdefault(each.expert.tokenizer_digest if budget.combine == "blend" else "", []).append(at)
    found: list[tuple[tuple[int, ...], Solution]] = []
    for places in groups.values():
        # The frugal come first: to them go ties.
        order = sorted(places, key=lambda at: (within[at].energy_j, within[at].time.p95_s, within[at].expert.name))
        work = WORK * len(order) // len(within)
        solution = solve(_problem(within, order, budget, share, quality), work)
        found.append((tuple(order[each] for each in solution.members), solution))
    members, best = max(found, key=lambda each: each[1].value)
    return members, replace(best, bound=max(solution.bound for _, solution in found))


def _problem(within: Sequence[Costed], order: Sequence[int], budget: Budget, share: Floats, quality: Floats) -> Problem:
    """The problem over some of `within`, in this order."""
    if budget.combine == "best":  # one is asked, and everyone in `within` keeps the limits alone
        costs, limits = np.zeros((0, len(order))), np.zeros(0)
    else:
        late = [
            risk_of_chance(within[at].time.chance(budget.latency_p95_s)) if budget.latency_p95_s else 0.0
            for at in order
        ]
        costs = np.array([[within[at].energy_j for at in order], late])
        limits = np.array([budget.energy_j or np.inf, risk_of_chance(IN_TIME) if budget.latency_p95_s else np.inf])
    objective: Objective = "best" if budget.combine == "best" else "coverage"
    return problem_of(objective, share, quality[:, list(order)], costs, limits, most=budget.most)


def _why_not(at: int, within: Sequence[Costed], members: tuple[int, ...], problem: Problem, budget: Budget) -> str:
    """Why an expert that keeps every limit alone is not in the subset. problem: over all of `within`."""
    chosen = [within[each] for each in members]
    if budget.combine == "blend" and within[at].expert.tokenizer_digest != chosen[0].expert.tokenizer_digest:
        return "blend: its tokenizer is another one than the chosen experts'"
    gain = value(problem, [*members, at]) - value(problem, list(members))
    if gain > 1e-9:
        over = _over_together([*chosen, within[at]], problem.most, budget)
        return f"{over}it would add {gain:.3f}"
    mine = problem.quality[:, at]
    better = [each for each in members if np.all(problem.quality[:, each] >= mine - 1e-12)]
    if better:
        return f"dominated: {within[better[0]].expert.name} is as good at every kind of request"
    return "it adds nothing: for every kind of request one of the chosen experts is as good"


def _over_together(everyone: Sequence[Costed], most: int, budget: Budget) -> str:
    """Which limit the chosen experts and one more would not keep; "" when none."""
    if len(everyone) > most:
        return f"most: {most} experts are allowed; "
    if budget.combine == "best":
        return ""
    energy_j = sum(each.energy_j for each in everyone)
    if budget.energy_j and energy_j > budget.energy_j:
        return f"energy: with it {energy_j:.3g} J, {budget.energy_j:g} J are allowed; "
    p95_s = p95_of_all([each.time for each in everyone])
    if budget.latency_p95_s and p95_s > budget.latency_p95_s:
        return f"latency: with it {p95_s:.3g} s, {budget.latency_p95_s:g} s are allowed; "
    return ""
