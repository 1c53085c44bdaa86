"""The roster: devices with a control stream, what they said of themselves, and how to send to them. No gRPC in here."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from ganglion.coordinator.addresses import reachable_address
from ganglion.coordinator.changes import Changes
from ganglion.coordinator.health import Changed, Gone, HealthEvent, HealthTable, Silent
from ganglion.coordinator.registry import DeviceRow, LinkRow, Registry
from ganglion.partitioner.cost import Device, LinkFigures
from ganglion.proto import fleet_pb2, identity_pb2
from ganglion.wire.errors import Conflict, Exhausted, GanglionError, NotFound, Unavailable
from ganglion.wire.identity import Role, TrustLabel
from ganglion.wire.nouns import DeviceProfile

log = logging.getLogger(__name__)

OUTBOX_MESSAGES: Final = 256
HELD_MODELS: Final = 256


@dataclass
class Member:
    """One device with an open control stream; `outbox` ends with the error that ends the stream."""

    node_id: str
    seen_host: str
    outbox: asyncio.Queue[fleet_pb2.CoordinatorMessage | GanglionError] = field(
        default_factory=lambda: asyncio.Queue(OUTBOX_MESSAGES + 1)
    )
    profile: DeviceProfile | None = None
    addresses: tuple[str, ...] = ()
    held: frozenset[str] = frozenset()  # manifests of which every piece lies there
    held_partly: frozenset[str] = frozenset()
    closed: bool = False


class Roster:
    """Every member, its health and the links between them.

    Listeners: `on_joined(node_id)` when a device may be planned on, `on_lost(node_id, reason)` when its stream ended,
    `on_silent(node_id, reason)` when a serving deployment should go on without it, `on_changed()` for what else a
    plan depends on.
    """

    def __init__(self, registry: Registry, changes: Changes, clock: Callable[[], float]) -> None:
        self.registry = registry
        self.changes = changes
        self._clock = clock
        self._members: dict[str, Member] = {}
        self._health = HealthTable()
        self._last_heard_s: dict[str, float] = {}  # of devices whose stream ended
        self._links = {(row.source, row.target): row for row in registry.links()}
        self.on_joined: Callable[[str], None] = lambda _: None
        self.on_lost: Callable[[str, str], None] = lambda _node, _reason: None
        self.on_silent: Callable[[str, str], None] = lambda _node, _reason: None
        self.on_changed: Callable[[], None] = lambda: None

    # Streams

    def join(self, node_id: str, host: str) -> Member:
        """A control stream began; the newest wins, an older one of the same node is ended."""
        old = self._members.get(node_id)
        if old is not None:
            log.warning("device %s opened a second control stream: the first is ended", self.name_of(node_id))
            self.leave(old, "a newer stream of the same device took its place")
            self._end(old, Conflict("a newer control stream of this device took the place of this one"))
        member = Member(node_id, host)
        self._members[node_id] = member
        self._health.joined(node_id, self._clock())
        self.changes.mark()
        log.info("device %s is here, from %s", self.name_of(node_id), host)
        return member

    def leave(self, member: Member, reason: str) -> None:
        """Its control stream is over; nothing happens for one that was replaced already."""
        if self._members.get(member.node_id) is not member:
            return
        del self._members[member.node_id]
        self._last_heard_s[member.node_id] = self._health.heard_s(member.node_id) or self._clock()
        log.info("device %s left: %s", self.name_of(member.node_id), reason)
        self._react(self._health.left(member.node_id, reason))

    def cut(self, node_id: str, error: GanglionError) -> None:
        """End the device's stream with `error`, if it has one."""
        member = self._members.get(node_id)
        if member is not None:
            self.leave(member, error.message)
            self._end(member, error)

    def close(self, error: GanglionError) -> None:
        """End every stream."""
        for node_id in list(self._members):
            self.cut(node_id, error)

    @staticmethod
    def _end(member: Member, error: GanglionError) -> None:
        member.closed = True
        while member.outbox.qsize() >= OUTBOX_MESSAGES:
            member.outbox.get_nowait()
        member.outbox.put_nowait(error)

    def send(self, node_id: str, message: fleet_pb2.CoordinatorMessage) -> bool:
        """Queue a message; False when the device has no stream. A device that does not read is cut."""
        member = self._members.get(node_id)
        if member is None:
            return False
        if member.outbox.qsize() >= OUTBOX_MESSAGES:
            self.cut(
                node_id, Exhausted(f"{OUTBOX_MESSAGES} messages wait: this device does not read its control stream")
            )
            return False
        member.outbox.put_nowait(message)
        return True

    # What devices say

    def heard(self, node_id: str) -> None:
        """Any message arrived."""
        self._react(self._health.heard(node_id, self._clock()))

    def put_profile(self, member: Member, profile: DeviceProfile, addresses: tuple[str, ...]) -> None:
        """An advert arrived; the first one makes the device one that may be planned on, and has its links measured."""
        first = member.profile is None
        changed = member.profile != profile or member.addresses != addresses
        member.profile, member.addresses = profile, addresses
        if changed:
            self.changes.mark()
        if first:
            self._order_links(member)
            self.on_joined(member.node_id)
        elif changed:
            self.on_changed()

    def put_held(self, member: Member, held: frozenset[str], held_partly: frozenset[str]) -> None:
        """The device holds these models whole, and those in part."""
        member.held_partly = held_partly
        if held != member.held:
            member.held = held
            self.changes.mark()
            self.on_changed()

    def put_links(self, source: str, links: Iterable[LinkRow]) -> None:
        """The device measured links; what concerns unknown devices is dropped."""
        known = {row.node_id for row in self.registry.devices()}
        rows = [row for row in links if row.target in known and row.target != source]
        self.registry.put_links(rows)
        self._links |= {(row.source, row.target): row for row in rows}
        self.on_changed()

    def _order_links(self, member: Member) -> None:
        """Each pair is measured from both sides: who reaches whom is part of the answer."""
        others = [other for other in self.ready_members() if other.node_id != member.node_id]
        for viewer, targets in itertools.chain([(member, others)], ((other, [member]) for other in others)):
            peers = [self.peer(target.node_id, viewer.seen_host) for target in targets]
            if peers:
                order = fleet_pb2.MeasureLinks(peers=peers)
                self.send(viewer.node_id, fleet_pb2.CoordinatorMessage(measure_links=order))

    # Health

    def set_serving(self, node_ids: frozenset[str]) -> None:
        """These devices carry a serving deployment: their silence is noticed at once."""
        self._health.set_active(node_ids, self._clock())

    def tick(self) -> None:
        """Time passed."""
        self._react(self._health.tick(self._clock()))

    def _react(self, events: Iterable[HealthEvent]) -> None:
        for event in events:
            self.changes.mark()
            match event:
                case Gone(node_id, reason):
                    self.on_lost(node_id, reason)
                case Silent(node_id, silence_s):
                    self.on_silent(node_id, f"silent for {silence_s:.1f} s")
                case Changed(node_id, "dead"):
                    self.cut(node_id, Unavailable("not heard for too long; connect again"))
                case Changed(node_id, "alive"):
                    self.on_changed()
                case Changed(node_id, health):
                    log.info("device %s is %s", self.name_of(node_id), health)

    # Questions

    def member(self, node_id: str) -> Member | None:
        """The device's member; None when it has no stream."""
        return self._members.get(node_id)

    def ready_members(self) -> list[Member]:
        """Members that advertised and are alive, by node id."""
        return [
            member
            for node_id, member in sorted(self._members.items())
            if member.profile is not None and self._health.health(node_id) == "alive"
        ]

    def state(self, row: DeviceRow) -> tuple[str, float]:
        """(state as the protocol names it, seconds since it was heard; 0 when it never was).

        A device is "enrolled" until its first control stream since this coordinator began, "dead" without one later.
        """
        if row.standing != "enrolled":
            return row.standing, 0.0
        health, heard_s = self._health.health(row.node_id), self._health.heard_s(row.node_id)
        if health is not None and heard_s is not None:
            return health, self._clock() - heard_s
        if row.node_id in self._last_heard_s:
            return "dead", self._clock() - self._last_heard_s[row.node_id]
        return "enrolled", 0.0

    def name_of(self, node_id: str) -> str:
        """The device's name, else its id."""
        try:
            return self.registry.device(node_id).name
        except NotFound:
            return node_id

    def devices(self) -> list[Device]:
        """Devices that may be planned on."""
        found = []
        for member in self.ready_members():
            row = self.registry.device(member.node_id)
            if member.profile is not None and row.standing == "enrolled" and row.role == Role.AGENT.number:
                found.append(Device(row.node_id, row.name, TrustLabel.of(row.label).value, member.profile))
        return found

    def links(self) -> dict[tuple[str, str], LinkFigures]:
        """Measured links, as the planner takes them."""
        return {pair: LinkFigures(row.reachable, row.rtt_s, row.bytes_per_s) for pair, row in self._links.items()}

    def peer(self, node_id: str, viewer_host: str, addresses: tuple[str, ...] | None = None) -> identity_pb2.Peer:
        """A device as somebody at `viewer_host` needs it; `addresses` in place of those of its piece service."""
        row = self.registry.device(node_id)
        member = self._members.get(node_id)
        advertised = addresses if addresses is not None else member.addresses if member else ()
        address = reachable_address(advertised, member.seen_host if member else "", viewer_host)
        return identity_pb2.Peer(
            record=identity_pb2.SignedRecord.FromString(row.record), address=address, name=row.name
        )

    def gateways(self) -> list[identity_pb2.Peer]:
        """Every enrolled gateway; they dial, so they have no address."""
        return [
            identity_pb2.Peer(record=identity_pb2.SignedRecord.FromString(row.record), name=row.name)
            for row in self.registry.devices()
            if row.standing == "enrolled" and row.role == Role.GATEWAY.number
        ]
