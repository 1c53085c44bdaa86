"""Where a device can be reached, as seen by another: what it advertises, corrected by what the coordinator sees."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import unquote

from ganglion.wire.address import join_address, split_address
from ganglion.wire.errors import ProtocolViolation

_WILDCARDS = frozenset({"0.0.0.0", "::", "*"})  # noqa: S104 - recognized, not bound


def seen_host(peer: str) -> str:
    """The host in gRPC's name for a peer ("ipv4:192.0.2.7:51234", "ipv6:%5B::1%5D:51234"); raises ProtocolViolation."""
    family, _, rest = unquote(peer).partition(":")
    if family not in {"ipv4", "ipv6"}:
        raise ProtocolViolation(f"a peer at {peer!r}, expected one with an IP address")
    host, _ = split_address(rest)
    return host


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def own_host_towards(viewer_host: str) -> str:
    """The address of this machine that a packet to `viewer_host` would carry; "" when there is no way there."""
    family = socket.AF_INET6 if ":" in viewer_host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((viewer_host, 9))  # sends nothing: it only asks for the route
        return str(probe.getsockname()[0])
    return ""


def reachable_address(advertised: Sequence[str], seen: str, viewer: str) -> str:
    """The host:port at which `viewer` reaches a device that advertises these and is seen at `seen`; "" when unknown.

    A wildcard host means: where I am seen. A device seen on loopback shares the coordinator's machine, so that somebody
    elsewhere reaches it at the coordinator's own address.
    """
    found: list[str] = []
    for text in advertised:
        host, port = split_address(text)
        if host in _WILDCARDS:
            host = seen
            if is_loopback(seen) and viewer and not is_loopback(viewer):
                host = own_host_towards(viewer) or seen
        found.append(join_address(host, port))
    # Best first: where it is seen, then what is not loopback, then what is left.
    ranked = sorted(found, key=lambda address: _distance(split_address(address)[0], seen, viewer))
    return ranked[0] if ranked else ""


def _distance(host: str, seen: str, viewer: str) -> int:
    if is_loopback(host) and not is_loopback(viewer):
        return 3
    return 0 if host == seen else 1
