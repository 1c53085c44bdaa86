"""From experts and a budget to a subset, with a reason for everyone else."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from ganglion.coordinator.selection.choosing import MARGIN, Choice, Profile, choose, kinds
from ganglion.coordinator.selection.experts import Expert, Spec
from ganglion.coordinator.selection.figures import Figures, answer_time
from ganglion.coordinator.selection.request import Budget


def expert(
    name: str,
    *,
    tokens_per_s: float = 100.0,
    energy_j: float = 0.01,
    spread: float = 1.5,
    ttft_s: float = 0.1,
    domains: tuple[str, ...] = (),
    **changes: object,
) -> Expert:
    figures = Figures(
        ttft_s=ttft_s, ttft_p95_s=spread * ttft_s, tpot_s=1.0 / tokens_per_s, tpot_p95_s=spread / tokens_per_s,
        link_s=0.0, energy_j_per_token=energy_j, energy_measured=True, samples=9, assumed=False,
    )  # fmt: skip
    made = Expert(spec=Spec(name=name, domains=domains), state="ready", why="", label="owner", figures=figures)
    return replace(made, **changes)


C = expert("c", domains=("c",))
JS = expert("js", domains=("js",), energy_j=0.02)
DOCS = expert("docs", domains=("docs",), tokens_per_s=20.0)


def why(choice: Choice, name: str) -> str:
    return dict(choice.left_out)[name]


def test_without_limits_every_domain_has_its_expert() -> None:
    choice = choose([C, JS, DOCS], Budget(), None)
    assert choice.experts == ("c", "docs", "js")
    assert choice.optimal
    assert choice.value == pytest.approx(0.7)
    assert choice.energy_j == pytest.approx(128 * 0.02)  # one answers: the dearest of them at worst
    assert choice.latency_p95_s == pytest.approx(1.5 * (0.1 + 128 / 20))


def test_who_adds_nothing_is_dominated() -> None:
    choice = choose([C, replace(C, spec=Spec(name="twin", domains=("c",)))], Budget(), None)
    assert choice.experts == ("c",)
    assert why(choice, "twin") == "dominated: c is as good at every kind of request"


def test_a_vote_wants_several_of_one_domain() -> None:
    twin = replace(C, spec=Spec(name="twin", domains=("c",)))
    choice = choose([C, twin], Budget(combine="vote"), None)
    assert choice.experts == ("c", "twin")
    assert choice.energy_j == pytest.approx(2 * 128 * 0.01)
    assert choice.value == pytest.approx(1 - 0.3**2)


def test_limits_leave_out_with_a_figure() -> None:
    choice = choose([C, JS, DOCS], Budget(latency_p95_s=3.0, energy_j=2.0), None)
    assert choice.experts == ("c",)
    assert why(choice, "js").startswith("energy: 2.56 J")
    assert why(choice, "docs").startswith("latency: 95 % of its answers of 128 tokens")
    both = choose([C, JS, DOCS], Budget(combine="rerank", energy_j=3.0), None)
    assert both.experts == ("c", "docs")
    assert why(both, "js").startswith("energy: with it 5.12 J, 3 J are allowed")
    one = choose([C, JS, DOCS], Budget(most=1), None)
    assert len(one.experts) == 1
    assert why(one, "docs").startswith("most: 1 experts")


def test_members_that_all_answer_are_in_time_together() -> None:
    alike = [expert(f"e{number}") for number in range(8)]
    alone = answer_time(alike[0].figures, 128, 0, 0).p95_s
    choice = choose(alike, Budget(combine="vote", latency_p95_s=1.1 * alone), None)
    assert 1 < len(choice.experts) < 8
    assert alone < choice.latency_p95_s <= 1.1 * alone * 1.001
    left = next(each.name for each in alike if each.name not in choice.experts)
    assert why(choice, left).startswith("latency: with it")


def test_private_is_about_labels_and_blends_about_tokenizers() -> None:
    stranger = replace(C, label="friend")
    choice = choose([stranger, JS], Budget(private=True), None)
    assert choice.experts == ("js",)
    assert "friend" in why(choice, "c")
    a, b, other = (replace(each, tokenizer_digest=digest) for each, digest in ((C, "aa"), (JS, "aa"), (DOCS, "bb")))
    blend = choose([a, b, other, expert("server")], Budget(combine="blend"), None)
    assert blend.experts == ("c", "js")
    assert "tokenizer" in why(blend, "docs")
    assert why(blend, "server").startswith("blend")


def test_who_is_not_ready_is_not_chosen() -> None:
    away = replace(C, state="away", why="it is not deployed: ganglion run c")
    choice = choose([away, JS], Budget(), None)
    assert choice.experts == ("js",)
    assert why(choice, "c") == "away: it is not deployed: ganglion run c"
    assert (
        choose([away], Budget(), None).refused == "no expert may be asked: c: away: it is not deployed: ganglion run c"
    )
    assert "ganglion experts add" in choose([], Budget(), None).refused


def test_a_refusal_names_the_tightest_limit_and_what_would_meet_it() -> None:
    slow = choose([C, JS, DOCS], Budget(latency_p95_s=0.5), None)
    assert slow.experts == ()
    assert slow.refused.startswith("latency_s 0.5: the fastest expert is c, which needs 2.07 s for 128 tokens")
    assert choose([C, JS, DOCS], Budget(latency_p95_s=2.08), None).experts
    assert choose([C, JS, DOCS], Budget(latency_p95_s=2.07), None).experts == ("c", "js")
    dear = choose([C, JS], Budget(energy_j=1.0), None)
    assert dear.refused.startswith("energy_j 1: the most frugal expert is c, which needs 1.28 J for 128 tokens")
    assert "at most 100 tokens" in dear.refused
    assert choose([C, JS], Budget(energy_j=1.0, tokens=100), None).experts == ("c",)


def test_a_refusal_for_two_limits_follows_the_one_that_is_nearer() -> None:
    fast = expert("fast", energy_j=1.0)
    frugal = expert("frugal", tokens_per_s=40.0, energy_j=0.001)
    budget = Budget(latency_p95_s=4.0, energy_j=2.0)
    refused = choose([fast, frugal], budget, None).refused
    assert refused.startswith("latency_s 4: the fastest expert within its energy is frugal")
    both = choose([expert("x", energy_j=1.0, tokens_per_s=10.0)], budget, None).refused
    assert both.startswith("latency_s 4 and energy_j 2")


@pytest.mark.parametrize("seed", range(60))
def test_what_a_refusal_asks_for_is_enough(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts = [
        expert(f"e{at}", tokens_per_s=float(rng.uniform(5, 200)), energy_j=float(rng.uniform(0.001, 2.0)))
        for at in range(3)
    ]
    budget = Budget(latency_p95_s=float(rng.choice([0.0, 0.3, 1.0])), energy_j=float(rng.choice([0.0, 0.1, 1.0])))
    refused = choose(experts, budget, None).refused
    if not refused:
        return
    asked = {
        name: float(refused.split(f"{name} >= ")[1].split(",")[0].split(" ")[0])
        for name in ("latency_s", "energy_j")
        if f"{name} >= " in refused
    }
    raised = replace(
        budget,
        latency_p95_s=asked.get("latency_s", budget.latency_p95_s),
        energy_j=asked.get("energy_j", budget.energy_j),
    )
    assert choose(experts, raised, None).experts


def test_an_expert_outside_needs_a_margin_to_get_in() -> None:
    limit_s = answer_time(C.figures, 128, 0, 0).p95_s * (1 + MARGIN) / 2
    budget = Budget(latency_p95_s=limit_s)
    assert choose([C], budget, None).experts == ("c",)
    assert choose([C], budget, None, serving=("c",)).experts == ("c",)
    assert choose([C], budget, None, serving=()).experts == ()


def test_kinds_follow_the_gate_where_it_said_something() -> None:
    profile = Profile(("c", "js"), np.array([0.6, 0.4]), np.array([[0.9, 0.1], [0.2, 0.5]]))
    share, quality = kinds([C, JS, DOCS], (), profile)
    assert list(share) == [0.6, 0.4]
    assert quality[:, 2] == pytest.approx([0.5, 0.35])  # the gate does not know it yet
    share, quality = kinds([C, JS], ("js",), profile)
    assert quality.tolist() == [[0.2, 0.5]]
    assert choose([C, JS], Budget(domains=("js",)), profile).experts == ("js",)
    assert kinds([C, JS], ("cobol",), profile)[0].size == 2  # nobody's domain: any kind


@pytest.mark.parametrize("combine", ["best", "vote", "blend"])
def test_choices_equal_brute_force_over_budgets(combine: str) -> None:
    """The definitions of value, time and energy, written down a second time."""
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        experts = [
            expert(
                f"e{at}",
                tokens_per_s=float(rng.uniform(20, 200)),
                energy_j=float(rng.uniform(0.001, 0.05)),
                spread=float(rng.uniform(1.1, 3.0)),
                tokenizer_digest=str(rng.integers(2)),
            )
            for at in range(int(rng.integers(2, 8)))
        ]
        names = [each.name for each in experts]
        profile = Profile(tuple(names), rng.dirichlet(np.ones(5)), rng.uniform(0.05, 0.95, (5, len(names))))
        budget = Budget(
            combine=combine, latency_p95_s=float(rng.uniform(1.0, 8.0)), energy_j=float(rng.uniform(0.5, 8.0)),
            most=int(rng.integers(0, 5)),
        )  # fmt: skip
        best = 0.0
        for size in range(1, (budget.most or len(names)) + 1):
            for members in itertools.combinations(range(len(names)), size):
                best = max(best, worth([experts[at] for at in members], list(members), budget, profile))
        choice = choose(experts, budget, profile)
        assert choice.value == pytest.approx(best, abs=1e-9), seed
        assert bool(choice.experts) != bool(choice.refused)
        assert set(choice.experts) | {name for name, _ in choice.left_out} == set(names)
        found += bool(choice.experts)
        if choice.experts:
            assert choice.energy_j <= budget.energy_j * (1 + 1e-6)
            assert choice.latency_p95_s <= budget.latency_p95_s * 1.002
    assert found > 20


def worth(chosen: list[Expert], members: list[int], budget: Budget, profile: Profile) -> float:
    times = [answer_time(each.figures, budget.tokens, 0, 0) for each in chosen]
    energies = [budget.tokens * each.figures.energy_j_per_token for each in chosen]
    quality = profile.quality[:, members]
    if budget.combine == "best":
        in_time = all(each.p95_s <= budget.latency_p95_s for each in times)
        met = quality.max(axis=1)
        energy_j = max(energies)
    else:
        in_time = math.prod(each.chance(budget.latency_p95_s) for each in times) >= 0.95 - 1e-9
        met = 1 - np.prod(1 - quality, axis=1)
        energy_j = sum(energies)
    if budget.combine == "blend" and len({each.tokenizer_digest for each in chosen}) > 1:
        return 0.0
    return float(profile.share @ met) if in_time and energy_j <= budget.energy_j * (1 + 1e-9) else 0.0
