"""Starts a worker that cannot outlive its supervisor: `python -m ganglion.agent.launch PARENT_PID MODULE …`.

On Linux the kernel kills this process when its parent dies, whatever the parent died of. Elsewhere the end of standard
input says the same to a worker that reads it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with(parent_pid: int) -> None:
    """Be killed when the parent dies; exits at once when it is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit(1)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
