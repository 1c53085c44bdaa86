"""What a figure was taken on: processor, the vector instructions that matter, memory, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any, Final

from ganglion.wire.hello import distribution_version

# Of products of 8 bits above all: what decides between kernels, here and in what is compared with.
FLAGS: Final = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "sve", "sve2",
)  # fmt: skip


def machine(proc: Path = Path("/proc")) -> dict[str, Any]:
    """This machine as a document; what cannot be read is None."""
    import psutil

    described = _described(proc)
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", described, re.MULTILINE)
    there = found[1].split() if found else []
    return {
        "processor": _field(described, "model name") or platform.processor() or platform.machine(),
        "processor_family": _number(described, "cpu family"),
        "processor_model": _number(described, "model"),
        "cores": psutil.cpu_count(logical=False),
        "threads": os.cpu_count(),
        "instructions": [flag for flag in FLAGS if flag in there],
        "memory_bytes": psutil.virtual_memory().total,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
        "ganglion": distribution_version(),
    }


def version(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine_line(found: dict[str, Any]) -> str:
    """The same in one line for people."""
    from ganglion.cli.output import human_bytes

    family = found["processor_family"]
    which = f" (family {family}, model {found['processor_model']})" if family is not None else ""
    instructions = ", ".join(found["instructions"]) or "instructions not readable here"
    return (
        f"{found['processor']}{which}, {found['cores'] or found['threads']} cores, {instructions}; "
        f"{human_bytes(found['memory_bytes'])}; {found['system']}; ONNX Runtime {found['onnxruntime']}, "
        f"Python {found['python']}; load {found['load']} when it began"
    )


def _described(proc: Path) -> str:
    try:
        return (proc / "cpuinfo").read_text(errors="replace")
    except OSError:
        return ""


def _field(described: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.+)$", described, re.MULTILINE)
    return found[1].strip() if found else None


def _number(described: str, name: str) -> int | None:
    found = _field(described, name)
    return int(found) if found is not None and found.isdigit() else None
