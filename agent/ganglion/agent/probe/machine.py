"""What the operating system says: cores, memory, limits of a container, which machine this is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

# What decides which kernels ONNX Runtime picks, and so the numbers (D17).
_FLAGS: Final = (
    *("avx", "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
_SC_LEVEL2_CACHE_SIZE: Final = 191  # of glibc; Python's os.sysconf_names lacks it
_CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Limits:
    """What this process may use of the machine."""

    threads: int
    machine_bytes: int
    memory_bytes: int
    available_bytes: int


def usable(threads: int, cgroup: Path = _CGROUP) -> Limits:
    """Threads by affinity, the container's quota and physical cores (or `threads`), memory by the container's limit.

    A container's files are cache and count as available.
    """
    virtual = psutil.virtual_memory()
    memory, available = int(virtual.total), int(virtual.available)
    limit = _number(cgroup / "memory.max")
    if limit is not None and limit < memory:
        used = (_number(cgroup / "memory.current") or 0) - _cached_bytes(cgroup / "memory.stat")
        memory, available = limit, min(available, max(0, limit - used))
    return Limits(threads or _default_threads(cgroup), int(virtual.total), memory, available)


def _default_threads(cgroup: Path) -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        allowed = min(allowed, max(1, int(quota) // int(period))) if quota != "max" else allowed
    except (OSError, ValueError):
        pass  # no cgroup v2 here: no quota that this process could see
    physical = psutil.cpu_count(logical=False) or allowed
    # Virtual machines show hyperthreads as cores and cores as hyperthreads: only a real count of cores is believed.
    return max(1, min(allowed, physical) if physical >= 4 else allowed)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # missing, or "max"
        return None


def _cached_bytes(path: Path) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("inactive_file", 0))


def host_id() -> str:
    """Equal for all processes on one running machine, containers included: of the boot, else of the machine's name."""
    for path in (Path("/proc/sys/kernel/random/boot_id"), Path("/etc/machine-id")):
        try:
            mark = path.read_text().strip()
        except OSError:
            continue
        if mark:
            break
    else:
        mark = f"{socket.gethostname()} {int(psutil.boot_time())}"
    return hashlib.sha256(f"ganglion host {mark}".encode()).hexdigest()[:32]


def system() -> str:
    """For example "Linux-6.1 x86_64"."""
    release = ".".join(platform.release().split(".")[:2])
    return f"{platform.system()}-{release} {platform.machine()}"[:128]


def instruction_set() -> str:
    """The flags that matter, for example "x86_64 avx avx2 avx512f"."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    have = set(line.partition(":")[2].split())
    return " ".join((platform.machine(), *(flag for flag in _FLAGS if flag in have)))


def level2_cache_kib() -> int:
    """Size of a core's second-level cache in KiB; 0 where the system does not say."""
    try:
        return max(0, os.sysconf(_SC_LEVEL2_CACHE_SIZE)) >> 10
    except (OSError, ValueError):
        return 0


def kernel_family() -> str:
    """ONNX Runtime's version, provider, cache and instruction set: devices that share it compute equal bits.

    The second-level cache sets the blocks of keys that attention adds up, and so the last bits of long contexts.
    """
    version = importlib.metadata.version("onnxruntime")
    return f"onnxruntime {version} cpu L2 {level2_cache_kib()}K {instruction_set()}"[:128]
