"""A worker's process as its supervisor sees it: JSON lines, a counter file, and an end that leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from ganglion.agent import control
from ganglion.wire.rpc import tuned_environment

WORKER_MODULE: Final = "ganglion.agent.worker"
STOP_S: Final = 2.0  # between the end of standard input and SIGKILL
LINE_BYTES: Final = 1 << 20
_TAIL_BYTES: Final = 4096
_LINE_CHARACTERS: Final = 300

OnEvent = Callable[[control.Event], None]
OnExit = Callable[[int, str], None]


class WorkerProcess:
    """One worker in a process group of its own; `log` takes what it says on standard error."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, on_event: OnEvent, on_exit: OnExit) -> None:
        self._process = process
        self._log = log
        self._fault = ""
        self._watch = asyncio.create_task(self._follow(on_event, on_exit))

    @classmethod
    async def spawn(
        cls, load: control.Load, log: Path, on_event: OnEvent, on_exit: OnExit, *, module: str = WORKER_MODULE
    ) -> WorkerProcess:
        """Start `module` and tell it to load; `on_event` gets what it says, `on_exit` its code and its last line."""
        command = (sys.executable, "-m", "ganglion.agent.launch", str(os.getpid()), module)
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **tuned_environment()},
                process_group=0,
                limit=LINE_BYTES,
            )
        worker = cls(process, log, on_event, on_exit)
        worker.tell(load)
        return worker

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def tell(self, command: control.Command) -> None:
        """Pass a command on; a worker that is gone already says so by its exit."""
        if self._process.stdin is not None and not self._process.stdin.is_closing():
            with contextlib.suppress(ConnectionError):
                self._process.stdin.write(control.encode(command))

    async def stop(self, grace_s: float = STOP_S) -> None:
        """End standard input, then kill the group; returns when the worker is gone and was followed to its end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await asyncio.shield(self._watch)
        if not self._watch.done():
            self._kill()
        await asyncio.shield(self._watch)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _follow(self, on_event: OnEvent, on_exit: OnExit) -> None:
        output = self._process.stdout
        try:
            while output is not None and (line := await output.readline()):
                on_event(control.decode_event(line))
        except (msgspec.DecodeError, ValueError) as error:  # ValueError: a line beyond the limit
            self._fault = f"it said what is no event of a worker ({error})"
        if self._fault:
            self._kill()
        code = await self._process.wait()
        self._kill()  # whatever it started
        on_exit(code, self._fault or last_line(self._log))


def last_line(log: Path) -> str:
    """The last line of a log that is not empty, cut to a few hundred characters."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    return lines[-1][:_LINE_CHARACTERS] if lines else ""


def read_beat(path: Path) -> tuple[int, int, int, float]:
    """Steps, sessions, key-value bytes and longest run in seconds; zeros while the worker has not written them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    if len(content) != control.BEAT.size:
        return 0, 0, 0, 0.0
    steps, sessions, kv_bytes, longest_run_s = control.BEAT.unpack(content)
    return steps, sessions, kv_bytes, longest_run_s
