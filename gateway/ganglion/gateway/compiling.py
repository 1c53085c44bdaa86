"""Where grammars are compiled: a thread with a stack for long chains of rules, one grammar at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ganglion.wire.deep_thread import in_deep_thread
from ganglion.wire.errors import Exhausted, InvalidRequest
from ganglion.wire.limits import GRAMMAR_COMPILE_S

T = TypeVar("T")


class Compiler:
    """Runs functions that compile, in turn; what takes too long is left to itself, and its successors are refused."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running: Future[Any] | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result; raises what it raises, InvalidRequest (too long) or Exhausted (another one is)."""
        async with self._turn:
            # Nothing ends a thread; two would take two cores.
            if self._running is not None and not self._running.done():
                raise Exhausted("a grammar of another request is still being compiled; try again later")
            future = in_deep_thread(function, panicked=lambda error: RuntimeError(type(error).__name__))
            self._running = future
            try:
                return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), GRAMMAR_COMPILE_S)
            except TimeoutError:
                raise InvalidRequest(
                    f"the structure of the answer took more than {GRAMMAR_COMPILE_S:g} s to compile; make it simpler"
                ) from None
