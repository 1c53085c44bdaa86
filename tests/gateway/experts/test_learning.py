"""What logged outcomes say of experts, and how often a gate is right."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from ganglion.gateway.experts.gate_training import Example
from ganglion.gateway.experts.learning import HELD_OUT, agreement, example_of, split
from ganglion.gateway.experts.outcomes import Answer, Outcome


def outcome(combine: str, *answers: Answer, chosen: int = 0) -> Outcome:
    return Outcome(0.0, "default", combine, "what?", answers, chosen)


def test_a_vote_says_who_agreed_with_the_kept_answer() -> None:
    answers = (Answer("a", "Yes.", -1), Answer("b", "no", -1), Answer("c", " yes", -1), Answer("c", "no", -1))
    assert example_of(outcome("vote", *answers)) == Example("what?", {"a": 1.0, "b": 0.0, "c": 0.5})
    assert example_of(outcome("vote", *answers, chosen=1)) == Example("what?", {"a": 0.0, "b": 1.0, "c": 0.5})


def test_a_rerank_says_how_likely_each_answer_was_without_the_gates_weight() -> None:
    answers = (
        Answer("a", "x", -9.0, -0.5),
        Answer("b", "y", -0.1, -2.0),
        Answer("server", "z", -0.2),
        Answer("a", "w", 0, 0.0),
    )
    found = example_of(outcome("rerank", *answers))
    assert found is not None
    assert found.quality == {"a": pytest.approx((1 + math.exp(-0.5)) / 2), "b": pytest.approx(math.exp(-2.0))}
    assert example_of(outcome("rerank", Answer("server", "z", -0.2))) is None
    assert example_of(outcome("rerank", Answer("a", "z", -0.2, math.nan))) is None


def test_one_answer_alone_says_nothing() -> None:
    assert example_of(outcome("vote", Answer("a", "x", -1))) is None
    assert example_of(outcome("best", Answer("a", "x", -1, -0.5))) is None


def test_a_prompt_is_on_one_side() -> None:
    examples = [Example(f"prompt {at % 300}", {"a": 1.0}) for at in range(600)]
    learning, held = split(examples)
    assert len(learning) + len(held) == 600
    assert not {one.text for one in learning} & {one.text for one in held}
    assert 0.5 / HELD_OUT < len(held) / 600 < 2 / HELD_OUT


def test_agreement_counts_where_experts_differ() -> None:
    def weigh(text: str, names: Sequence[str]) -> dict[str, float]:
        return {name: 1.0 if name == text else 0.5 for name in names}

    right, wrong = Example("a", {"a": 0.9, "b": 0.1}), Example("a", {"a": 0.1, "b": 0.9})
    assert agreement([right, wrong], weigh) == (0.5, 2)
    assert agreement([right, Example("a", {"a": 0.5, "b": 0.5})], weigh) == (1.0, 1), "they do not differ"
    assert agreement([Example("x", {"a": 0.9, "b": 0.9, "c": 0.1})], weigh) == (pytest.approx(2 / 3), 1), (
        "equal weights"
    )
    assert agreement([], weigh) == (0.0, 0)
