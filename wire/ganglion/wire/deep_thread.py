"""A thread with a stack for what recurses deeply: compiling a grammar goes along chains of rules and references."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

STACK_BYTES: Final = 256 << 20  # some kilobytes a link of a chain; untouched stack takes no memory

T = TypeVar("T")


def in_deep_thread(function: Callable[[], T], *, panicked: Callable[[BaseException], Exception]) -> Future[T]:
    """Run `function` in a thread of its own, which is not waited for at the end; raises RuntimeError without one.

    panicked: what is raised instead of an error that is none of Exception, as native libraries' panics are.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may leave; the thread goes on

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - whoever waits gets it
            future.set_exception(panicked(error))

    before = threading.stack_size(STACK_BYTES)
    try:
        threading.Thread(target=run, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(before)
    return future
