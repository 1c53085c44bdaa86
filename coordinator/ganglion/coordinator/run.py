"""The coordinator as a process: opens the registry and both ports, ticks, and closes everything when cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from ganglion.coordinator.addresses import is_loopback
from ganglion.coordinator.admin_service import ROLES, AdminService, is_shut_out
from ganglion.coordinator.authority import Authority, coordinator_identity
from ganglion.coordinator.changes import Changes
from ganglion.coordinator.deployments.driver import Deployments, run_ticks
from ganglion.coordinator.deployments.planning import Planner
from ganglion.coordinator.enrolment_service import EnrolmentService
from ganglion.coordinator.fleet_service import FleetService
from ganglion.coordinator.health import TICK_S
from ganglion.coordinator.registry import DeviceRow, SqliteRegistry
from ganglion.coordinator.roster import Roster
from ganglion.coordinator.selection import Experts
from ganglion.partitioner.placement import place
from ganglion.proto import admin_pb2_grpc, enrolment_pb2_grpc, fleet_pb2_grpc
from ganglion.wire import discovery as mdns
from ganglion.wire import rpc
from ganglion.wire.address import join_address
from ganglion.wire.errors import Corrupt, NotFound, Unavailable
from ganglion.wire.home import Home
from ganglion.wire.identity import Role
from ganglion.wire.limits import ENROLMENT_PORT, FLEET_PORT

log = logging.getLogger(__name__)

OWNER_KEY_BYTES: Final = 32
STOP_GRACE_S: Final = 0.5  # for the streams to be told why they end


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Where a coordinator that takes calls is. authority_pin: 16 bytes, what join tokens pin."""

    bind: str
    fleet_port: int
    enrolment_port: int
    authority_pin: bytes
    owner_public_key: bytes


async def run_coordinator(
    home: Home,
    *,
    bind: str = "0.0.0.0",  # noqa: S104 - devices of the house reach it; both ports are TLS
    fleet_port: int = FLEET_PORT,
    enrolment_port: int = ENROLMENT_PORT,
    recorder: Path | None = None,
    ready: Callable[[Ready], None] | None = None,
    discovery: bool = True,
    planner: Planner = place,
) -> None:
    """Run until cancelled. `home` holds `owner.pub` (Ed25519, 32 bytes); everything else is made when missing.

    Ports of 0 are any free ones; `ready` is called with what was bound. `recorder`: append every message to this file.
    Raises Conflict (the home or a port is in use), NotFound (no owner.pub), Corrupt (registry or authority damaged).
    """
    with home.lock():
        owner_public_key = _owner_public_key(home)
        authority = Authority.open(home)
        registry = SqliteRegistry(home.path / "registry.sqlite3")
        try:
            running = _Coordinator(home, authority, registry, owner_public_key, planner)
            await running.serve(bind, fleet_port, enrolment_port, recorder, ready, discovery=discovery)
        finally:
            registry.close()


def _owner_public_key(home: Home) -> bytes:
    path = home.path / "owner.pub"
    if not path.exists():
        raise NotFound(
            f"{path} is missing: the coordinator needs the owner's public key, which `ganglion up` puts there"
        )
    key = path.read_bytes()
    if len(key) != OWNER_KEY_BYTES:
        raise Corrupt(f"{path} has {len(key)} bytes, an owner's public key has {OWNER_KEY_BYTES}")
    return key


class _Coordinator:
    """The parts, put together."""

    def __init__(
        self, home: Home, authority: Authority, registry: SqliteRegistry, owner_public_key: bytes, planner: Planner
    ) -> None:
        self._home = home
        self._authority = authority
        self._registry = registry
        self._owner_public_key = owner_public_key
        self._changes = Changes()
        self._roster = Roster(registry, self._changes, time.monotonic)
        self._deployments = Deployments(registry, self._roster, planner, time.monotonic)
        self._experts = Experts(registry, self._roster, self._deployments)
        self._admin = AdminService(registry, self._roster, self._deployments, self._experts, owner_public_key)

    async def serve(
        self,
        bind: str,
        fleet_port: int,
        enrolment_port: int,
        recorder: Path | None,
        ready: Callable[[Ready], None] | None,
        *,
        discovery: bool,
    ) -> None:
        """Open both ports, say so, and stay until cancelled."""
        identity = coordinator_identity(
            self._home, self._authority, self._owner_public_key, join_address("127.0.0.1", fleet_port or FLEET_PORT)
        )
        fleet = rpc.server(
            identity,
            bind=bind,
            port=fleet_port,
            what="the fleet port",
            knob="--fleet-port",
            allowed=ROLES,
            is_revoked=lambda node_id: is_shut_out(self._registry, node_id),
            record_to=recorder,
        )
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(fleet.stop, STOP_GRACE_S)
            enrolment = rpc.server(
                identity,
                bind=bind,
                port=enrolment_port,
                what="the enrolment port",
                knob="--enrolment-port",
                allowed=None,
                record_to=recorder,
                streams=16,
            )
            stack.push_async_callback(enrolment.stop)
            fleet_service = FleetService(self._roster, self._deployments, time.monotonic)
            enrolment_service = EnrolmentService(
                self._registry,
                self._authority,
                self._owner_public_key,
                changes=self._changes,
                on_enrolled=self._enrolled,
                fleet_port=fleet.port,
            )
            fleet_pb2_grpc.add_FleetServicer_to_server(fleet_service, fleet.server)  # type: ignore[no-untyped-call]
            admin_pb2_grpc.add_AdminServicer_to_server(self._admin, fleet.server)  # type: ignore[no-untyped-call]
            enrolment_pb2_grpc.add_EnrolmentServicer_to_server(enrolment_service, enrolment.server)  # type: ignore[no-untyped-call]
            self._deployments.restore()
            self._experts.restore()
            stack.push_async_callback(self._deployments.close)
            await fleet.start()
            await enrolment.start()
            stack.callback(self._end_streams)
            await stack.enter_async_context(_background(self._experts.run()))
            if discovery:
                await stack.enter_async_context(_background(self._announce(bind, enrolment.port)))
            if ready is not None:
                ready(
                    Ready(
                        bind=bind,
                        fleet_port=fleet.port,
                        enrolment_port=enrolment.port,
                        authority_pin=self._authority.pin,
                        owner_public_key=self._owner_public_key,
                    )
                )
            log.info("the coordinator takes calls: fleet %s, enrolment %s", fleet.address, enrolment.address)
            await run_ticks(self._tick, TICK_S)

    def _tick(self) -> None:
        self._roster.tick()
        self._deployments.tick()

    def _enrolled(self, row: DeviceRow) -> None:
        if row.role == Role.GATEWAY.number:
            self._deployments.gateways_changed()

    def _end_streams(self) -> None:
        self._admin.close()
        # No deployment is to be planned anew because of this.
        self._roster.on_lost = lambda _node, _reason: None
        self._roster.close(Unavailable("the coordinator is stopping"))

    async def _announce(self, bind: str, port: int) -> None:
        """Announce the enrolment port on the local network; without it people name the address."""
        addresses = announced_addresses(bind)
        if not addresses:
            return
        interfaces = None if ipaddress.ip_address(bind).is_unspecified else [bind]
        try:
            async with mdns.advertise(
                name="coordinator",
                addresses=addresses,
                port=port,
                authority_pin=self._authority.pin,
                interfaces=interfaces,
            ):
                await asyncio.Event().wait()
        except Unavailable as error:
            log.warning("%s", error.message)


def announced_addresses(bind: str) -> list[str]:
    """IP addresses of this machine at which a port bound to `bind` is reached from the network; [] for a host name."""
    try:
        bound = ipaddress.ip_address(bind)
    except ValueError:
        return []
    if not bound.is_unspecified:
        return [bind]
    families = {socket.AF_INET} if bound.version == 4 else {socket.AF_INET, socket.AF_INET6}
    found = (
        address.address.partition("%")[0]
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in families
    )
    return [host for host in found if not is_loopback(host)]


@contextlib.asynccontextmanager
async def _background(work: Coroutine[object, object, None]) -> AsyncIterator[None]:
    """Run `work` beside the block and end it with the block."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
