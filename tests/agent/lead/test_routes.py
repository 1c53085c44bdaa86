"""Routes are counted in bounded memory, and told only in sums over enough tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ganglion.agent.lead.routes import KEPT_SETS, REPORTED_TOKENS, RouteRecorder
from ganglion.wire.limits import ROUTE_SETS, ROUTED_TOKENS


def test_counts_are_those_of_a_dumb_count_in_any_order_and_batch():
    random = np.random.default_rng(1)
    recorder, expected = RouteRecorder("ab" * 32, 3), [Counter(), Counter()]
    left = ROUTED_TOKENS
    while left:
        rows = min(left, int(random.integers(1, 40)))
        left -= rows
        for layer in (0, 1):
            chosen = np.stack([random.choice(8, 2, replace=False) for _ in range(rows)])
            recorder.record(layer, chosen)
            expected[layer].update(tuple(sorted(map(int, row))) for row in chosen)
    assert recorder.due
    report = recorder.take()
    assert report is not None
    assert (report.manifest_digest, report.tokens, len(report.layers)) == ("ab" * 32, ROUTED_TOKENS, 3)
    for told, counts in zip(report.layers, expected, strict=False):
        assert {tuple(one.experts): one.tokens for one in told.sets} == counts
        assert [one.tokens for one in told.sets] == sorted((one.tokens for one in told.sets), reverse=True)
        assert told.others == 0
    assert not report.layers[2].sets


def test_nothing_is_told_of_few_tokens_and_nothing_twice():
    recorder = RouteRecorder("ab" * 32, 1)
    one = np.array([[3, 1]])
    for _ in range(ROUTED_TOKENS - 1):
        recorder.record(0, one)
    assert not recorder.due
    assert recorder.take() is None
    recorder.record(0, one)
    report = recorder.take()
    assert report is not None
    assert report.layers[0].sets[0].tokens == ROUTED_TOKENS
    assert recorder.take() is None
    recorder.record(0, np.repeat(one, REPORTED_TOKENS - 1, axis=0))
    assert not recorder.due  # later ones are rarer
    recorder.record(0, one)
    assert recorder.due


def test_memory_is_bounded_and_no_token_is_lost_or_counted_twice():
    random = np.random.default_rng(2)
    recorder = RouteRecorder("ab" * 32, 1)
    rare = np.sort(np.stack([random.choice(300, 4, replace=False) for _ in range(5 * KEPT_SETS)]), axis=1)
    often = np.tile(np.array([[7, 8, 9, 10]]), (1000, 1))
    chosen = random.permutation(np.concatenate([rare, often]))
    for start in range(0, len(chosen), 50):
        recorder.record(0, chosen[start : start + 50])
        assert len(recorder._counts[0]) <= 2 * KEPT_SETS
    report = recorder.take()
    assert report is not None
    told = report.layers[0]
    assert len(told.sets) == ROUTE_SETS
    assert tuple(told.sets[0].experts) == (7, 8, 9, 10)
    assert told.sets[0].tokens == 1000
    assert told.others + sum(one.tokens for one in told.sets) == report.tokens == len(chosen)
