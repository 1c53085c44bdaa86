"""Progress bars on standard error: bytes, rate and time left, several at once; silent where nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ganglion.cli import output

Advance = Callable[[int, int], None]
"""(bytes done, bytes in all)"""


class Bars:
    """Several progress bars on standard error: drawn on a terminal, silent elsewhere. Safe from several threads."""

    def __init__(self) -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = output.notes()
        self._progress = Progress(
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, title: str, done: int, total: int, *, key: str) -> None:
        """Draw the bar `key` at `done` of `total` bytes."""
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(title, total=None)
        self._progress.update(self._tasks[key], description=title, completed=done, total=total or None)

    def say(self, text: str) -> None:
        """A line above the bars."""
        output.doing(text)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Advance]:
    """A bar on standard error; yields `advance(done_bytes, total_bytes)`."""
    with Bars() as bars:
        yield lambda done, total: bars.show(title, done, total, key=title)
    output.step(title)
