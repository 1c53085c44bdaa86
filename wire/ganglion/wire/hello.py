"""Hello: the first message of every conversation, both ways, after mutual TLS."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Final

from ganglion.proto import identity_pb2 as pb
from ganglion.wire.errors import Unsupported
from ganglion.wire.limits import PROTOCOL

DRAFTING: Final = "drafting"  # a coordinator's feature: it takes offers to draft
ROUTES: Final = "routes"  # a coordinator's feature: it takes reports of a mixture's routes


@functools.cache
def distribution_version() -> str:
    """Of this installation; "unknown" when it runs from bare sources."""
    try:
        return importlib.metadata.version("ganglion-ai")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def hello(*, features: Sequence[str] = (), kernel_family: str = "") -> pb.Hello:
    """This process's Hello."""
    return pb.Hello(protocol=PROTOCOL, version=distribution_version(), features=features, kernel_family=kernel_family)


def check_hello(peer: pb.Hello) -> pb.Hello:
    """`peer`, when this release speaks with it: protocol PROTOCOL - 1 to PROTOCOL; raises Unsupported."""
    oldest = max(PROTOCOL - 1, 1)
    if not oldest <= peer.protocol <= PROTOCOL:
        raise Unsupported(
            f"the peer speaks protocol {peer.protocol} (version {peer.version[:64] or 'unknown'}), this release "
            f"{oldest} to {PROTOCOL} (version {distribution_version()}); update the older one"
        )
    return peer
