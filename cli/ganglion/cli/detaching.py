"""`up --detach` and `down`: the same `up` in a process of its own, found again by its home."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import psutil

from ganglion.cli import output
from ganglion.cli.owner import make_root, owner_home
from ganglion.cli.processes import POLL_S, tail
from ganglion.cli.serving import read_serving
from ganglion.cli.settings import Settings
from ganglion.cli.stack import LOGS
from ganglion.cli.upping import refuse_second
from ganglion.wire.errors import NotFound, Unavailable
from ganglion.wire.home import make_private_folder

START_S: Final = 300.0
STOP_S: Final = 60.0


async def start_detached(root: Path, chosen: Settings, *, name: str, demo: bool, mdns: bool) -> None:
    """Start `up` in the background and show what it says until it is ready. Raises Unavailable when it ends instead."""
    refuse_second(root)
    log = make_private_folder(make_root(root) / LOGS) / "up.log"
    command = [sys.executable, "-m", "ganglion.cli", "up", "--home", str(root), "--name", name]
    command += [
        f"--{key.replace('_', '-')}={value}"
        for key, value in chosen.model_dump(exclude={"piece_port"}).items()
        if value is not None
    ]
    command += ["--demo" if demo else "--no-demo", "--mdns" if mdns else "--no-mdns"]
    with log.open("wb") as out:
        # It outlives this process on purpose; `down` finds it by the home's serving.json.
        process = subprocess.Popen(  # noqa: ASYNC220 - it is started, not waited for
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    shown = 0
    deadline_s = time.monotonic() + START_S
    while True:
        shown = _show_from(log, shown)
        running = read_serving(owner_home(root))
        if running is not None and running.get("ready"):
            _show_from(log, shown)
            output.step(f"up in the background as process {running['pid']}; its log is {log}; `ganglion down` ends it")
            return
        if process.poll() is not None:
            _show_from(log, shown)
            raise Unavailable(f"`ganglion up` ended with exit code {process.returncode}; its log is {log}")
        if time.monotonic() > deadline_s:
            process.terminate()
            raise Unavailable(
                f"`ganglion up` was not ready within {START_S:.0f} s; the end of its log {log}:\n{tail(log)}"
            )
        await asyncio.sleep(POLL_S)


async def stop_running(root: Path) -> None:
    """End the `up` of `root` and wait until it is gone. Raises NotFound (there is none), Unavailable (it stays)."""
    running = read_serving(owner_home(root))
    if running is None:
        raise NotFound(f"nothing is up on {root}; was it started with another --home?")
    process = psutil.Process(int(running["pid"]))
    process.terminate()
    try:
        await asyncio.to_thread(process.wait, STOP_S)
    except psutil.TimeoutExpired as error:
        raise Unavailable(f"process {process.pid} did not end within {STOP_S:.0f} s; see {root / LOGS}") from error
    output.step(f"ended process {process.pid}")


def _show_from(log: Path, position: int) -> int:
    """Pass on whole lines of the log from `position` on; the new position."""
    with log.open("rb") as file:
        file.seek(position)
        text = file.read()
    end = text.rfind(b"\n") + 1
    for line in text[:end].decode("utf-8", "replace").splitlines():
        output.say(line)
    return position + end
