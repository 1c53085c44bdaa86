"""What the modes are predicted to take, against the formulas and against the real cores in simulated time."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from draft_simulation import Link, Speech, Told, simulate

from ganglion.agent.speculation.knowledge import Knowledge, Mode
from ganglion.agent.speculation.pilot import MODES, Pilot, coverage, tokens_of_pass

COUNT = 300


@functools.cache
def told(mode: Mode | None, accept: float = 0.8, seed: int = 0, **link: Any) -> Told:
    """A simulated answer; its tokens are checked against the target's there."""
    return simulate(Link(**link), Speech(accept=accept, seed=seed), mode, count=COUNT)


def pilot(accept: float = 0.8, own_accept: float = 0.8, **link: Any) -> Pilot:
    """One that knows a link as it is."""
    known = Link(**({"own_accept": own_accept} | link))
    knowledge = Knowledge(pass_s=known.pass_s, draft_s=known.draft_s)
    for number in range(400):
        knowledge.passes.measured(1, known.pass_s)
        knowledge.passes.measured(known.window + 1, known.pass_s)
        knowledge.drafts.measured(1, known.draft_s)
        knowledge.went_round(known.round_trip_s)
        knowledge.drafted_own(1, int(number * 7 % 10 < 10 * own_accept), known.own_s)
    corrections = knowledge.greedy
    for number in range(2000):
        rank = 0 if (number * 7919) % 1000 < 1000 * accept else 1
        corrections.saw(Speech(accept=1.0).guess([1]), Speech(accept=1.0).guess([1]).tokens[rank])
    return Pilot(knowledge, corrections, own=known.own, window_tokens=known.window)


def test_expected_tokens_are_the_geometric_sum():
    assert tokens_of_pass(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    assert tokens_of_pass(0.0, 5) == 1.0


def test_coverage_counts_the_likeliest_outcomes_first():
    ranks = (0.8, 0.12, 0.04)
    assert coverage(ranks, 5, 0) == 0.0
    assert coverage(ranks, 5, 5) == pytest.approx(0.8**6)  # the main chain goes on
    assert coverage(ranks, 5, 10) == pytest.approx(0.8**6 + 0.12)
    everything = 0.8**6 + sum(0.8**taken * 0.16 for taken in range(6))
    assert coverage(ranks, 5, 1e6) == pytest.approx(everything)


def test_the_figures_of_the_notes_are_predicted():
    """RTT 80, t_v 50, t_a 10, t_s 6 ms, acceptance 0.8, windows of 5 (shared/notes: cost per token)."""
    one = pilot()
    each = tokens_of_pass(0.8, 5)
    ms = {mode: 1000 * one._predict(mode, 5) for mode in MODES}
    assert 1000 * one.predict("plain")[0] == pytest.approx(50, rel=0.02)
    assert ms["own"] == pytest.approx((50 + 5 * 6) / each, rel=0.08)
    assert ms["sync"] == pytest.approx((80 + 5 * 10 + 50) / each, rel=0.08)
    assert ms["edge"] < ms["sync"]
    assert ms["branch"] < ms["own"]
    assert one.mode == "branch"


@pytest.mark.parametrize("round_trip_s", [0.0, 0.04, 0.15])
def test_the_simulated_link_takes_what_the_formulas_say(round_trip_s):
    one = pilot(round_trip_s=round_trip_s)
    for mode in ("plain", "own", "sync"):
        predicted = 1000 * (one.predict(mode)[0] if mode == "plain" else one._predict(mode, 5))
        texts = [told(mode, seed=seed, round_trip_s=round_trip_s).ms for seed in range(4)]
        assert sum(texts) / len(texts) == pytest.approx(predicted, rel=0.12), mode
    sync, ahead, edge = (told(mode, round_trip_s=round_trip_s).ms for mode in ("sync", "ahead", "edge"))
    assert ahead < sync
    assert edge < sync
    assert told("branch", round_trip_s=round_trip_s).ms <= 1.05 * told("own", round_trip_s=round_trip_s).ms


def test_hits_at_the_verifier_fall_with_the_depth_that_has_to_be_looked_ahead():
    rates = []
    for round_trip_s in (0.0, 0.04, 0.15):
        figures = told("branch", round_trip_s=round_trip_s).figures
        rates.append(figures.hits / figures.passes)
    assert rates[0] > rates[1] > rates[2]
    assert rates[0] > 0.4


LINKS: list[dict[str, Any]] = [
    {"round_trip_s": 0.0, "own": False},
    {"round_trip_s": 0.08, "own": False},
    {"round_trip_s": 0.08},
    {"round_trip_s": 0.15, "own": False, "accept": 0.1},  # a poor drafter: plain is best
    {"round_trip_s": 0.04, "own": True, "own_accept": 0.3},
    {"round_trip_s": 0.02, "own": False, "draft_s": 0.06},  # a slow one
]


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_the_choice_comes_to_the_best_mode(link):
    modes = [mode for mode in MODES if mode != "own" or link.get("own", True)]
    best = min(told(mode, **link).ms for mode in modes)
    assert told(None, **link).ms < 1.15 * best + 1.0
    assert told(None, **link).ms < 1.05 * told("plain", **link).ms


def test_a_wrong_prediction_is_corrected_by_measurement():
    """The mode that runs takes twice what is predicted: another one is tried, and not for one slow pass."""
    one = pilot(own=False)
    first = one.mode
    predicted = one.predict(first)[0]
    now = 0.0
    for number in range(40):
        now += predicted * (30 if number == 15 else 1)
        one.passed(1, now)
        if number < 15:
            assert one.mode == first
    for _ in range(60):
        now += 4 * predicted
        one.passed(1, now)
    assert one.mode != first


def test_a_forced_mode_is_never_left():
    one = pilot(own=False)
    forced = Pilot(one.knowledge, one.knowledge.greedy, forced="sync", window_tokens=5)
    for number in range(100):
        forced.passed(1, number * 10.0)
    assert forced.mode == "sync"


def test_without_a_drafter_only_the_verifier_drafts():
    knowledge = Knowledge()
    assert Pilot(knowledge, knowledge.greedy, drafts=False).mode == "plain"
    assert Pilot(knowledge, knowledge.greedy, drafts=False, own=True).mode == "own"
