"""Windows against brute force: every outcome of a round counted, and rounds played out; costs and chances learned."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.speculation.window import (
    PROBE_WINDOW,
    Acceptance,
    PassCost,
    Probing,
    Windows,
    best_window,
    expected_tokens,
)

CHANCES = st.floats(0.01, 0.99)
SECONDS = st.floats(1e-4, 0.2)


def played(rng, chance, pass_s, window, *, other_rows, draft_s, trip_s, rounds=4000) -> float:
    """Tokens a second of a session that really drafts, draws and waits."""
    tokens, took_s = 0, 0.0
    for _ in range(rounds):
        accepted = 0
        while accepted < window and rng.random() < chance:
            accepted += 1
        tokens += accepted + 1
        took_s += pass_s(other_rows + 1 + window) + (trip_s + window * draft_s if window else 0.0)
    return tokens / took_s


@pytest.mark.parametrize(
    ("chance", "first_s", "row_s", "draft_s", "trip_s", "other_rows"),
    [
        (0.8, 0.03, 0.002, 0.002, 0.0, 0),
        (0.8, 0.03, 0.002, 0.002, 0.0, 6),
        (0.6, 0.03, 0.010, 0.004, 0.0, 0),
        (0.3, 0.03, 0.020, 0.010, 0.0, 0),
        (0.9, 0.05, 0.001, 0.010, 0.08, 0),
        (0.7, 0.05, 0.001, 0.010, 0.04, 0),
        (0.5, 0.05, 0.001, 0.010, 0.15, 3),
        (0.95, 0.02, 0.0, 0.0005, 0.3, 0),
    ],
)
def test_the_window_is_the_best_that_can_be_played(chance, first_s, row_s, draft_s, trip_s, other_rows):
    def pass_s(rows: int) -> float:
        return first_s + row_s * (rows - 1)

    best = best_window([chance], pass_s, other_rows=other_rows, draft_token_s=draft_s, round_trip_s=trip_s, most=16)
    rates = [
        played(random.Random(1), chance, pass_s, window, other_rows=other_rows, draft_s=draft_s, trip_s=trip_s)
        for window in range(17)
    ]
    assert rates[best] > 0.97 * max(rates)
    if best and rates[0] < 0.95 * max(rates):
        assert rates[best] > rates[0]


@settings(deadline=None)
@given(st.lists(CHANCES, min_size=1, max_size=6), SECONDS, SECONDS, SECONDS, st.integers(0, 5), st.integers(0, 8))
def test_the_window_is_the_best_of_all_outcomes_counted(chances, first_s, draft_s, trip_s, other_rows, most):
    def pass_s(rows: int) -> float:
        return first_s * (1.0 + 0.1 * rows**0.7)

    def rate(window: int) -> float:
        mean = 0.0
        for flags in itertools.product((True, False), repeat=window):
            probability = 1.0
            for depth, flag in enumerate(flags):
                chance = chances[min(depth, len(chances) - 1)]
                probability *= chance if flag else 1.0 - chance
            accepted = next((at for at, flag in enumerate(flags) if not flag), window)
            mean += probability * (accepted + 1)
        assert mean == pytest.approx(expected_tokens(chances, window))
        return mean / (pass_s(other_rows + 1 + window) + (trip_s + window * draft_s if window else 0.0))

    best = best_window(chances, pass_s, other_rows=other_rows, draft_token_s=draft_s, round_trip_s=trip_s, most=most)
    assert 0 <= best <= most
    assert rate(best) == pytest.approx(max(rate(window) for window in range(most + 1)))


def test_break_even_is_the_one_that_is_known():
    """Synchronous drafting pays up to RTT = (E - 1) t_target - w t_draft: 47 ms at .7, 108 at .85 (2606.25091)."""
    for chance, most_s in ((0.7, 0.047), (0.85, 0.108)):
        for trip_s, pays in ((most_s - 0.001, True), (most_s + 0.0015, False)):
            total = expected_tokens([chance], 5)
            assert (total / (trip_s + 5 * 0.010 + 0.050) > 1 / 0.050) is pays
        for trip_s, pays in ((most_s - 0.001, True), (0.2, False)):
            found = best_window(
                [chance], lambda _: 0.05, other_rows=0, draft_token_s=0.01, round_trip_s=trip_s, most=16
            )
            assert bool(found) is pays


def test_others_that_wait_make_windows_narrower():
    def pass_s(rows: int) -> float:
        return 0.01 + 0.004 * rows

    alone, beside = (
        best_window([0.8], pass_s, other_rows=8, draft_token_s=0, round_trip_s=0, most=16, other_tokens=other)
        for other in (0.0, 8.0)
    )
    assert alone > beside > 0


# What passes cost.


@settings(deadline=None)
@given(
    st.tuples(st.floats(1e-3, 0.1), st.floats(0.0, 0.01)),
    st.lists(st.tuples(st.integers(1, 700), st.floats(1e-5, 5.0)), max_size=40),
)
def test_costs_never_fall_and_never_jump(prior, passes):
    cost = PassCost(*prior)
    for rows, took_s in passes:
        cost.measured(rows, took_s)
    curve = [cost.seconds(rows) for rows in range(1, 800)]
    assert all(0.0 < one <= other * (1 + 1e-12) for one, other in itertools.pairwise(curve))
    steepest = max(other - one for one, other in itertools.pairwise(curve))
    assert steepest <= curve[-1]
    assert cost.seconds(0) == curve[0]


def test_costs_are_the_prior_until_they_are_measured():
    cost = PassCost(0.02, 0.001)
    for took_s in (0.0, -1.0, float("inf"), float("nan")):
        cost.measured(1, took_s)
    cost.measured(0, 1.0)
    for rows in (1, 2, 5, 17, 100, 512, 1000):
        assert cost.seconds(rows) == pytest.approx(0.02 + 0.001 * (rows - 1))
    cost.measured(4, 2 * cost.seconds(4))
    assert cost.seconds(400) > 1.2 * (0.02 + 0.001 * 399)  # a machine that is slower is so everywhere


def test_costs_are_learned_with_their_steps():
    """A processor whose tiles are of 16 rows; passes of 1 to 24 rows, each with 10 % of noise."""

    def true_s(rows: int) -> float:
        return 0.03 if rows <= 4 else 0.034 if rows <= 16 else 0.06

    cost, rng = PassCost(0.001, 0.001), random.Random(4)
    for _ in range(400):
        rows = rng.choice((1, 1, 2, 3, 4, 5, 8, 12, 16, 24))
        cost.measured(rows, true_s(rows) * rng.uniform(0.9, 1.1))
    for rows in (1, 2, 3, 8, 12, 24):
        assert cost.seconds(rows) == pytest.approx(true_s(rows), rel=0.15)
    assert cost.seconds(24) > 1.4 * cost.seconds(12)


def test_a_stall_is_forgotten_and_a_change_is_not():
    cost = PassCost(0.02, 0.001)
    for _ in range(50):
        cost.measured(1, 0.02)
    cost.measured(1, 3.0)
    assert cost.seconds(1) < 0.025
    for _ in range(60):
        cost.measured(1, 0.08)
    assert cost.seconds(1) == pytest.approx(0.08, rel=0.1)


# What is accepted.


def observed(acceptance: Acceptance, rng: random.Random, session: int, chances: list[float], rounds: int) -> None:
    for _ in range(rounds):
        accepted = 0
        while accepted < len(chances) and rng.random() < chances[accepted]:
            accepted += 1
        acceptance.observed(session, len(chances), accepted)


def test_chances_are_learned_by_session_and_begin_with_those_of_all():
    acceptance, rng = Acceptance(), random.Random(6)
    assert acceptance.chances(1, 3) == pytest.approx((acceptance.chance(),) * 3)
    observed(acceptance, rng, 1, [0.9] * 4, 300)
    observed(acceptance, rng, 2, [0.3] * 4, 300)
    assert acceptance.chance(1) == pytest.approx(0.9, abs=0.08)
    assert acceptance.chance(2) == pytest.approx(0.3, abs=0.15)
    assert acceptance.chance(2) < acceptance.chance(3) == acceptance.chance() < acceptance.chance(1)
    observed(acceptance, rng, 2, [0.9] * 4, 100)
    assert acceptance.chance(2) > 0.75
    acceptance.close(2)
    acceptance.close(2)
    assert acceptance.chance(2) == acceptance.chance()


def test_chances_change_with_depth():
    """Of look-up the first token is a guess, and what follows a hit is likely."""
    acceptance, rng = Acceptance(), random.Random(7)
    truth = [0.35, 0.9, 0.9, 0.9]
    for session in range(20):
        observed(acceptance, rng, session, truth, 40)
    assert acceptance.chances(None, 4) == pytest.approx(truth, abs=0.1)
    assert len(acceptance.chances(5, 40)) == 40


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=60), st.integers(0, 20))
def test_distributions_are_distributions(outcomes, drafted):
    acceptance = Acceptance()
    for session, most, accepted in outcomes:
        acceptance.observed(session, most, accepted)
    for session in (None, 0, 9):
        chances = acceptance.chances(session, drafted)
        assert all(0.0 < chance < 1.0 for chance in chances)
        found = acceptance.distribution(session, drafted)
        assert len(found) == drafted + 1
        assert all(one >= 0.0 for one in found)
        assert sum(found) == pytest.approx(1.0)
        mean = sum(accepted * one for accepted, one in enumerate(found))
        if drafted:
            assert 1.0 + mean == pytest.approx(expected_tokens(chances, drafted))
    known = [(most, accepted) for _, most, accepted in outcomes if 0 <= accepted <= most and most]
    assert acceptance.counts == {one: known.count(one) for one in set(known)}


# Trying again.


def test_windows_that_are_not_worth_it_are_tried_now_and_then():
    probing = Probing()
    found = [probing.window(0, 8) for _ in range(4000)]
    tried = [at for at, window in enumerate(found) if window]
    assert tried[:5] == [16, 49, 114, 243, 500]
    assert {other - one for one, other in itertools.pairwise(tried[4:])} == {257}
    assert set(found) == {0, PROBE_WINDOW}
    assert probing.window(5, 8) == 5
    assert [probing.window(0, 1) for _ in range(17)] == [0] * 16 + [1]
    assert [probing.window(0, 0) for _ in range(400)] == [0] * 400


def test_a_session_finds_its_window_again_when_its_text_turns():
    """Chances of .1, then of .9: windows close, are tried now and then, and open."""
    windows, rng = Windows(PassCost(0.03, 0.003)), random.Random(9)
    chosen: list[int] = []
    for turn in range(600):
        chance = 0.1 if turn < 200 else 0.95
        window = windows.choose(1, draft_token_s=0.004, most=8)
        chosen.append(window)
        accepted = 0
        while accepted < window and rng.random() < chance:
            accepted += 1
        windows.acceptance.observed(1, window, accepted)
        windows.cost.measured(1 + window, 0.03 + 0.003 * window)
    assert chosen[0] > 0
    assert sum(map(bool, chosen[60:200])) < 28
    assert min(chosen[-100:]) >= 4
    assert windows.choose(1, draft_token_s=0.004, most=0) == 0
    windows.close(1)
    windows.close(1)
    assert windows.choose(1, draft_token_s=0.004, most=8) > 0
