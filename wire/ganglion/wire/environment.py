"""What a process's environment should hold before `grpc` is imported. Importing this loads no grpc."""

from __future__ import annotations

import os


def tuned_environment() -> dict[str, str]:
    """What to add to the environment of a process that is started: a worker above all.

    A person's own settings of these variables stay. gRPC would log each failed handshake of a stranger: only errors.
    gRPC's EventEngine stays on, though an exchange of 8 KiB over gRPC takes a tenth less without it: it answers pings
    by threads that need no interpreter lock, which a grammar's compiler may hold for longer than a ping may take.
    """
    wanted = {"GRPC_VERBOSITY": "ERROR"}
    return {name: value for name, value in wanted.items() if name not in os.environ}
