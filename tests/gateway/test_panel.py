"""The panel against random events; votes and scores against dumb references; the saturation fit against a grid."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.gateway.experts.deadlines import LEAST_S, MOST_S, UNKNOWN_S, Patience, patience
from ganglion.gateway.experts.panel import WIDTH, Ask, Cancel, Command, Emit, Fail, Fault, Finish, Member, Panel, Stand
from ganglion.gateway.experts.reports import outcome_of
from ganglion.gateway.experts.saturation import MOST, WITHOUT_DATA, Curve, Tally, fit
from ganglion.gateway.experts.scoring import Answered, normalized, reranked, score, shares, voted
from ganglion.gateway.experts.table import Budget, Expert

PATIENCE = Patience(2.0, 10.0)
TEXTS = ("yes", "Yes.", "no", "", " ", "perhaps")


def member(name: str, weight: float = 0.5, **more: Any) -> Member:
    return Member(name, weight, 0.5, PATIENCE, **more)


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_an_answer_that_is_due_is_chosen_among_those_there_are() -> None:
    panel = Panel([member("a", 0.2), member("b", 0.3), member("c", 0.5)], "vote", due_s=1.5)
    panel.start(0.0)
    assert panel.wake_s == 2.0, "nothing to choose from yet"
    assert panel.said(2, "yes", 1, (), 0.5) == []
    assert panel.ended(2, "stop", 1, 0.6) == []
    assert panel.wake_s == 1.5
    panel.said(1, "no", 1, (), 0.7)
    assert kinds(panel.clock(1.0)) == []
    commands = panel.clock(1.5)
    assert kinds(commands) == ["Cancel", "Cancel", "Emit", "Finish"]
    assert panel.kept is panel.attempts[2]
    assert set(panel.dropped) == {panel.attempts[0].member.name, panel.attempts[1].member.name}
    silent, slow = (outcome_of(one, 0.25) for one in (panel.attempts[0], panel.attempts[1]))
    if silent is None or slow is None:
        pytest.fail("that they are late is told")
    late = {silent.expert: silent, slow.expert: slow}
    told = {name: (one.failed, round(one.ttft_s, 6), round(one.tpot_s, 6), one.tokens) for name, one in late.items()}
    assert sorted(told.values()) == [("", 0.95, 0.8, 2), ("", 1.75, 0.0, 1)]


def test_of_a_best_one_no_answer_is_cut_short() -> None:
    panel = Panel([member("a", 0.6), member("b", 0.4)], "best", due_s=1.0)
    panel.start(0.0)
    panel.said(0, "ye", 1, (), 0.5)
    assert panel.clock(1.5) == []


# --- any events, in any order


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 40), st.sampled_from(["best", "vote", "rerank"]), st.integers(1, 5), st.booleans())
def test_one_end_and_nobody_left_running(
    seed: int, how: Literal["best", "vote", "rerank"], count: int, stream: bool
) -> None:
    chance = random.Random(seed)
    weights = [chance.choice([0.0, chance.random()]) for _ in range(count)]
    n, enough = chance.choice([None, chance.randint(1, 9)]), chance.choice([None, -0.1])
    names = [f"e{at}" for at in range(count)]
    whole = shares(dict(zip(names, weights, strict=True)), names)
    due_s = chance.choice([math.inf, 3.0])
    members = [member(name, whole[name]) for name in names]
    panel = Panel(members, how, seed=5, n=n, stream=stream, due_s=due_s, enough=enough)
    now_s = 0.0
    running: set[int] = set()
    everything: list[Command] = []
    emitted = ""

    def take(commands: list[Command]) -> None:
        nonlocal emitted
        for command in commands:
            assert not any(isinstance(one, Finish | Fail) for one in everything), "nothing follows the end"
            everything.append(command)
            match command:
                case Ask(attempt, _, seed):
                    assert attempt not in running
                    assert seed == 5 + (attempt if n is not None and how != "best" else 0)
                    running.add(attempt)
                case Cancel(attempt):
                    running.remove(attempt)
                case Emit(_, text):
                    emitted += text
                case _:
                    pass

    take(panel.start(now_s))
    for _ in range(200):
        if panel.over:
            break
        assert running, "somebody is asked, or it is over"
        assert panel.wake_s < math.inf
        attempt = chance.choice(sorted(running))
        now_s += chance.choice([0.0, 0.1, 3.0])
        match chance.choice(["said", "said", "ended", "failed", "clock", "nan", "late"]):
            case "said":
                text = chance.choice(TEXTS)
                take(panel.said(attempt, text, 1, chance.choice([(), (-0.5,), (-math.inf,)]), now_s))
            case "nan":
                take(panel.said(attempt, "x", 1, (math.nan,), now_s))
            case "ended":
                running.discard(attempt)
                take(panel.ended(attempt, "stop", 3, now_s))
            case "failed":
                running.discard(attempt)
                take(panel.failed(attempt, Fault("unreachable", "gone"), now_s))
            case "late":
                now_s = max(now_s, panel.wake_s)
                take(panel.clock(now_s))
                assert panel.wake_s > now_s
            case _:
                take(panel.clock(now_s))
    else:
        while not panel.over:
            take(panel.clock(max(now_s, now_s := panel.wake_s)))
    ends = [one for one in everything if isinstance(one, Finish | Fail)]
    assert len(ends) == 1
    assert everything[-1] is ends[0]
    assert not running
    assert all(one.stand is not Stand.RUNNING for one in panel.attempts)
    if isinstance(ends[0], Finish):
        assert panel.kept is not None
        assert emitted == panel.kept.text
        assert panel.kept.stand in {Stand.ENDED, Stand.EMPTY}
    elif not (stream and how == "best"):
        assert emitted == ""
        assert not panel.answers
    before = len(everything)
    for attempt in range(len(panel.attempts)):  # what arrives late changes nothing
        take(panel.said(attempt, "x", 1, (), now_s))
        take(panel.ended(attempt, "stop", 1, now_s))
        take(panel.failed(attempt, Fault("unreachable", "gone"), now_s))
    take(panel.clock(now_s + 1000))
    assert len(everything) == before


def test_best_goes_on_to_the_next_before_the_first_text_only() -> None:
    panel = Panel([member("a", 0.2), member("b", 0.8)], "best", stream=True)
    assert panel.start(0.0) == [Ask(0, "b", 0)]
    assert panel.said(0, "", 1, (), 0.5) == []
    assert panel.failed(0, Fault("device_lost", "gone"), 1.0) == [Ask(1, "a", 0)]
    assert panel.said(1, "hel", 1, (), 1.5) == [Emit(1, "hel")]
    assert panel.failed(1, Fault("device_lost", "gone"), 2.0) == [Fail((Fault("device_lost", "gone"),) * 2)]


def test_best_that_is_not_streamed_begins_anew_also_after_text() -> None:
    panel = Panel([member("a", 0.2), member("b", 0.8)], "best")
    panel.start(0.0)
    assert panel.said(0, "hel", 1, (), 0.5) == []
    assert panel.failed(0, Fault("device_lost", "gone"), 1.0) == [Ask(1, "a", 0)]
    panel.said(1, "hello", 1, (), 1.5)
    assert panel.ended(1, "stop", 1, 2.0) == [Emit(1, "hello"), Finish(1, "stop")]


def test_silence_before_and_within_an_answer() -> None:
    panel = Panel([member("a"), member("b")], "best", stream=True)
    panel.start(0.0)
    assert panel.wake_s == 2.0
    assert panel.clock(1.9) == []
    assert panel.clock(2.0) == [Cancel(0), Ask(1, "b", 0)]
    assert panel.dropped["a"].why == "no first token within 2 s"
    panel.said(1, "x", 1, (), 3.0)
    assert panel.wake_s == 12.0
    assert kinds(panel.clock(12.0)) == ["Cancel", "Fail"]
    assert panel.dropped["b"].why == "no whole answer within 10 s"


def test_a_vote_ends_when_the_rest_cannot_change_it() -> None:
    panel = Panel([member("a", 0.4), member("b", 0.35), member("c", 0.25)], "vote", seed=9)
    assert panel.start(0.0) == [Ask(0, "a", 9), Ask(1, "b", 9), Ask(2, "c", 9)]
    panel.said(0, "Paris.", 1, (), 1.0)
    assert panel.ended(0, "stop", 1, 1.0) == []
    panel.said(2, "paris", 1, (), 1.0)
    assert panel.ended(2, "stop", 1, 1.0) == [Cancel(1), Emit(0, "Paris."), Finish(0, "stop")]


def test_an_empty_answer_is_kept_only_where_nobody_says_more() -> None:
    panel = Panel([member("a", 0.6), member("b", 0.4)], "best")
    panel.start(0.0)
    assert panel.ended(0, "stop", 1, 1.0) == [Ask(1, "b", 0)]
    assert panel.ended(1, "stop", 1, 1.0) == [Finish(0, "stop")]


def test_answers_are_spread_over_the_idlest() -> None:
    panel = Panel([member("busy", 0.5, queue=2), member("idle", 0.3), member("slow", 0.2)], "vote", n=7)
    asked = [one.expert for one in panel.start(0.0) if isinstance(one, Ask)]
    assert asked == ["idle", "slow", "idle", "slow", "busy", "idle", "slow"]
    alone = Panel([member("one", 1.0)], "vote", n=7, seed=3)
    commands = alone.start(0.0)
    assert len(commands) == WIDTH
    alone.said(0, "x", 1, (), 1.0)
    assert alone.ended(0, "stop", 1, 1.0) == [Ask(WIDTH, "one", 3 + WIDTH)]


def test_rerank_stops_at_an_answer_that_is_likely_enough() -> None:
    def ended(enough: float | None) -> list[str]:
        panel = Panel([member("one", 1.0)], "rerank", n=6, enough=enough)
        panel.start(0.0)
        panel.said(0, "sure", 1, (-0.01,), 1.0)
        return kinds(panel.ended(0, "stop", 1, 1.0))

    assert ended(-0.1) == ["Cancel"] * 3 + ["Emit", "Finish"]
    assert ended(None) == ["Ask"]


# --- votes and scores

answers_strategy = st.lists(
    st.builds(
        lambda text, weight, logprob: (text, weight, logprob),
        st.sampled_from(["a", "A", "b", "c"]),
        st.sampled_from([0.1, 0.2, 0.3, 0.4]),
        st.none() | st.floats(-5, 0),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(answers_strategy, st.lists(st.sampled_from([0.1, 0.2, 0.3]), max_size=2))
def test_a_decided_vote_holds_whatever_follows(drawn: list[Any], outstanding: list[float]) -> None:
    answers = [Answered(at, text, weight, 0.5, logprob) for at, (text, weight, logprob) in enumerate(drawn)]
    kept, decided = voted(answers, outstanding)
    assert kept is not None
    totals = {text: sum(one.weight for one in answers if one.text.lower() == text) for text in "abc"}
    assert totals[kept.text.lower()] == pytest.approx(max(totals.values()))
    if decided:
        for texts in itertools.product("abcd", repeat=len(outstanding)):
            more = [Answered(9 + at, text, outstanding[at], 0.5) for at, text in enumerate(texts)]
            final, _ = voted([*answers, *more])
            assert final is not None
            assert normalized(final.text) == normalized(kept.text)


@settings(max_examples=100, deadline=None)
@given(answers_strategy)
def test_the_best_score_is_kept(drawn: list[Any]) -> None:
    answers = [Answered(at, text, weight, 0.5, logprob) for at, (text, weight, logprob) in enumerate(drawn)]
    kept = reranked(answers)
    assert kept is not None
    own = [(math.log(0.5) if one.mean_logprob is None else one.mean_logprob) + math.log(one.weight) for one in answers]
    assert score(kept.weight, kept.quality, kept.mean_logprob) == pytest.approx(max(own))


def test_normalized() -> None:
    assert normalized("  The\n answer is  42. ") == normalized("“the Answer IS 42”")
    assert normalized("-42") == "-42"
    assert normalized("...") == "..."
    assert normalized("ＡＢ") == "ab"


def test_shares() -> None:
    assert shares({"a": 1.0, "b": 3.0, "c": 9.0}, ["a", "b"]) == {"a": 0.25, "b": 0.75}
    assert shares({}, ["a", "b"]) == {"a": 0.5, "b": 0.5}


# --- how long, how many


def test_patience() -> None:
    slow = Expert("x", ttft_p95_s=1.0, tpot_p95_s=0.1)
    assert patience(slow, Budget(), 100) == Patience(3.0, pytest.approx(33.0))
    assert patience(slow, Budget(latency_s=4.0, tokens=128), 256) == Patience(3.0, 24.0)
    assert patience(slow, Budget(latency_s=4.0, tokens=128), 64) == Patience(3.0, 12.0)
    assert patience(Expert("y"), Budget(latency_s=0.01), 8) == Patience(LEAST_S, LEAST_S)
    assert patience(Expert("y"), Budget(), 8) == Patience(UNKNOWN_S, UNKNOWN_S)
    assert patience(Expert("y"), Budget(latency_s=3600.0), 8).whole_s == MOST_S


def test_the_fit_is_the_least_squares_curve() -> None:
    generator = np.random.default_rng(3)
    ps, tops = np.linspace(0.005, 0.995, 199), np.linspace(0.01, 1, 100)
    for _ in range(20):
        truth = Curve(float(generator.uniform(0.03, 0.9)), float(generator.uniform(0.3, 1.0)))
        points = [(n, float(np.clip(truth.at(n) + generator.normal(0, 0.02), 0, 1)), 1.0) for n in range(1, 13)]

        values = np.array([value for _, value, _ in points])
        shapes = 1 - (1 - ps[:, None]) ** np.arange(1, 13)
        losses = ((tops[None, :, None] * shapes[:, None, :] - values) ** 2).sum(axis=2)
        at, _ = np.unravel_index(losses.argmin(), losses.shape)
        found = fit(points)
        assert sum((found.at(n) - value) ** 2 for n, value, _ in points) <= losses.min() + 1e-12
        assert abs(found.p - ps[at]) < 0.02


def test_saturation_is_the_first_answer_that_brings_too_little() -> None:
    for p, top in itertools.product((0.02, 0.1, 0.35, 0.8, 0.999), (0.2, 0.6, 1.0)):
        curve = Curve(p, top)
        dumb = next((n for n in range(1, MOST + 1) if curve.at(n + 1) - curve.at(n) <= 0.05), MOST)
        assert curve.saturation() == dumb
    assert WITHOUT_DATA.saturation() == 5


def test_the_tally_is_fitted_once_it_has_seen_enough() -> None:
    tally = Tally()
    for first in [1] * 8 + [2] * 4 + [3] * 2 + [4] * 2:
        assert tally.curve("default") == WITHOUT_DATA
        tally.add("default", first, 4)
    assert tally.curve("default").at(1) == pytest.approx(0.5, abs=0.05)
    assert tally.curve("other") == WITHOUT_DATA
