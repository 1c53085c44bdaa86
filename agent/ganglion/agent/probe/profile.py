"""The device profile: figures measured once and kept, limits read at every start."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec

from ganglion.agent.probe.machine import Limits, host_id, kernel_family, system, usable
from ganglion.agent.probe.measure import Measured
from ganglion.agent.probe.shapes import SHAPES
from ganglion.wire.errors import InvalidRequest, Unavailable
from ganglion.wire.hello import distribution_version
from ganglion.wire.home import write_secret
from ganglion.wire.nouns import BATCH_ROWS, PREFILL_ROWS, DeviceProfile

log = logging.getLogger(__name__)

CACHE_FILE: Final = "probe.json"
PROBE_S: Final = 60.0  # a probe takes 1 to 2 s; a machine that is busy beyond measure gets an error, not a hang
LARGE_BYTES: Final = 2 << 30  # of available memory, from which on the large products are timed
BUDGET_OF_TOTAL: Final = 0.75
BUDGET_OF_AVAILABLE: Final = 0.9
_STDERR_CHARACTERS: Final = 300


class _Kept(msgspec.Struct, frozen=True):
    key: str
    measured: Measured


async def probe_device(
    home: Path, *, store: Path, threads: int = 0, memory_budget_bytes: int = 0, fresh: bool = False
) -> DeviceProfile:
    """This device's profile; figures come from `home`/probe.json unless `fresh` or the machine or software changed.

    `threads`, `memory_budget_bytes`: 0 leaves the choice to the limits of this process. Raises InvalidRequest for a
    figure beyond the machine, Unavailable when the measuring process fails.
    """
    limits = usable(threads)
    cores = os.cpu_count() or 1
    if not 1 <= limits.threads <= max(cores, 1):
        raise InvalidRequest(f"threads: {threads} asked, this machine has {cores}", param="threads")
    if memory_budget_bytes > limits.memory_bytes:
        raise InvalidRequest(
            f"memory: a budget of {memory_budget_bytes} bytes asked, {limits.memory_bytes} may be used here",
            param="memory",
        )
    size = "large" if limits.available_bytes >= LARGE_BYTES else "small"
    key = _key(limits, size)
    kept = None if fresh else _read(home / CACHE_FILE, key)
    if kept is None:
        kept = await _measure(limits.threads, size, store)
        write_secret(home / CACHE_FILE, msgspec.json.encode(_Kept(key, kept)))
    budget = min(BUDGET_OF_TOTAL * limits.memory_bytes, BUDGET_OF_AVAILABLE * limits.available_bytes)
    return DeviceProfile(
        host_id=host_id(),
        hostname=socket.gethostname()[:128],
        system=system(),
        kernel_family=kernel_family(),
        cores=cores,
        threads=limits.threads,
        memory_bytes=limits.machine_bytes,
        memory_budget_bytes=memory_budget_bytes or int(budget),
        disk_free_bytes=shutil.disk_usage(store).free,
        disk_read_bytes_per_s=kept.disk_read_bytes_per_s,
        memory_bytes_per_s=kept.memory_bytes_per_s,
        rates=kept.rates,
        providers=kept.providers,
        version=distribution_version(),
    )


def _key(limits: Limits, size: str) -> str:
    formats = ",".join(sorted({shape.name for shape in SHAPES}))
    sizes = f"{size} {BATCH_ROWS} {PREFILL_ROWS}"
    marks = (
        distribution_version(),
        kernel_family(),
        system(),
        str(os.cpu_count()),
        str(limits.threads),
        sizes,
        formats,
    )
    return hashlib.sha256("\n".join(marks).encode()).hexdigest()


def _read(path: Path, key: str) -> Measured | None:
    """Figures kept earlier, if of this machine and this software; a file that does not parse counts as none."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
    return kept.measured if kept.key == key else None


async def _measure(threads: int, size: str, store: Path) -> Measured:
    command = (sys.executable, "-m", "ganglion.agent.launch", str(os.getpid()), "ganglion.agent.probe")
    process = await asyncio.create_subprocess_exec(
        *(*command, str(threads), size, str(store)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(PROBE_S):
            output, errors = await process.communicate()
    except TimeoutError:
        raise Unavailable(f"the probe did not finish within {PROBE_S:.0f} s: is this machine overloaded?") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        lines = errors.decode(errors="replace").strip().splitlines()
        said = lines[-1][:_STDERR_CHARACTERS] if lines else "it said nothing"
        raise Unavailable(f"the probe ended with code {process.returncode}: {said}")
    return msgspec.json.decode(output, type=Measured)
