"""Where grammars are compiled: a thread with a stack for long chains of rules, one grammar at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from ganglion.wire.errors import Exhausted, InvalidRequest
from ganglion.wire.limits import GRAMMAR_COMPILE_S

# llguidance recurses along chains of rules and of references; untouched stack takes no memory.
STACK_BYTES: Final = 256 << 20

T = TypeVar("T")


class Compiler:
    """Runs functions that compile, in turn; what takes too long is left to itself, and its successors are refused."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._running: Future[Any] | None = None

    async def run(self, function: Callable[[], T]) -> T:
        """The function's result; raises what it raises, InvalidRequest (too long) or Exhausted (another one is)."""
        async with self._turn:
            if (
                self._running is not None and not self._running.done()
            ):  # nothing ends a thread; two would take two cores
                raise Exhausted("a grammar of another request is still being compiled; try again later")
            future = _in_thread(function)
            self._running = future
            try:
                return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(future)), GRAMMAR_COMPILE_S)
            except TimeoutError:
                raise InvalidRequest(
                    f"the structure of the answer took more than {GRAMMAR_COMPILE_S:g} s to compile; make it simpler"
                ) from None


def _in_thread(function: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may leave; the thread goes on

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  (whoever waits gets it; a panic of the library is no Exception)
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))

    before = threading.stack_size(STACK_BYTES)
    try:
        threading.Thread(target=run, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(before)
    return future
