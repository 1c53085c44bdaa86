"""The process in which chat templates run: `python -m ganglion.gateway.template_child`.

One JSON line in ({"source", "variables"}), one out ({"text"} or {"error", "message"}). It ends with its standard input.
A template gets CPU_S seconds of processor time (then the kernel ends the process) and MEMORY_BYTES of address space.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import jinja2

from ganglion.gateway.sandbox import OutputTooLongError, render

CPU_S = 1.0
MEMORY_BYTES = 1 << 29
FAULT_CHARACTERS = 500


def _confine() -> None:
    """Limits that this process can never raise again."""
    if sys.platform == "win32":
        return  # the parent's wall clock limit remains
    import resource

    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 16),
    ):
        resource.setrlimit(limit, (value, value))


def _allow(seconds: float) -> None:
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Render one request; every failure becomes an `error` of: template, too_long, memory."""
    try:
        return {"text": render(request["source"], request["variables"])}
    except jinja2.TemplateError as error:
        return {"error": "template", "message": str(error)[:FAULT_CHARACTERS]}
    except OutputTooLongError:
        return {"error": "too_long", "message": ""}
    except (MemoryError, OverflowError):
        return {"error": "memory", "message": ""}
    except Exception as error:  # noqa: BLE001  (the template is foreign code: it can provoke anything)
        return {"error": "template", "message": f"{type(error).__name__}: {error}"[:FAULT_CHARACTERS]}


def main() -> None:
    """Say that imports are done, then answer until standard input ends."""
    _confine()
    lines, out = sys.stdin.buffer, sys.stdout.buffer
    out.write(b"{}\n")
    out.flush()
    for line in lines:
        request = json.loads(line)
        _allow(CPU_S)
        reply = json.dumps(answer(request)).encode()
        _allow(0)
        out.write(reply + b"\n")
        out.flush()


if __name__ == "__main__":
    main()
