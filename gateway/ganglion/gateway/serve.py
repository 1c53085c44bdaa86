"""The gateway's process: its parts put together, the port, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ganglion.gateway.app import make_app
from ganglion.gateway.deployments import Deployments
from ganglion.gateway.experts.opening import open_room
from ganglion.gateway.experts.table import ExpertTable
from ganglion.gateway.generation import Sessions
from ganglion.gateway.guard import Guard, is_loopback
from ganglion.gateway.keys import KeyRing, create_key, list_keys
from ganglion.gateway.leads import LeadClients
from ganglion.gateway.metrics import Metrics
from ganglion.gateway.pieces import Tokenizers
from ganglion.gateway.preparing import Preparer
from ganglion.gateway.service import Service
from ganglion.gateway.templates import TemplateRenderer
from ganglion.gateway.watch import CoordinatorLink
from ganglion.proto import admin_pb2
from ganglion.wire.address import join_address
from ganglion.wire.errors import Conflict, InvalidRequest, PermissionDenied
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity, Role, verify_record
from ganglion.wire.limits import API_PORT, HTTP_HEADER_BYTES

FIRST_KEY_NAME = "first"
DRAIN_S = 5.0  # for answers that are under way when the gateway is stopped
CLOSE_S = 1.0  # for their clients to hear the error after that
BACKLOG = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listening:
    """Given to `ready` once the port is open. `new_key`: an API key made for this bind, to be printed now or never."""

    url: str  # for example "http://127.0.0.1:7460/v1"
    host: str
    port: int
    new_key: str | None


class _Protocol(H11Protocol):
    """h11 without uvicorn's access log, which has paths as they were sent; ours has the route only."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.access_log = False


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers (the process around it has its own), and with word of its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.opened = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.opened.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run_gateway(
    home: Home,
    *,
    host: str = "127.0.0.1",
    port: int = API_PORT,
    coordinator: str | None = None,
    prefers: str = "",
    ready: Callable[[Listening], None] | None = None,
) -> None:
    """Serve the API until cancelled, then let answers finish for DRAIN_S seconds.

    `coordinator`: host:port of its fleet port, if not the one at which this home was enrolled. `port` 0: any free one.
    `prefers`: node id of the agent on this device: models that it drafts for are asked through it.
    Raises Conflict (port or home in use), NotFound (home not enrolled), PermissionDenied (not a gateway's identity).
    """
    with home.lock():
        identity = Identity.load(home.identity)
        if identity.role is not Role.GATEWAY:
            raise PermissionDenied(f"{home.identity} is enrolled as {identity.role}; a gateway needs the role gateway")
        with contextlib.closing(_bind(host, port)) as listener:
            bound = int(listener.getsockname()[1])
            new_key = None
            if not is_loopback(host) and not list_keys(home):
                new_key = create_key(home, FIRST_KEY_NAME)
            async with _parts(home, identity, coordinator or identity.coordinator, prefers) as service:
                started = Listening(f"http://{join_address(host, bound)}/v1", host, bound, new_key)
                guard = Guard(host, bound, KeyRing(home))
                await _serve(service, guard, listener, (lambda: ready(started)) if ready else None)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family, backlog=BACKLOG)
    except OverflowError:
        raise InvalidRequest(f"port {port} is not between 0 and 65535; choose one with --port", param="port") from None
    except OSError as error:
        raise Conflict(
            f"the API port {port} on {host} cannot be opened ({error.strerror or error}); stop what uses it, "
            f"or choose another with --port"
        ) from None


@contextlib.asynccontextmanager
async def _parts(home: Home, identity: Identity, coordinator: str, prefers: str) -> AsyncIterator[Service]:
    """Every part of a gateway but its port, running; all are ended afterwards."""
    metrics = Metrics()
    leads = LeadClients(identity)
    sessions = Sessions(leads, metrics)
    tokenizers = Tokenizers(home, identity)
    templates = TemplateRenderer()
    deployments = Deployments(lambda record: verify_record(record, identity.owner_public_key), prefers)
    preparer, experts = Preparer(deployments, tokenizers, templates), ExpertTable()

    def on_fleet(fleet: admin_pb2.Fleetwide) -> None:
        experts.update(fleet)
        sessions.end(deployments.update(fleet))
        usable = [route for route in deployments.routes if route.usable]
        leads.keep((*route.key, route.lead.address) for route in usable if route.lead is not None)
        tokenizers.keep(frozenset(route.facts.digest for route in deployments.routes if route.facts is not None))
        for route in usable:
            if route.facts is not None:
                tokenizers.begin(route.facts, route.holders)

    link = CoordinatorLink(identity, coordinator, on_fleet)
    following = asyncio.create_task(link.run())
    warming = asyncio.create_task(templates.warm())
    try:
        async with open_room(
            home, link, deployments, preparer=preparer, sessions=sessions, leads=leads, table=experts
        ) as room:
            yield Service(
                link=link,
                deployments=deployments,
                tokenizers=tokenizers,
                preparer=preparer,
                sessions=sessions,
                experts=room,
                metrics=metrics,
            )
    finally:
        for task in (following, warming):
            task.cancel()
        await asyncio.gather(following, warming, return_exceptions=True)
        await tokenizers.close()
        await templates.close()
        await leads.close()


async def _serve(service: Service, guard: Guard, listener: socket.socket, ready: Callable[[], None] | None) -> None:
    server = _Server(
        uvicorn.Config(
            make_app(service, guard),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=HTTP_HEADER_BYTES,
            timeout_graceful_shutdown=int(DRAIN_S + CLOSE_S + 1),
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        opened = asyncio.create_task(server.opened.wait())
        await asyncio.wait({serving, opened}, return_when=asyncio.FIRST_COMPLETED)
        opened.cancel()
        if ready is not None and server.started:
            ready()
        await asyncio.shield(serving)
    finally:
        service.stopping = True
        server.should_exit = True
        cutting = asyncio.get_running_loop().call_later(
            DRAIN_S, service.sessions.end_all, "the gateway is stopping; send the request again"
        )
        await asyncio.gather(serving, return_exceptions=True)
        cutting.cancel()
