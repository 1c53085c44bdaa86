"""The worker's counters in a small mapped file, and how long a step may take: for the supervisor's heartbeat."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final

from ganglion.agent.control import BEAT

_STREAM_BYTES_PER_S: Final = 0.5e9  # until the first step is measured: slower than any machine that is of use
_MARGIN: Final = 4.0
_LEAST_S: Final = 1.0


class LongestRun:
    """How long a step may take, from what steps took before: a pure core.

    Counted by row, which is too much for many rows; the slowest seen lately is announced, with a margin.
    """

    def __init__(self, weights_bytes: int) -> None:
        self._row_s = weights_bytes / _STREAM_BYTES_PER_S
        self._measured = False

    def announce(self, rows: int) -> float:
        """Seconds that a step of `rows` rows may take."""
        return _LEAST_S + _MARGIN * self._row_s * rows

    def finished(self, rows: int, took_s: float) -> None:
        """A step took so long; the estimate falls slowly and rises at once."""
        per_row = took_s / rows
        self._row_s = max(per_row, 0.99 * self._row_s) if self._measured else per_row
        self._measured = True


class Beat:
    """Writes the file at `path`; a write costs about a microsecond and no system call."""

    def __init__(self, path: Path) -> None:
        with path.open("w+b") as file:
            file.write(bytes(BEAT.size))
            file.flush()
            self._map = mmap.mmap(file.fileno(), BEAT.size)
        self._steps = 0

    def begin(self, longest_run_s: float, sessions: int, kv_bytes: int) -> None:
        """A step begins."""
        BEAT.pack_into(self._map, 0, self._steps, sessions, kv_bytes, longest_run_s)

    def end(self, sessions: int, kv_bytes: int) -> None:
        """The step is done."""
        self._steps += 1
        BEAT.pack_into(self._map, 0, self._steps, sessions, kv_bytes, 0.0)

    def close(self) -> None:
        """Unmap; the file is the supervisor's."""
        self._map.close()
