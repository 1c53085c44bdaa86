"""The exchange's pure core against a dumb simulation of messages."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.agent.exchange.plan import contributors, lane_pairs, plan_exchange, stage_ranks
from ganglion.wire.nouns import NumericClass, Plan, Range, Share, Stage


@given(st.data())
@pytest.mark.parametrize("topology", ["mesh", "star"])
def test_everyone_gets_the_sum_of_all_contributors(topology, data):
    ranks = data.draw(st.sampled_from([(0,), (0, 1), (0, 1, 2), (2, 3, 4, 5)]))
    giving = tuple(rank for rank in ranks if data.draw(st.booleans())) or (data.draw(st.sampled_from(ranks)),)
    wires: dict[tuple[int, int], deque[list[int]]] = {(a, b): deque() for a in ranks for b in ranks}
    parts = {rank: plan_exchange(ranks, giving, topology, rank) for rank in ranks}
    sums: dict[int, list[int]] = {}
    for rank in ranks:
        for other in parts[rank].send_own_to:
            wires[rank, other].append([rank])
    for rank in ranks:  # the hub of a star is the first rank, so its sum is there when the others look
        part = parts[rank]
        if part.take_sum_from is None:
            sums[rank] = [one for who in part.add for one in ([rank] if who == rank else wires[who, rank].popleft())]
        else:
            sums[rank] = wires[part.take_sum_from, rank].popleft()
        for other in part.send_sum_to:
            wires[rank, other].append(sums[rank])
    assert all(sums[rank] == list(giving) for rank in ranks)
    assert not any(wires.values())


def stage(layers: tuple[int, int], devices: str, topology: str, heads: dict[str, int] | None = None) -> Stage:
    shares, at = [], 0
    for device in devices:
        count = (heads or {}).get(device, 1)
        shares.append(
            Share(device=device * 26, heads=Range(at, at + count), columns=Range(at, at + 1), vocab=Range(0, 0))
        )
        at += count
    return Stage(layers=Range(*layers), shares=tuple(shares), topology=topology)


def plan(*stages: Stage) -> Plan:
    return Plan(
        manifest_digest="0" * 64,
        numeric_class=NumericClass(format="fp32", block=0, exact=True),
        context=64,
        sessions=1,
        kv_tokens=4 * 8192,
        chunk=8,
        stages=stages,
        threads={},
    )


def test_lanes_that_a_plan_needs():
    assert lane_pairs(plan(stage((0, 2), "a", "mesh"))) == frozenset()
    assert lane_pairs(plan(stage((0, 2), "abc", "mesh"))) == {(0, 1), (0, 2), (1, 2)}
    assert lane_pairs(plan(stage((0, 2), "abc", "star"))) == {(0, 1), (0, 2)}
    two = plan(stage((0, 1), "ab", "mesh"), stage((1, 2), "cde", "star"))
    assert stage_ranks(two) == ((0, 1), (2, 3, 4))
    assert lane_pairs(two) == {(0, 1), (0, 2), (0, 3), (0, 4), (2, 3), (2, 4)}
    three = plan(stage((0, 1), "a", "mesh"), stage((1, 2), "bc", "mesh"), stage((2, 3), "de", "star"))
    assert lane_pairs(three) == {(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (3, 4), (1, 3), (1, 4)}


def test_an_empty_share_does_not_contribute():
    one = stage((0, 2), "abc", "mesh", heads={"b": 0})
    assert contributors(one, (3, 4, 5), "heads") == (3, 5)
    assert contributors(one, (3, 4, 5), "columns") == (3, 4, 5)
