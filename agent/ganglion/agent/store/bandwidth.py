"""A limit on bytes per second: a token bucket that knows no clock, and its thin driver."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from ganglion.wire.limits import PIECE_CHUNK_BYTES

CHUNKS_PER_S: Final = 16  # a limited stream is cut this finely, so that several streams share without long silences
SMALLEST_CHUNK_BYTES: Final = 4 << 10


class TokenBucket:
    """`burst_bytes` at once, then `bytes_per_s`. Pure: time is a parameter, in seconds of any steady clock.

    Who takes more than there is goes into debt and is told how long to wait, so takers are served in order of asking:
    what was released by any moment is at most `burst_bytes` plus `bytes_per_s` times the seconds since the start.
    """

    def __init__(self, bytes_per_s: int, burst_bytes: int, now_s: float) -> None:
        self._rate = bytes_per_s
        self._burst = burst_bytes
        self._level = float(burst_bytes)
        self._at_s = now_s

    def take(self, size_bytes: int, now_s: float) -> float:
        """Take `size_bytes`; seconds to wait before using them."""
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(self._at_s, now_s)
        self._level = min(self._burst, self._level + passed_s * self._rate) - size_bytes
        return max(0.0, -self._level / self._rate)


class Throttle:
    """Keeps all streams of one direction together within `bytes_per_s` (0: no limit)."""

    def __init__(
        self,
        bytes_per_s: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        chunk_bytes = PIECE_CHUNK_BYTES
        if bytes_per_s:
            chunk_bytes = min(chunk_bytes, max(SMALLEST_CHUNK_BYTES, bytes_per_s // CHUNKS_PER_S))
        self.chunk_bytes = chunk_bytes
        """The most to pass at once."""
        self._clock, self._sleep = clock, sleep
        self._bucket = TokenBucket(bytes_per_s, chunk_bytes, clock()) if bytes_per_s else None

    async def admit(self, size_bytes: int) -> None:
        """Return when `size_bytes` may pass."""
        if self._bucket is not None:
            wait_s = self._bucket.take(size_bytes, self._clock())
            if wait_s > 0:
                await self._sleep(wait_s)
