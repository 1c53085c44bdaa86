"""Child processes of `ganglion up`: started, watched, restarted, and never left behind.

A child is told to stop by SIGTERM, and also by the end of its standard input, which comes without fail when its parent
dies however it dies (as between a supervisor and its workers).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ganglion.wire.errors import GanglionError, Unavailable

READY_S: Final = 60.0
GRACE_S: Final = 15.0
POLL_S: Final = 0.02
LOG_BYTES: Final = 8 << 20
TAIL_LINES: Final = 15
SAID: Final = "error: "  # how a command begins the one line about what went wrong


@dataclass
class RestartPolicy:
    """When a child that died is started again: after 1, 2, 4, … s, at most `most` times in `within_s` seconds."""

    most: int = 5
    within_s: float = 120.0
    deaths_s: deque[float] = field(default_factory=deque)

    def died(self, now_s: float) -> float | None:
        """Seconds to wait before the restart, or None: it dies too often, give up."""
        while self.deaths_s and now_s - self.deaths_s[0] > self.within_s:
            self.deaths_s.popleft()
        self.deaths_s.append(now_s)
        if len(self.deaths_s) > self.most:
            return None
        return float(2 ** (len(self.deaths_s) - 1))


class Child:
    """One role in a process of its own: `python -m ganglion.cli serve <role> …`, its log in `log`."""

    def __init__(self, role: str, arguments: Sequence[str], *, log: Path, ready_file: Path) -> None:
        self.role = role
        self.log = log
        self._arguments = arguments
        self._ready_file = ready_file
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it has one."""
        return self._process.pid if self._process else None

    async def start(self, *, timeout_s: float = READY_S) -> dict[str, Any]:
        """Start it; what its ready file says. Raises Unavailable with the log's last lines when it dies or is late."""
        self._ready_file.unlink(missing_ok=True)
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        command = [sys.executable, "-m", "ganglion.cli", "serve", self.role, *self._arguments]
        command += ["--ready-file", str(self._ready_file), "--with-parent"]
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C at the terminal reaches `up` alone, which stops its children in order.
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ready()
        except TimeoutError as error:
            raise Unavailable(f"the {self.role} was not ready within {timeout_s:.0f} s; {self.last_words()}") from error

    async def _ready(self) -> dict[str, Any]:
        assert self._process is not None  # noqa: S101 - start() made it
        while True:
            if self._process.returncode is not None:
                raise self._cause(self._process.returncode)
            with contextlib.suppress(FileNotFoundError):
                found: dict[str, Any] = json.loads(self._ready_file.read_bytes())
                return found
            await asyncio.sleep(POLL_S)

    def _cause(self, code: int) -> GanglionError:
        """Why it ended, in its own words and by its own exit code where it said so."""
        last = tail(self.log, 1).strip()
        if last.startswith(SAID):
            return error_with_exit_code(code)(f"{self.role}: {last.removeprefix(SAID)}")
        return Unavailable(f"the {self.role} ended with exit code {code}; {self.last_words()}")

    async def wait(self) -> int:
        """Until it ends; its exit code."""
        return await self._process.wait() if self._process else 0

    async def stop(self, *, grace_s: float = GRACE_S) -> None:
        """SIGTERM, then SIGKILL to its process group after `grace_s`; returns when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(grace_s):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        self._ready_file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """Where its log is, and the last lines of it."""
        return f"the end of its log {self.log}:\n{tail(self.log)}"


def error_with_exit_code(code: int) -> type[GanglionError]:
    """The class of the error tree that a process ended with; Unavailable when none has this exit code."""
    known = {kind.exit_code: kind for kind in reversed(GanglionError.__subclasses__())}
    return known.get(code, Unavailable)


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last `lines` lines of a log, indented; "" when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - (64 << 10)))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join("  " + line for line in text.splitlines()[-lines:])


def end_with_parent() -> None:
    """Watch standard input from a thread of its own: at its end ask this process to stop, then insist."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        if not ended.wait(GRACE_S):
            os._exit(1)

    ended = threading.Event()
    threading.Thread(target=watch, name="parent", daemon=True).start()
