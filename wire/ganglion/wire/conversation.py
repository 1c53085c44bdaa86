"""The opening of a sealed conversation over one gRPC stream: lanes and sessions begin the same way.

dialler → Opening (deployment, epoch, ranks, first handshake message)
dialler ← second handshake message
dialler → confirmation
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc
from google.protobuf.message import DecodeError

from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import DeviceLost, GanglionError, ProtocolViolation, Unauthenticated
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.identity import Identity, VerifiedRecord
from ganglion.wire.limits import FIRST_FRAME_S, HANDSHAKE_S
from ganglion.wire.sealing import Initiator, Opener, Sealer, check_confirmation, confirmation, make_prologue, respond
from ganglion.wire.status import to_error

_OPENING_BYTES: Final = 4096


class Stream(Protocol):
    """Either end of a gRPC stream of bytes."""

    async def read(self) -> Any:
        """The next message, or `grpc.aio.EOF`."""

    async def write(self, message: bytes, /) -> None:
        """Send one message."""


# What grpc.aio raises on a stream that is over.
BROKEN: Final = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError, asyncio.CancelledError)


def broken(error: BaseException | None, who: str) -> GanglionError:
    """The error of the tree for a stream to `who` that ended: the peer's own words when it gave some."""
    if isinstance(error, grpc.aio.AioRpcError):
        mapped = to_error(error, who)
        if mapped.code not in ("unreachable", "unavailable", "internal"):
            return mapped
        return DeviceLost(f"the stream to {who} broke: {(error.details() or error.code().name)[:200]}")
    return DeviceLost(f"the stream to {who} broke" if error is None else f"the stream to {who} broke: {error!r:.200}")


async def read_message(stream: Stream, who: str) -> bytes:
    """The next message; raises DeviceLost when the stream is over, at once."""
    try:
        message = await stream.read()
    except asyncio.CancelledError as error:
        # Our own cancellation must go on; gRPC's (the call was cancelled below us) is a lost peer.
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        raise broken(error, who) from error
    except BROKEN as error:
        raise broken(error, who) from error
    if message is grpc.aio.EOF:
        raise broken(None, who)
    return message  # type: ignore[no-any-return]


async def write_message(stream: Stream, message: bytes, who: str) -> None:
    """Send one message; raises DeviceLost when the stream is over."""
    try:
        await stream.write(message)
    except asyncio.CancelledError as error:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        raise broken(error, who) from error
    except BROKEN as error:
        raise broken(error, who) from error


@dataclass(frozen=True)
class Conversation:
    """An opened conversation: who is at the other end and both directions' keys."""

    peer: VerifiedRecord
    opening: lane_pb2.Opening
    hello: identity_pb2.Hello
    sealer: Sealer
    opener: Opener


def _parse_hello(payload: bytes) -> identity_pb2.Hello:
    try:
        return check_hello(identity_pb2.Hello.FromString(payload))
    except DecodeError:
        raise ProtocolViolation("the peer's Hello does not parse") from None


async def open_conversation(
    stream: Stream,
    identity: Identity,
    peer: VerifiedRecord,
    purpose: str,
    opening: lane_pb2.Opening,
    *,
    features: Sequence[str] = (),
) -> Conversation:
    """The dialling side. `opening`: all but the handshake. `features`: for our Hello.

    Raises Unauthenticated, DeviceLost, ProtocolViolation.
    """
    prologue = make_prologue(purpose, opening.deployment, opening.epoch, identity.node_id, peer.node_id)
    handshake = Initiator(identity.keys.sealing_private_key, peer.sealing_public_key, prologue)
    first = lane_pb2.Opening()
    first.CopyFrom(opening)
    first.handshake = handshake.start(hello(features=features).SerializeToString())
    try:
        async with asyncio.timeout(FIRST_FRAME_S):
            # A refusal may end the stream before the opening is written: the read says why, the write could not.
            with contextlib.suppress(GanglionError):
                await write_message(stream, first.SerializeToString(), peer.node_id)
            payload, sealer, opener = handshake.finish(await read_message(stream, peer.node_id))
            greeting = _parse_hello(payload)
            await write_message(stream, confirmation(sealer), peer.node_id)
    except TimeoutError:
        raise DeviceLost(f"{peer.node_id} did not answer the sealing handshake within {FIRST_FRAME_S:.0f} s") from None
    return Conversation(peer, opening, greeting, sealer, opener)


async def accept_conversation(
    stream: Stream,
    identity: Identity,
    node_id: str,
    purpose: str,
    accept: Callable[[lane_pb2.Opening], VerifiedRecord],
    *,
    features: Sequence[str] = (),
) -> Conversation:
    """The accepting side. `node_id`: the caller's, by its certificate. `accept` gives its record or raises a refusal.

    Raises what `accept` raises, Unauthenticated, DeviceLost, ProtocolViolation.
    """
    try:
        async with asyncio.timeout(FIRST_FRAME_S):
            message = await read_message(stream, node_id)
        if len(message) > _OPENING_BYTES:
            raise ProtocolViolation(f"an opening of {len(message)} bytes, at most {_OPENING_BYTES}")
        try:
            opening = lane_pb2.Opening.FromString(message)
        except DecodeError:
            raise ProtocolViolation("the opening does not parse") from None
        peer = accept(opening)
        if peer.node_id != node_id:
            raise Unauthenticated("the caller's certificate and its record name different nodes")
        prologue = make_prologue(purpose, opening.deployment, opening.epoch, node_id, identity.node_id)
        payload, answer, sealer, opener = respond(
            identity.keys.sealing_private_key,
            peer.sealing_public_key,
            prologue,
            opening.handshake,
            hello(features=features).SerializeToString(),
        )
        greeting = _parse_hello(payload)
        async with asyncio.timeout(HANDSHAKE_S):
            await write_message(stream, answer, node_id)
            check_confirmation(opener, await read_message(stream, node_id))
    except TimeoutError:
        raise DeviceLost(f"{node_id} did not finish the sealing handshake in time") from None
    return Conversation(peer, opening, greeting, sealer, opener)
