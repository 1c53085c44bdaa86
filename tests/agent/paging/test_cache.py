"""What the cache decides, without any file: against dumb rules, the offline optimum, and at random."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paging_reference import TRACE, accesses, belady, cached, least_recent, made_up

from ganglion.agent.paging.cache import ABSENT, READING, RESIDENT, ExpertCache
from ganglion.wire.errors import Internal, InvalidRequest


def expected(cache: ExpertCache, **layers_until) -> np.ndarray:
    found = np.full(cache.state.shape, np.inf, np.float32)
    for key, value in layers_until.items():
        layer, expert = key[1:].split("_")
        found[int(layer), int(expert)] = value
    return found


def fill(cache: ExpertCache, layer: int, experts: list[int]) -> None:
    cache.arrive(layer, experts)
    while (read := cache.next_read(ahead=False)) is not None:
        cache.finished(read.key)
    cache.ran(cache.ready())


def test_what_is_awaited_is_read_hottest_first_and_before_what_is_foretold() -> None:
    cache = ExpertCache(2, 4, 8)
    cache.expect(expected(cache, _1_0=1))
    cache.arrive(0, [3, 1])
    reads = [cache.next_read() for _ in range(4)]
    assert [read.key for read in reads[:3]] == [(0, 3), (0, 1), (1, 0)]
    assert [read.awaited for read in reads[:3]] == [True, True, False]
    assert reads[3] is None
    assert cache.ready() == []
    cache.finished((0, 1))
    assert cache.ready() == [1]
    assert cache.awaited() == [3]


def test_what_is_expected_last_is_pushed_out_and_what_runs_is_not() -> None:
    cache = ExpertCache(2, 4, 3)
    fill(cache, 0, [0, 1])
    cache.arrive(1, [0, 1])
    cache.expect(expected(cache, _0_0=2, _0_1=9, _1_0=50, _1_1=50))
    first = cache.next_read()
    assert (first.key, first.evicted) == ((1, 0), None)
    cache.finished((1, 0))
    second = cache.next_read()
    assert (second.key, second.evicted) == ((1, 1), (0, 1))
    assert second.slot != first.slot


def test_a_guess_does_not_push_out_what_is_expected_before_it() -> None:
    cache = ExpertCache(2, 4, 2)
    fill(cache, 0, [0, 1])
    cache.expect(expected(cache, _0_0=3, _0_1=4, _1_2=3.5))
    assert cache.next_read() is None
    cache.expect(expected(cache, _0_0=3, _0_1=9, _1_2=3.5))
    read = cache.next_read()
    assert (read.key, read.evicted, read.awaited) == ((1, 2), (0, 1), False)
    # A guess that was not begun is forgotten once another looks better: there is no queue to take it from.
    cache.failed(read.key)
    cache.expect(expected(cache, _0_0=3, _1_3=1))
    assert cache.next_read().key == (1, 3)


def test_more_experts_than_slots_take_turns() -> None:
    cache = ExpertCache(1, 8, 2)
    cache.arrive(0, list(range(8)))
    order = []
    while cache.awaited() or cache.ready():
        while (read := cache.next_read()) is not None:
            cache.finished(read.key)
        ready = cache.ready()
        assert 1 <= len(ready) <= 2
        order += ready
        cache.ran(ready)
    assert order == list(range(8))


def test_a_step_given_up_leaves_nothing_pinned() -> None:
    cache = ExpertCache(1, 4, 2)
    cache.arrive(0, [0, 1])
    with pytest.raises(Internal, match="have not run"):
        cache.arrive(0, [2])
    cache.leave()
    fill(cache, 0, [2, 3])
    assert cache.resident == 2


def test_no_slot_is_refused_with_its_knob() -> None:
    with pytest.raises(InvalidRequest, match="--expert-memory"):
        ExpertCache(1, 4, 0)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_slots_and_pins_hold_whatever_happens(seed: int, slots: int) -> None:
    rng = np.random.default_rng(seed)
    cache = ExpertCache(3, 6, slots)
    reading: list[tuple[int, int]] = []
    for step in range(60):
        layer = step % 3
        cache.expect(rng.random((3, 6)).astype(np.float32) * 30)
        cache.arrive(layer, list(rng.permutation(6)[: rng.integers(1, 5)]))
        while cache.ready() or cache.awaited():
            if (read := cache.next_read(ahead=bool(rng.integers(2)))) is not None:
                assert cache.state[read.key] == READING
                if read.evicted is not None:
                    assert cache.state[read.evicted] == ABSENT
                reading.append(read.key)
            if reading and (read is None or rng.integers(2)):
                key = reading.pop(int(rng.integers(len(reading))))
                (cache.finished if rng.random() < 0.8 else cache.failed)(key)
            ready = cache.ready()
            assert all(cache.state[layer, one] == RESIDENT for one in ready)
            if ready and rng.integers(2):
                cache.ran(ready[:1])
            held = [cache.slot_of(key) for key in np.ndindex(3, 6) if cache.slot_of(key) >= 0]
            assert len(held) == len(set(held)) <= slots
            assert ((cache.state != ABSENT).sum()) == len(held)


def brute(routes: np.ndarray, slots: int) -> int:
    """Fewest reads by trying every choice of what to push out."""
    visits = [{(layer, one) for one in experts} for layer, experts in accesses(routes)]
    best: dict[frozenset, int] = {frozenset(): 0}
    for needed in visits:
        after: dict[frozenset, int] = {}
        for held, reads in best.items():
            missing = needed - held
            spare = sorted(held - needed)
            surplus = max(0, len(held | needed) - slots)
            for out in _subsets(spare, surplus):
                state = (held | needed) - out
                cost = reads + len(missing)
                after[state] = min(cost, after.get(state, cost))
        best = after
    return min(best.values())


def _subsets(items: list, size: int) -> list[frozenset]:
    if size == 0:
        return [frozenset()]
    return [frozenset((one, *rest)) for at, one in enumerate(items) for rest in _subsets(items[at + 1 :], size - 1)]


@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_is_the_optimum(seed: int) -> None:
    routes = np.random.default_rng(seed).integers(0, 4, (6, 2, 1))
    assert belady(routes, 3) == brute(routes, 3)


def trace() -> tuple[np.ndarray, int]:
    if TRACE.exists():
        with np.load(TRACE) as data:
            return data["routes"][:250].astype(np.int64), int(data["experts"])
    return made_up(250, 6, 16), 16


def test_on_a_trace_it_lies_between_the_least_recently_used_and_the_optimum() -> None:
    routes, experts = trace()
    slots = int(0.4 * routes.shape[1] * experts)
    best, dumb = belady(routes, slots), least_recent(routes, slots)
    misses, reads = cached(routes, experts, slots)
    assert best <= reads == misses < dumb
    fewer, more = cached(routes, experts, slots, ahead=1)
    assert fewer < misses
    assert more > misses
