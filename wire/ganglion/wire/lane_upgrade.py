"""How two workers agree, inside a sealed lane, on a socket that carries the lane from then on.

    dialler → SocketWish      whether it wants one: the address that it dialled is of the local network, or it must
    dialler ← SocketOffer     port, ticket, secret; or none
    dialler → the ticket, on the socket, and a sealed confirmation
    dialler ← a sealed confirmation, on the socket
    dialler → SocketResult    on the lane: how it went

Whoever connects proves the ticket, then both ends prove keys that are derived of the secret, of deployment and epoch,
and of both ends' ranks and node ids: what the lane's own handshake proved holds for the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import secrets
import socket
import struct
import sys
from collections.abc import Collection
from typing import Final, Literal, TypeVar

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from google.protobuf.message import DecodeError

from ganglion.proto import lane_pb2
from ganglion.wire.address import join_address
from ganglion.wire.conversation import Conversation, Stream, read_message, write_message
from ganglion.wire.errors import DeviceLost, GanglionError, ProtocolViolation, Unreachable, Unsupported
from ganglion.wire.limits import HANDSHAKE_S
from ganglion.wire.sealing import (
    KEY_BYTES,
    TAG_BYTES,
    Opener,
    Sealer,
    check_confirmation,
    confirmation,
    make_prologue,
)
from ganglion.wire.ticket_listener import TICKET_BYTES, Ticket, TicketListener, read_exactly

log = logging.getLogger(__name__)

LaneMode = Literal["auto", "grpc", "socket"]

FEATURE: Final = "socket-lane"
_CONNECT_S: Final = 2.0  # to connect and to prove the keys
_LOCAL: Final = tuple(
    ipaddress.ip_network(network)
    for network in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
        *("::1/128", "fc00::/7", "fe80::/10"),
    )
)
_RANKS: Final = struct.Struct(">II")
_REASON_CHARACTERS: Final = 200
_KEEPALIVE: Final = (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))  # for what tracks connections


def is_local(host: str) -> bool:
    """Whether `host` is an address of this machine or of a local network: loopback, private or link-local."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address.version == network.version and address in network for network in _LOCAL)


@dataclasses.dataclass(frozen=True, slots=True)
class Upgraded:
    """A socket that both ends have proved, and the keys of its two directions."""

    connection: socket.socket
    conversation: Conversation


class Sockets:
    """One worker's say about sockets.

    `mode`: "auto", for lanes of the local network, where they connect; "grpc", never; "socket", for every lane, and a
    lane without one fails. `bind`: where the worker's port listens. Raises Unsupported where no socket can be watched.
    """

    def __init__(self, mode: LaneMode, bind: str) -> None:
        if sys.platform == "win32" and mode == "socket":
            raise Unsupported("the event loop of Windows watches no sockets; use --lanes auto")
        self._mode: LaneMode = "grpc" if sys.platform == "win32" else mode
        self._listener = TicketListener(bind)

    @property
    def features(self) -> tuple[str, ...]:
        """For the Hello of a lane's handshake."""
        return () if self._mode == "grpc" else (FEATURE,)

    def _agreed(self, features: Collection[str], who: str) -> bool:
        if self._mode == "grpc" or FEATURE in features:
            return self._mode != "grpc"
        if self._mode == "socket":
            raise Unsupported(
                f"{who} takes no socket for its lanes (--lanes grpc there, or an older release), and --lanes socket"
                " here asks for one; use --lanes auto"
            )
        return False

    async def dialled(self, stream: Stream, conversation: Conversation, own: str, host: str) -> Upgraded | None:
        """The dialling end's part, of node `own`, for a lane to `host`. None: the lane stays as it is.

        Raises Unsupported and Unreachable where a socket must be, and what a conversation raises.
        """
        who = conversation.peer.node_id
        if not self._agreed(conversation.hello.features, who):
            return None
        wanted = self._mode == "socket" or is_local(host)
        await _say(stream, conversation, lane_pb2.SocketWish(wanted=wanted))
        offer = await _hear(stream, conversation, lane_pb2.SocketOffer)
        if not offer.port:
            if self._mode == "socket":
                raise Unsupported(f"{who} offers no socket, and --lanes socket asks for one; use --lanes auto")
            return None
        if not (offer.port < 1 << 16 and len(offer.ticket) == TICKET_BYTES and len(offer.secret) == KEY_BYTES):
            raise ProtocolViolation(f"{who} offers a socket that cannot be")
        outward, inward = _keys(conversation, (own, who), offer.secret)
        upgraded, refused = None, ""
        try:
            upgraded = await self._connect(conversation, host, offer, Sealer(outward), Opener(inward))
        except (GanglionError, OSError, TimeoutError) as error:
            refused = (str(error) or "no answer in time")[:_REASON_CHARACTERS]
        try:
            await _say(stream, conversation, lane_pb2.SocketResult(refused=refused))
        except BaseException:
            if upgraded is not None:
                upgraded.connection.close()
            raise
        if upgraded is None:
            self._stay(who, join_address(host, offer.port), refused)
        return upgraded

    async def _connect(
        self, conversation: Conversation, host: str, offer: lane_pb2.SocketOffer, sealer: Sealer, opener: Opener
    ) -> Upgraded:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(_CONNECT_S):
            found = await loop.getaddrinfo(host, offer.port, type=socket.SOCK_STREAM)
            connection = socket.socket(*found[0][:3])
            try:
                _prepare(connection)
                await loop.sock_connect(connection, found[0][4])
                await loop.sock_sendall(connection, offer.ticket + confirmation(sealer))
                check_confirmation(opener, await read_exactly(connection, TAG_BYTES))
            except BaseException:
                connection.close()
                raise
        return Upgraded(connection, dataclasses.replace(conversation, sealer=sealer, opener=opener))

    async def accepted(self, stream: Stream, conversation: Conversation, own: str) -> Upgraded | None:
        """The accepting end's part; as `dialled`."""
        who = conversation.peer.node_id
        if not self._agreed(conversation.hello.features, who):
            return None
        wish = await _hear(stream, conversation, lane_pb2.SocketWish)
        if not wish.wanted and self._mode != "socket":
            await _say(stream, conversation, lane_pb2.SocketOffer())
            return None
        with contextlib.ExitStack() as expecting:
            try:
                ticket = expecting.enter_context(self._listener.ticket())
            except OSError as error:
                await _say(stream, conversation, lane_pb2.SocketOffer())
                self._stay(who, "no port here", str(error))
                return None
            found = await self._offer(stream, conversation, own, ticket)
            ticket.kept = isinstance(found, Upgraded)
        if isinstance(found, Upgraded):
            return found
        self._stay(who, "as it says", found)
        return None

    async def _offer(self, stream: Stream, conversation: Conversation, own: str, ticket: Ticket) -> Upgraded | str:
        """The socket, or why there is none."""
        who, secret = conversation.peer.node_id, secrets.token_bytes(KEY_BYTES)
        inward, outward = _keys(conversation, (who, own), secret)
        taking = asyncio.create_task(_take(ticket, conversation, Sealer(outward), Opener(inward)))
        try:
            offer = lane_pb2.SocketOffer(port=ticket.port, ticket=ticket.token, secret=secret)
            await _say(stream, conversation, offer)
            result = await _hear(stream, conversation, lane_pb2.SocketResult)
            if result.refused:
                return result.refused[:_REASON_CHARACTERS]
            async with asyncio.timeout(_CONNECT_S):
                return await taking
        except TimeoutError:
            raise DeviceLost(f"{who} says that it has a socket, and none came") from None
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    def _stay(self, who: str, where: str, reason: str) -> None:
        """No socket came of it: raise Unreachable where one must be, else say so."""
        if self._mode == "socket":
            raise Unreachable(
                f"no socket for the lane with {who} ({where}: {reason}), and --lanes socket asks for one; open the"
                " devices' ports to each other (firewall, --bind), or use --lanes auto"
            )
        log.info("the lane with %s stays on gRPC, without a socket (%s: %s)", who, where, reason)

    def close(self) -> None:
        """Let nobody in any more."""
        self._listener.close()


async def _take(ticket: Ticket, conversation: Conversation, sealer: Sealer, opener: Opener) -> Upgraded:
    connection = await ticket.arrival
    try:
        _prepare(connection)
        check_confirmation(opener, await read_exactly(connection, TAG_BYTES))
        await asyncio.get_running_loop().sock_sendall(connection, confirmation(sealer))
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise DeviceLost(f"the socket of {conversation.peer.node_id} broke: {error}") from error
        raise
    return Upgraded(connection, dataclasses.replace(conversation, sealer=sealer, opener=opener))


def _prepare(connection: socket.socket) -> None:
    # Buffers are left to the kernel: it lets them grow further than most systems let a program ask for.
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _keys(conversation: Conversation, nodes: tuple[str, str], secret: bytes) -> tuple[bytes, bytes]:
    """Keys from the dialling to the accepting node and back, by HKDF-SHA256 of `secret`."""
    opening = conversation.opening
    info = make_prologue(FEATURE, opening.deployment, opening.epoch, *nodes)
    info += _RANKS.pack(opening.source, opening.destination)
    there, back = (
        HKDF(SHA256(), KEY_BYTES, salt=None, info=info + direction).derive(secret)
        for direction in (b"dialler to accepter", b"accepter to dialler")
    )
    return there, back


M = TypeVar("M", lane_pb2.SocketWish, lane_pb2.SocketOffer, lane_pb2.SocketResult)


async def _say(stream: Stream, conversation: Conversation, message: M) -> None:
    label = type(message).__name__.encode()
    sealed = conversation.sealer.seal(label, message.SerializeToString())
    await write_message(stream, sealed, conversation.peer.node_id)


async def _hear(stream: Stream, conversation: Conversation, kind: type[M]) -> M:
    who = conversation.peer.node_id
    try:
        async with asyncio.timeout(HANDSHAKE_S):
            sealed = await read_message(stream, who)
    except TimeoutError:
        raise DeviceLost(f"{who} did not agree on a socket within {HANDSHAKE_S:.0f} s") from None
    try:
        return kind.FromString(conversation.opener.open(kind.__name__.encode(), sealed))
    except DecodeError:
        raise ProtocolViolation(f"a {kind.__name__} of {who} that does not parse") from None
