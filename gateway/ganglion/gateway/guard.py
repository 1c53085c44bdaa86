"""Who may call: on loopback anybody on this machine but no web page; on any other address whoever has a key.

Keys guard the addresses that other machines reach. On loopback they are not asked for, even when some exist: there the
names in Host and Origin are checked instead, so that a page in a browser cannot reach the API by rebinding a name.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from ganglion.gateway.keys import KeyRing, tenant_of
from ganglion.wire.errors import PermissionDenied, Unauthenticated

OPEN_PATHS = frozenset({"/healthz"})
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
HTTP_PORT = 80


def is_loopback(host: str) -> bool:
    """Whether binding to `host` is reached from this machine only; of a name other than localhost, no."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Decides over one request by its path and headers; `port` is the one that is listened on."""

    def __init__(self, host: str, port: int, ring: KeyRing) -> None:
        self._ring = None if is_loopback(host) else ring
        names = {*LOCAL_NAMES, host if ":" not in host or host.startswith("[") else f"[{host}]"}
        self._hosts = frozenset(f"{name}:{port}" for name in names)
        if port == HTTP_PORT:
            self._hosts |= names
        self._origins = frozenset(f"http://{name}" for name in self._hosts)

    def check(self, path: str, headers: Mapping[str, str]) -> str:
        """Let it pass and return the caller's tenant, or raise PermissionDenied or Unauthenticated.

        `headers` has lower-case names. The tenant is "" where no key is asked for.
        """
        if self._ring is None:
            self._check_names(headers)
        elif path not in OPEN_PATHS:
            return self._check_key(self._ring, headers.get("authorization", ""))
        return ""

    def _check_names(self, headers: Mapping[str, str]) -> None:
        host = headers.get("host", "").lower()
        if host not in self._hosts:
            raise PermissionDenied(
                f"the Host header is {host[:128]!r}; this address answers to {', '.join(sorted(self._hosts))} only"
            )
        origin = headers.get("origin")
        if origin is None:
            return
        if origin.lower() not in self._origins:
            raise PermissionDenied(f"web pages of {origin[:128]!r} may not call this address")

    def _check_key(self, ring: KeyRing, authorization: str) -> str:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("an API key is needed: send it as 'Authorization: Bearer KEY' (ganglion key create)")
        if not ring.accepts(key.strip()):
            raise Unauthenticated("the API key is not known here; make one with: ganglion key create")
        return tenant_of(key.strip())
