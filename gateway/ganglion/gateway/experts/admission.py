"""Which of the chosen experts text may go to: decided here, by what this gateway knows itself.

A deployment: its lead's record is verified and labelled owner (`deployments.py`); for a private request every device of
its plan must be the owner's. A server: only one that this gateway's home names, under the URL that stands there; for a
private request only where the home calls it the owner's own. The coordinator is not believed in this.
"""

from __future__ import annotations

from dataclasses import dataclass

from ganglion.gateway.deployments import Deployments, Route
from ganglion.gateway.experts.servers import Server, Servers, canonical_url
from ganglion.gateway.experts.table import Expert
from ganglion.wire.errors import GanglionError, PermissionDenied, Unavailable, Unsupported


@dataclass(frozen=True)
class Admitted:
    """An expert that may be asked; server: None of a deployment."""

    expert: Expert
    server: Server | None = None


class Admission:
    """Reads the table of deployments and the home's servers at each request."""

    def __init__(self, deployments: Deployments, servers: Servers) -> None:
        self._deployments = deployments
        self._servers = servers

    def admit(self, expert: Expert | None, name: str, *, private: bool, structured: bool) -> Admitted:
        """The expert, if it may be asked. Raises an error of the tree that says why it may not."""
        if expert is None:
            raise Unavailable(f"there is no expert {name} any more")
        if expert.state == "dropped":
            raise Unavailable(f"it was dropped: {expert.why or 'it failed'}")
        if not expert.url:
            self.route(expert, private=private)
            return Admitted(expert)
        server = self._server(expert, private=private)
        if structured:
            raise Unsupported("a server's answers are not held to a structure; only deployments give structured ones")
        return Admitted(expert, server)

    def route(self, expert: Expert, *, private: bool) -> Route:
        """The way to a deployment; raises NotFound, Unavailable or PermissionDenied."""
        route = self._deployments.find(expert.model)
        if private and not route.owned:
            raise PermissionDenied("the request is private, and devices that are not labelled owner compute for it")
        return route

    def _server(self, expert: Expert, *, private: bool) -> Server:
        name = expert.name
        server = self._servers.get(name)
        if server is None:
            raise PermissionDenied(
                f"this gateway may not send text to {expert.url[:128]}; allow it with: "
                f"ganglion experts key {name} --url {expert.url[:128]}"
            )
        if not _same(expert.url, server.url):
            raise PermissionDenied(
                f"the coordinator says that {name} is at {expert.url[:128]}, and this gateway may send its text to "
                f"{server.url} only; if it has moved: ganglion experts key {name} --url {expert.url[:128]}"
            )
        if private and not server.own:
            raise PermissionDenied(
                f"the request is private, and {server.url} is not the owner's own (ganglion experts key {name} --own)"
            )
        return server


def _same(said: str, ours: str) -> bool:
    try:
        return canonical_url(said) == ours
    except GanglionError:
        return False
