"""Running one command: asynchronous bodies, errors of the tree as one line and an exit code, Ctrl-C as 130."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any

import typer

from ganglion.cli import output
from ganglion.wire.errors import GanglionError, Internal

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DEBUG = "GANGLION_DEBUG"


def command(
    app: typer.Typer, name: str | None = None, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command of `app`; its body may be a coroutine function and may raise anything of the error tree."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def guarded(*args: Any, **kwargs: Any) -> None:
            raise typer.Exit(run(lambda: body(*args, **kwargs)))

        app.command(name, **options)(guarded)
        return body

    return register


def run(body: Callable[[], Any]) -> int:
    """Run `body` (and what it awaits) and return the exit code; what went wrong is said on standard error."""
    try:
        outcome = body()
        if inspect.iscoroutine(outcome):
            outcome = asyncio.run(outcome)
        return outcome if isinstance(outcome, int) else 0
    except GanglionError as error:
        _show_traceback()
        output.fail(error.message)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our answer has gone (`ganglion ps | head -1`): nothing more to say, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        _show_traceback()
        output.fail(
            f'{error.name} is not installed; install what this command needs with: pip install "ganglion-ai[all]"'
        )
        return Internal.exit_code
    except Exception as error:  # noqa: BLE001 - the last line of defence: a person never sees a traceback unasked
        _show_traceback()
        output.fail(f"internal error ({type(error).__name__}: {error}); `ganglion --debug …` shows where")
        return Internal.exit_code


async def until_stopped(main: Coroutine[Any, Any, None]) -> int:
    """Run `main` until it ends or a signal cancels it; 0 after SIGTERM, 130 after SIGINT."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(main)
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not received:
            raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    return INTERRUPTED if received and received[0] == signal.SIGINT else 0


def _show_traceback() -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()
