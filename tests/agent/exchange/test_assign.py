"""Which device runs what: never more devices a row than the best of all ways, and balanced where there is a choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.exchange import assign as assigning
from ganglion.agent.exchange.assign import Holders, assign, speeds_of
from ganglion.wire.errors import InvalidDocument
from ganglion.wire.nouns import Range, Share, Stage


@st.composite
def cases(draw):
    devices, experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    masks = [draw(st.integers(1, 2**devices - 1)) for _ in range(experts)]
    held = [[expert for expert in range(experts) if masks[expert] >> rank & 1] for rank in range(devices)]
    k = draw(st.integers(1, min(experts, 4)))
    rows = [draw(st.permutations(range(experts)))[:k] for _ in range(draw(st.integers(1, 5)))]
    speeds = [draw(st.floats(0.1, 10)) for _ in range(devices)]
    return held, experts, np.array(rows, np.int64), speeds


def fewest(row, held) -> int:
    """The dumb way: every device for every expert."""
    choices = [[rank for rank, numbers in enumerate(held) if expert in numbers] for expert in row]
    return min(len(set(ranks) - {0}) for ranks in product(*choices))


@settings(max_examples=120, deadline=None)
@given(cases())
def test_a_row_touches_as_few_devices_as_can_be(case):
    held, experts, chosen, speeds = case
    ranks = assign(chosen, Holders.of(held, experts), speeds)
    assert ranks.shape == chosen.shape
    for row, there in zip(chosen.tolist(), ranks.tolist(), strict=True):
        assert all(expert in held[rank] for expert, rank in zip(row, there, strict=True))
        assert len(set(there) - {0}) == fewest(row, held)
    assert (assign(chosen, Holders.of(held, experts), speeds) == ranks).all()


def test_of_many_devices_a_small_set_is_found(monkeypatch):
    monkeypatch.setattr(assigning, "_TRIED", 1)
    assigning._fewest.cache_clear()
    held = [[], [0, 1], [1, 2], [0, 1, 2], [2]]
    assert assign(np.array([[0, 1, 2]]), Holders.of(held, 3), [1.0] * 5).tolist() == [[3, 3, 3]]
    assigning._fewest.cache_clear()


def test_replicas_share_the_rows_of_a_step_by_speed():
    """Two experts that both followers hold, three rows each: a device that is three times as fast runs most of them."""
    held = [[], [0, 1, 2, 3], [0, 1, 2, 3]]
    chosen = np.array([[0], [1], [2], [3]])
    even = assign(chosen, Holders.of(held, 4), [1.0, 1.0, 1.0])
    assert sorted(even.ravel().tolist()) == [1, 1, 2, 2]
    uneven = assign(chosen, Holders.of(held, 4), [1.0, 3.0, 1.0])
    assert sorted(uneven.ravel().tolist()) == [1, 1, 1, 2]


def test_an_expert_whose_weights_are_read_takes_more_rows():
    held = [[0], [0]]
    assert assign(np.zeros((5, 1), np.int64), Holders.of(held, 1), [1.0, 1.0]).tolist() == [[0]] * 5


def test_a_device_that_a_row_touches_anyway_relieves_the_lead():
    """Experts 1 and 2 lie on both, expert 0 on the follower alone: the row travels, and the lead runs one of them."""
    held = [[1, 2, 3], [0, 1, 2]]
    assert sorted(assign(np.array([[0, 1, 2, 3]]), Holders.of(held, 4), [1.0, 1.0])[0].tolist()) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("held", "message"), [([[0], [2]], "expert 1 .* lies on no device"), ([[0, 1], [3]], "rank 1 holds expert 3")]
)
def test_a_plan_that_leaves_experts_out(held, message):
    with pytest.raises(InvalidDocument, match=message):
        Holders.of(held, 3)


def test_speeds_are_what_the_plan_lays_there():
    none = Range(0, 0)
    shares = [
        Share(device=letter * 26, heads=none, columns=none, vocab=none, experts=experts)
        for letter, experts in (("a", ((0, 1, 2), ())), ("b", ((2, 3), ())), ("c", ((), ())))
    ]
    stage = Stage(layers=Range(0, 2), shares=tuple(shares), topology="star")
    assert speeds_of(stage) == (2.5, 1.5, assigning.AGAIN)
