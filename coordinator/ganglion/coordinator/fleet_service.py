"""The control streams: one for each agent, dialled by it. Parses what agents say and hands it to the roster."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import grpc

from ganglion.coordinator.addresses import seen_host
from ganglion.coordinator.allowance import Allowance
from ganglion.coordinator.deployments.driver import Deployments
from ganglion.coordinator.registry import LinkRow
from ganglion.coordinator.roster import HELD_MODELS, Member, Roster
from ganglion.proto import fleet_pb2, fleet_pb2_grpc
from ganglion.wire.address import split_address
from ganglion.wire.certificates import is_node_id
from ganglion.wire.errors import GanglionError, InvalidDocument, ProtocolViolation, Unavailable
from ganglion.wire.hello import DRAFTING, ROUTES, check_hello, hello
from ganglion.wire.identity import peer_of
from ganglion.wire.limits import ADVERT_BYTES, HANDSHAKE_S
from ganglion.wire.nouns import DeviceProfile, from_json

log = logging.getLogger(__name__)

ADVERTISED_ADDRESSES: Final = 16
REPORTED_LINKS: Final = 1024
WORKERS: Final = 256
_DIGEST_CHARACTERS: Final = 64


class FleetService(fleet_pb2_grpc.FleetServicer):
    """Control: hello both ways, then adverts, beats and statuses in, orders out."""

    def __init__(self, roster: Roster, deployments: Deployments, clock: Callable[[], float]) -> None:
        self._roster = roster
        self._deployments = deployments
        self._clock = clock

    async def Control(  # noqa: N802 - the protocol's name
        self,
        request_iterator: AsyncIterator[fleet_pb2.AgentMessage],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[fleet_pb2.CoordinatorMessage]:
        """See fleet.proto; raises ProtocolViolation, Conflict when a newer stream takes over."""
        node_id = peer_of(context).node_id
        host = seen_host(context.peer())
        try:
            first = await asyncio.wait_for(anext(request_iterator), HANDSHAKE_S)
        except (TimeoutError, StopAsyncIteration):
            raise ProtocolViolation(f"no hello within {HANDSHAKE_S:.0f} s") from None
        if first.WhichOneof("body") != "hello":
            raise ProtocolViolation("the first message of a control stream is hello")
        check_hello(first.hello)
        yield fleet_pb2.CoordinatorMessage(hello=hello(features=[DRAFTING, ROUTES]))
        member = self._roster.join(node_id, host)
        reader = asyncio.create_task(self._read(member, request_iterator))
        reason = "the stream broke"
        try:
            while True:
                message = await member.outbox.get()
                if isinstance(message, GanglionError):
                    reason = message.message
                    raise message
                yield message
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._roster.leave(member, reason)

    async def _read(self, member: Member, messages: AsyncIterator[fleet_pb2.AgentMessage]) -> None:
        """Take what the agent says until it ends; the stream then ends through the outbox."""
        error: GanglionError = Unavailable("the agent ended its stream")
        try:
            adverts = Allowance(1.0, 4)
            any_message = Allowance(100.0, 400)
            async for message in messages:
                now_s = self._clock()
                any_message.take(now_s, "messages")
                if member.closed:
                    return
                self._roster.heard(member.node_id)
                if message.WhichOneof("body") == "advert":
                    adverts.take(now_s, "adverts")
                self._take(member, message)
        except GanglionError as violation:
            log.warning("device %s: %s", self._roster.name_of(member.node_id), violation.message)
            error = violation
        except grpc.RpcError:
            error = Unavailable("the stream broke")
        except Exception as defect:
            log.error("device %s: a message led to a defect", member.node_id, exc_info=defect)
            error = ProtocolViolation("a message could not be handled; the coordinator's log has the details")
        if not member.closed:
            self._roster.cut(member.node_id, error)

    def _take(self, member: Member, message: fleet_pb2.AgentMessage) -> None:
        match message.WhichOneof("body"):
            case "advert":
                profile, addresses = read_advert(message.advert)
                self._roster.put_profile(member, profile, addresses)
            case "heartbeat":
                if len(message.heartbeat.workers) > WORKERS:
                    raise ProtocolViolation(f"a beat of {len(message.heartbeat.workers)} workers, at most {WORKERS}")
                self._deployments.beat(member.node_id, message.heartbeat.workers)
            case "status":
                self._deployments.status(member.node_id, message.status)
            case "links":
                self._roster.put_links(member.node_id, read_links(member.node_id, message.links))
            case "held":
                self._roster.put_held(member, *read_held(message.held))
            case "draft_offer":
                self._deployments.offer(member.node_id, message.draft_offer)
            case "routes":
                self._deployments.routes(member.node_id, message.routes)
            case other:
                raise ProtocolViolation(f"{other or 'an unknown message'} is not expected here")


def read_advert(advert: fleet_pb2.Advert) -> tuple[DeviceProfile, tuple[str, ...]]:
    """Profile and addresses; raises InvalidDocument, InvalidRequest, ProtocolViolation."""
    profile = from_json(DeviceProfile, advert.profile, limit_bytes=ADVERT_BYTES)
    if len(advert.addresses) > ADVERTISED_ADDRESSES:
        raise ProtocolViolation(f"{len(advert.addresses)} addresses, at most {ADVERTISED_ADDRESSES}")
    for address in advert.addresses:
        if len(address) > 255:
            raise ProtocolViolation(f"an address of {len(address)} characters, at most 255")
        split_address(address)
    return profile, tuple(advert.addresses)


def read_links(source: str, report: fleet_pb2.LinkReport) -> list[LinkRow]:
    """Measured links; raises ProtocolViolation for figures that no link has."""
    if len(report.links) > REPORTED_LINKS:
        raise ProtocolViolation(f"a report of {len(report.links)} links, at most {REPORTED_LINKS}")
    rows = []
    for link in report.links:
        figures = (link.rtt_s, link.bytes_per_s)
        if not is_node_id(link.node_id) or not all(math.isfinite(figure) and figure >= 0 for figure in figures):
            raise ProtocolViolation(f"link to {link.node_id[:32]!r}: {figures} are not a time and a rate")
        rows.append(
            LinkRow(
                source=source,
                target=link.node_id,
                reachable=link.reachable,
                rtt_s=link.rtt_s,
                bytes_per_s=link.bytes_per_s,
            )
        )
    return rows


def read_held(held: fleet_pb2.HeldModels) -> tuple[frozenset[str], frozenset[str]]:
    """Digests of manifests held whole, and of those held in part; raises ProtocolViolation, InvalidDocument."""
    digests = [*held.manifest_digests, *held.partial_manifest_digests]
    if len(digests) > HELD_MODELS:
        raise ProtocolViolation(f"{len(digests)} models held, at most {HELD_MODELS}")
    for digest in digests:
        if len(digest) != _DIGEST_CHARACTERS or not set(digest) <= set("0123456789abcdef"):
            raise InvalidDocument(f"manifest digest {digest[:80]!r} is not 64 hexadecimal digits")
    return frozenset(held.manifest_digests), frozenset(held.partial_manifest_digests)
