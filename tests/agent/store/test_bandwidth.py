"""The token bucket against counting: what passed by any moment is within the burst and the rate since any other."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.agent.store.bandwidth import SMALLEST_CHUNK_BYTES, Throttle, TokenBucket
from ganglion.wire.limits import PIECE_CHUNK_BYTES


class VirtualTime:
    """A clock that only sleeping moves; what passed is noted with the moment it was released."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.passed: list[tuple[float, int]] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, wait_s: float) -> None:
        until_s = self.now_s + wait_s
        await asyncio.sleep(0)
        self.now_s = max(self.now_s, until_s)

    def check(self, bytes_per_s: int, burst_bytes: int) -> None:
        """Every stretch of what passed is within the limit: the definition, by counting."""
        for first, last in itertools.combinations_with_replacement(range(len(self.passed)), 2):
            stretch = self.passed[first : last + 1]
            seconds = stretch[-1][0] - stretch[0][0]
            largest = max(size for _, size in stretch)
            assert sum(size for _, size in stretch) <= burst_bytes + largest + bytes_per_s * seconds + 1


@given(
    bytes_per_s=st.integers(1, 10_000),
    burst_bytes=st.integers(0, 5_000),
    asked=st.lists(st.tuples(st.floats(0, 10), st.integers(0, 8_000)), min_size=1, max_size=12),
)
def test_what_passes_is_never_more_than_the_limit(bytes_per_s, burst_bytes, asked):
    time = VirtualTime()
    bucket = TokenBucket(bytes_per_s, burst_bytes, time.now_s)
    at_s = time.now_s
    for pause_s, size in asked:
        at_s += pause_s
        time.passed.append((at_s + bucket.take(size, at_s), size))
    time.check(bytes_per_s, burst_bytes)
    assert all(later >= sooner - 1e-9 for (sooner, _), (later, _) in itertools.pairwise(time.passed))


def test_what_is_not_used_does_not_pile_up_and_a_debt_is_paid():
    bucket = TokenBucket(100, 50, 0.0)
    assert bucket.take(50, 1000.0) == 0.0
    assert bucket.take(200, 1000.0) == pytest.approx(2.0)
    assert bucket.take(100, 1000.0) == pytest.approx(3.0)
    assert bucket.take(0, 1002.0) == pytest.approx(1.0)
    assert bucket.take(10, 999.0) == pytest.approx(1.1)  # a clock that is read late


async def test_streams_share_one_limit():
    time = VirtualTime()
    throttle = Throttle(1 << 20, clock=time.clock, sleep=time.sleep)

    async def stream() -> None:
        for _ in range(20):
            await throttle.admit(throttle.chunk_bytes)
            time.passed.append((time.now_s, throttle.chunk_bytes))

    await asyncio.gather(*(stream() for _ in range(3)))
    assert len(time.passed) == 60
    time.check(1 << 20, throttle.chunk_bytes)
    assert time.now_s - 100 >= 59 * throttle.chunk_bytes / (1 << 20) - 1e-6


def test_chunks_follow_the_limit():
    assert Throttle().chunk_bytes == PIECE_CHUNK_BYTES
    assert Throttle(1 << 40).chunk_bytes == PIECE_CHUNK_BYTES
    assert Throttle(1 << 20).chunk_bytes == 1 << 16
    assert Throttle(1 << 10).chunk_bytes == SMALLEST_CHUNK_BYTES
