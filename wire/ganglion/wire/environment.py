"""What a process's environment should hold before `grpc` is imported. Importing this loads no grpc."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Final

# With gRPC's EventEngine off an exchange of 8 KiB takes 93 µs instead of 124 (bench/lane.py). Upstream means to remove
# the switch, and complains of one that it does not know, so it is set only for the versions that are known to have it.
_TUNED_VERSIONS: Final = re.compile(r"1\.(7[5-9]|8[0-5])\.")
_EXPERIMENTS: Final = "-event_engine_client,-event_engine_listener"


def tuned_environment() -> dict[str, str]:
    """What to add to the environment of a process that is started: a worker above all.

    A person's own settings of these variables stay. gRPC would log each failed handshake of a stranger: only errors.
    """
    wanted = {"GRPC_VERBOSITY": "ERROR"}
    if _TUNED_VERSIONS.match(importlib.metadata.version("grpcio")):
        wanted["GRPC_EXPERIMENTS"] = _EXPERIMENTS
    return {name: value for name, value in wanted.items() if name not in os.environ}
