"""Who waits for the state to change: one counter, any number of waiters, none of which can miss the last change."""

from __future__ import annotations

import asyncio


class Changes:
    """A version that rises with every change. Used from one event loop."""

    def __init__(self) -> None:
        self.version = 0
        self._waiters: set[asyncio.Future[None]] = set()

    def mark(self) -> None:
        """Something changed."""
        self.version += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def after(self, version: int) -> int:
        """Wait until the version is above `version`; returns it."""
        while self.version <= version:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self.version
