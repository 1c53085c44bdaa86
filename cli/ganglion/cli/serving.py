"""`serving.json`: what a role that is running tells the commands on the same machine (its pid and ports; no secret)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ganglion.wire.home import write_secret

FILE = "serving.json"
Announce = Callable[[dict[str, Any]], None]


def read_serving(home: Path) -> dict[str, Any] | None:
    """What the role of this home says of itself; None when it does not run."""
    try:
        found: dict[str, Any] = json.loads((home / FILE).read_bytes())
        process = psutil.Process(int(found["pid"]))
        # A process id is used again after its process; together with the start it is not.
        running = process.is_running() and abs(process.create_time() - float(found["started_unix_s"])) < 1.0
    except (FileNotFoundError, NotADirectoryError, psutil.NoSuchProcess, ValueError, KeyError, TypeError):
        return None
    return found if running else None


@contextlib.contextmanager
def serving(home: Path, *, ready_file: Path | None = None) -> Iterator[Announce]:
    """Yields `announce(about)`, which writes to this home and to `ready_file`; both are gone after the block."""
    process = psutil.Process()
    paths = [home / FILE, *([ready_file] if ready_file else [])]

    def announce(about: dict[str, Any]) -> None:
        document = {"pid": process.pid, "started_unix_s": process.create_time(), **about}
        for path in paths:
            write_secret(path, json.dumps(document).encode())

    try:
        yield announce
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
