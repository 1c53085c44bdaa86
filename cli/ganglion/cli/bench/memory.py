"""What the workers of a deployment hold, of those that run on this machine under this root."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from ganglion.cli.shelf import agent_homes


def workers(root: Path, deployment: str, epoch: int) -> dict[str, int]:
    """Process ids of a deployment's workers by the name of their agent."""
    import psutil

    from ganglion.cli.serving import read_serving

    found = {}
    for home in agent_homes(root):
        serving = read_serving(home)
        if serving is None:
            continue
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(int(serving["pid"])).children(recursive=True):
                if _runs(child.pid, home / "run" / f"{deployment}-{epoch}"):
                    found[str(serving["name"])] = child.pid
    return found


def _runs(pid: int, folder: Path) -> bool:
    """Whether a process maps a file of an epoch's folder: its counters lie there."""
    try:
        maps = (Path("/proc") / str(pid) / "maps").read_text(errors="replace")
    except OSError:
        return False
    return f"{folder}/" in maps


def held(pid: int, proc: Path = Path("/proc")) -> dict[str, Any] | None:
    """Resident and anonymous bytes of a process; None where they cannot be read.

    Anonymous is what no file gives back: buffers, caches, copies. The rest of the resident ones are mapped weights.
    """
    try:
        text = (proc / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    sizes = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    if "Rss" not in sizes:
        return None
    return {"resident_bytes": sizes["Rss"], "anonymous_bytes": sizes.get("Anonymous")}
