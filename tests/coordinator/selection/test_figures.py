"""Claims against measurements, and the times of whole answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ganglion.coordinator.selection.figures import (
    ASSUMED_POWER_W,
    ASSUMED_TOKENS_PER_S,
    HALF_LIFE_S,
    SAMPLES,
    TAIL_HALF_LIFE_S,
    AnswerTime,
    Claim,
    Figures,
    Sample,
    answer_time,
    estimate,
    figures_of,
    p95_of_all,
    quantile,
)


def measured(times: list[float], *, tpot_s: float = 0.1, age_s: float = 0.0) -> list[Sample]:
    return [Sample(1000.0 - age_s, each, tpot_s) for each in times]


def test_a_claim_stands_until_something_is_measured() -> None:
    figures = figures_of(Claim(tokens_per_s=20.0, ttft_s=0.3, energy_j_per_token=0.5), [], 0.02, 1000.0)
    assert (figures.tokens_per_s, figures.ttft_s, figures.link_s) == (20.0, 0.3, 0.02)
    assert (figures.energy_j_per_token, figures.energy_measured, figures.assumed) == (0.5, False, False)
    assert figures.tpot_p95_s > figures.tpot_s


def test_of_whom_nothing_is_known_something_is_assumed_and_said() -> None:
    figures = figures_of(Claim(devices=2), [], 0.0, 1000.0)
    assert figures.assumed
    assert figures.tokens_per_s == ASSUMED_TOKENS_PER_S
    assert figures.energy_j_per_token == pytest.approx(2 * ASSUMED_POWER_W / ASSUMED_TOKENS_PER_S)
    assert not figures.energy_measured


@pytest.mark.parametrize("claimed", [1000.0, 0.5], ids=["too fast", "too slow"])
def test_a_liar_is_corrected_within_a_handful_of_answers(claimed: float) -> None:
    samples = measured([0.2] * 4, tpot_s=0.1)
    figures = figures_of(Claim(tokens_per_s=claimed), samples, 0.0, 1000.0)
    assert figures.tokens_per_s == pytest.approx(10.0)
    assert figures.samples == 4
    assert figures.energy_j_per_token == pytest.approx(ASSUMED_POWER_W * 0.1)


def test_one_slow_answer_changes_little() -> None:
    steady = figures_of(Claim(tokens_per_s=10.0), measured([0.2] * 12), 0.0, 1000.0)
    shaken = figures_of(Claim(tokens_per_s=10.0), measured([0.2] * 11 + [20.0]), 0.0, 1000.0)
    assert shaken.ttft_s == steady.ttft_s
    assert shaken.ttft_p95_s < 2 * steady.ttft_p95_s


def test_a_slow_tail_is_noticed() -> None:
    rng = np.random.default_rng(1)
    times = [float(each) for each in np.where(rng.random(SAMPLES) < 0.2, 2.0, 0.2)]
    figures = figures_of(Claim(tokens_per_s=10.0), measured(times), 0.0, 1000.0)
    assert figures.ttft_s == pytest.approx(0.2)
    assert figures.ttft_p95_s > 1.0


def test_a_tail_that_nobody_measures_any_more_is_forgotten_before_the_median() -> None:
    claim, times = Claim(tokens_per_s=10.0), [0.2] * 40 + [2.0] * 4
    asked = answer_time(figures_of(claim, measured(times, tpot_s=0.01), 0.0, 1000.0), 8, 0, 0)
    left = answer_time(
        figures_of(claim, measured(times, tpot_s=0.01, age_s=6 * TAIL_HALF_LIFE_S), 0.0, 1000.0), 8, 0, 0
    )
    assert asked.p95_s == pytest.approx(2.08)
    assert left.p95_s < 0.5
    assert left.median_s == pytest.approx(asked.median_s)


def test_what_was_measured_long_ago_gives_way_to_the_claim() -> None:
    claim = Claim(tokens_per_s=50.0)
    fresh = figures_of(claim, measured([0.2] * 8, tpot_s=1.0), 0.0, 1000.0)
    old = figures_of(claim, measured([0.2] * 8, tpot_s=1.0, age_s=4 * HALF_LIFE_S), 0.0, 1000.0)
    assert fresh.tokens_per_s == pytest.approx(1.0)
    assert old.tokens_per_s == pytest.approx(50.0)


def test_an_answer_of_one_token_says_nothing_of_the_stream() -> None:
    figures = figures_of(Claim(tokens_per_s=50.0), measured([0.2] * 8, tpot_s=0.0), 0.0, 1000.0)
    assert figures.tokens_per_s == pytest.approx(50.0)


def test_quantiles_approach_those_of_the_distribution() -> None:
    rng = np.random.default_rng(2)
    times = rng.lognormal(math.log(0.3), 0.4, SAMPLES)
    median, p95 = estimate([(float(each), 1.0) for each in times], 0.5, 0.6)
    assert median == pytest.approx(float(np.median(times)), rel=0.1)
    assert p95 == pytest.approx(float(np.quantile(times, 0.95)), rel=0.25)
    assert quantile([(3.0, 1.0), (1.0, 1.0), (2.0, 1.0)], 0.5) == 2.0


def figures(**changes: float) -> Figures:
    known = {"ttft_s": 0.2, "ttft_p95_s": 0.4, "tpot_s": 0.01, "tpot_p95_s": 0.02, "link_s": 0.0,
             "energy_j_per_token": 1.0, "energy_measured": False, "samples": 0, "assumed": False}  # fmt: skip
    return Figures(**(known | changes))


def test_an_answer_waits_only_when_all_places_are_taken() -> None:
    free = answer_time(figures(), 100, queued=3, slots=4)
    assert (free.median_s, free.p95_s) == pytest.approx((1.2, 2.4))
    waiting = answer_time(figures(), 100, queued=5, slots=4)
    assert waiting.median_s == pytest.approx(1.2 + 1.2 * 2 / 4)
    assert answer_time(figures(), 100, queued=9, slots=0) == free  # a server: its own figures hold its queue


def test_the_time_of_an_answer_is_that_of_whole_answers() -> None:
    """First token and stream are slow at different times: their quantiles together would be slower than any answer."""
    rng = np.random.default_rng(5)
    slow = [(float(first), float(each)) for first, each in rng.choice([[0.2, 0.03], [0.9, 0.01], [0.2, 0.01]], SAMPLES)]
    samples = [Sample(1000.0, ttft_s, tpot_s) for ttft_s, tpot_s in slow]
    found = figures_of(Claim(tokens_per_s=100.0, ttft_s=0.2), samples, 0.0, 1000.0)
    time = answer_time(found, 32, 0, 0)
    whole = [ttft_s + 32 * tpot_s for ttft_s, tpot_s in slow]
    assert time.p95_s == pytest.approx(float(np.quantile(whole, 0.95)), rel=0.05)
    assert time.p95_s < 0.8 * (found.ttft_p95_s + 32 * found.tpot_p95_s)
    assert answer_time(found, 64, 0, 0).p95_s > time.p95_s


def test_chances_are_those_of_a_log_normal_time() -> None:
    time = AnswerTime(1.0, 2.0)
    assert time.chance(1.0) == pytest.approx(0.5)
    assert time.chance(2.0) == pytest.approx(0.95)
    rng = np.random.default_rng(4)
    sigma = math.log(2.0) / 1.6449
    drawn = np.maximum(rng.lognormal(0.0, sigma, 40_000), rng.lognormal(math.log(1.5), sigma, 40_000))
    together = p95_of_all([time, AnswerTime(1.5, 3.0)])
    assert together == pytest.approx(float(np.quantile(drawn, 0.95)), rel=0.03)
    assert p95_of_all([time]) == pytest.approx(2.0, rel=2e-3)


def test_answers_that_are_quicker_than_claimed_do_not_widen_the_tail() -> None:
    claim = Claim(tokens_per_s=3000.0)  # 0.5 s to the first token, as nobody says
    before = figures_of(claim, [], 0.0, 100.0).whole(64)
    quick = [Sample(100.0, 0.02, 0.001)]
    after = figures_of(claim, quick, 0.0, 100.0).whole(64)
    assert after[1] <= before[1] * 1.01
    slow = [Sample(100.0, 5.0, 0.01)]
    assert figures_of(claim, slow, 0.0, 100.0).whole(64)[1] > 5.0  # one is enough to keep it from tight budgets
