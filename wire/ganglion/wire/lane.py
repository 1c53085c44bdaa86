"""Lanes: the sealed stream between two workers of one epoch. One kept gRPC stream per pair; the lower rank dials.

A lane is used by one task at a time for sending and one for receiving: reading and writing happen in the task that
waits, without a queue or a reader task between. The stream's order is the frames' order.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

import grpc
import msgspec
import numpy as np
from numpy.typing import NDArray

from ganglion.proto import lane_pb2
from ganglion.wire import rpc
from ganglion.wire.conversation import (
    BROKEN,
    Conversation,
    Stream,
    accept_conversation,
    open_conversation,
    read_message,
    write_message,
)
from ganglion.wire.errors import (
    Conflict,
    DeviceLost,
    ErrorBody,
    GanglionError,
    ProtocolViolation,
    from_body,
    to_body,
)
from ganglion.wire.frames import (
    HEADER_BYTES,
    Dtype,
    Ends,
    Expectation,
    Header,
    Kind,
    check,
    message_header,
    numpy_dtype,
    parse,
    tensor_header,
)
from ganglion.wire.identity import Identity, VerifiedRecord, peer_of
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES

METHOD: Final = "/ganglion.v1.Lane/Exchange"
_SERVICE, _NAME = "ganglion.v1.Lane", "Exchange"
# Two ends that each wait for a large write before they read would wait for ever: HTTP/2 has a window.
_DIRECT_WRITE_BYTES: Final = 32 << 10
_CLOSE_S: Final = 1.0

__all__ = [
    "METHOD",
    "Dtype",
    "Expectation",
    "Kind",
    "Lane",
    "LaneServicer",
    "Message",
    "dial_lane",
]


@dataclass(frozen=True, slots=True)
class Message:
    """A received message frame."""

    kind: Kind
    step: int
    exchange: int
    payload: bytes


class Lane:
    """One end of a lane. `sealing_s` adds up the seconds spent sealing and opening; bytes are of frames and their tags.

    Every method raises DeviceLost when the peer is gone (at once, also while waiting), the peer's own error when it
    ended the lane with one, and ProtocolViolation for a frame that the step did not announce; after any of these the
    lane is over. So it is after a cancelled wait: gRPC ends a call whose reader is cancelled.
    """

    def __init__(
        self,
        stream: Stream,
        conversation: Conversation,
        own_rank: int,
        peer_rank: int,
        shut: Callable[[], Awaitable[None]],
    ) -> None:
        self.peer = conversation.peer
        self.deployment: str = conversation.opening.deployment
        self.epoch: int = conversation.opening.epoch
        self.own_rank = own_rank
        self.peer_rank = peer_rank
        self.sealing_s = 0.0
        self.sent_bytes = self.received_bytes = 0
        self._stream = stream
        self._sealer = conversation.sealer
        self._opener = conversation.opener
        self._outward = Ends(self.epoch, own_rank, peer_rank)
        self._inward = Ends(self.epoch, peer_rank, own_rank)
        self._shut = shut
        self._closing = False
        self._writing: asyncio.Task[None] | None = None
        self._who = f"rank {peer_rank} ({conversation.peer.node_id})"
        self._ended = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether the lane is over: closed here or there, broken, or ended by a violation."""
        return self._ended.is_set()

    async def wait_closed(self) -> None:
        """Return when the lane is over; a broken stream is noticed by who reads, at the accepting end also here."""
        await self._ended.wait()

    async def send_tensor(self, kind: Kind, step: int, exchange: int, array: NDArray[Any]) -> None:
        """Send `array`: [rows, columns], C-contiguous. It may be changed as soon as this returns.

        Raises also Exhausted for an array beyond one frame (16 MiB).
        """
        await self._send(tensor_header(kind, self._outward, step, exchange, array), array.data.cast("B"))

    async def send_message(self, kind: Kind, step: int, payload: bytes, exchange: int = 0) -> None:
        """Send a message, for example a serialized Step; raises also Exhausted beyond 4 MiB."""
        await self._send(message_header(kind, self._outward, step, exchange, len(payload)), payload)

    async def _send(self, header: bytes, payload: bytes | memoryview) -> None:
        if self._writing is not None:
            await self._written()
        if self._ended.is_set():
            raise DeviceLost(f"the lane to {self._who} is closed")
        started = time.perf_counter()
        message = header + self._sealer.seal(header, payload)
        self.sealing_s += time.perf_counter() - started
        self.sent_bytes += len(message)
        if len(message) > _DIRECT_WRITE_BYTES:
            self._writing = asyncio.ensure_future(write_message(self._stream, message, self._who))
            await asyncio.sleep(0)
            return
        try:
            await write_message(self._stream, message, self._who)
        except BaseException:
            self._end()
            raise

    async def _written(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            await writing
        except GanglionError:
            self._end()
            raise

    async def receive(self, expected: Expectation, into: NDArray[Any] | None = None) -> Any:
        """The one frame that may come now.

        A tensor comes as an array [rows, columns] of the expected dtype: `into`, filled, when it is given
        (C-contiguous, of that shape and dtype), otherwise a new read-only one. A message comes as bytes.
        """
        message = await self._read()
        with _Ending(self):
            header = check(message, expected, self._inward)
            if header.kind in (Kind.ERROR, Kind.CLOSE) and header.kind != expected.kind:
                raise self._farewell(header, message)
            if into is None or header.dtype == Dtype.BYTES:
                payload = self._open(message)
                if header.dtype == Dtype.BYTES:
                    return payload
                return np.frombuffer(payload, numpy_dtype(header.dtype)).reshape(header.rows, header.columns)
            self._open_into(message, into)
            return into

    async def receive_any(
        self, kinds: Collection[Kind] = (Kind.STEP,), largest_bytes: int = CONTROL_MESSAGE_BYTES
    ) -> Message:
        """A message of one of `kinds`, of any step: how a follower waits for the lead, and judges the step.

        The peer's CLOSE is returned when it is one of `kinds`, and raises DeviceLost otherwise.
        """
        message = await self._read()
        with _Ending(self):
            header = parse(message, self._inward)
            if header.kind is Kind.ERROR or (header.kind is Kind.CLOSE and Kind.CLOSE not in kinds):
                raise self._farewell(header, message)
            if header.kind not in kinds or header.dtype != Dtype.BYTES or header.payload_bytes > largest_bytes:
                raise ProtocolViolation(
                    f"a {header.kind.name} frame of {header.payload_bytes} bytes from {self._who}, expected a message "
                    f"of {', '.join(kind.name for kind in kinds)} of at most {largest_bytes} bytes"
                )
            payload = self._open(message)
            if header.kind is Kind.CLOSE:
                self._end()
            return Message(header.kind, header.step, header.exchange, payload)

    async def _read(self) -> bytes:
        if self._ended.is_set():
            raise DeviceLost(f"the lane to {self._who} is closed")
        try:
            message = await read_message(self._stream, self._who)
        except BaseException:  # a cancelled wait too: gRPC ends the call with it
            self._end()
            raise
        self.received_bytes += len(message)
        if self._writing is not None and self._writing.done():
            await self._written()
        return message

    def _open(self, message: bytes) -> bytes:
        started = time.perf_counter()
        payload = self._opener.open(message[:HEADER_BYTES], memoryview(message)[HEADER_BYTES:])
        self.sealing_s += time.perf_counter() - started
        return payload

    def _open_into(self, message: bytes, into: NDArray[Any]) -> None:
        started = time.perf_counter()
        target = into.data.cast("B")
        self._opener.open_into(message[:HEADER_BYTES], memoryview(message)[HEADER_BYTES:], target)
        self.sealing_s += time.perf_counter() - started

    def _farewell(self, header: Header, message: bytes) -> GanglionError:
        payload = self._open(message)
        if header.kind is Kind.CLOSE:
            return DeviceLost(f"{self._who} closed the lane")
        try:
            return from_body(msgspec.json.decode(payload, type=ErrorBody))
        except msgspec.DecodeError:
            return ProtocolViolation(f"{self._who} ended the lane with an error that does not parse")

    def _end(self) -> None:
        self._ended.set()

    async def close(self, error: GanglionError | None = None) -> None:
        """End the lane: say why (`error`) or that it is over, release the stream. Never raises; may be repeated."""
        if self._closing:
            return
        self._closing = True
        try:
            if not self._ended.is_set():
                async with asyncio.timeout(_CLOSE_S):
                    if error is None:
                        await self.send_message(Kind.CLOSE, 0, b"")
                    else:
                        await self.send_message(Kind.ERROR, 0, msgspec.json.encode(to_body(error)))
                    await self._written()
        except (GanglionError, TimeoutError):
            pass  # the peer is gone already, or does not read: the stream is cut below
        finally:
            self._end()
            if self._writing is not None:
                self._writing.cancel()
                await asyncio.wait({self._writing})
            await self._shut()


class _Ending:
    """Marks the lane as over when the block raises an error of the tree."""

    __slots__ = ("_lane",)

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GanglionError):
            self._lane._end()


async def dial_lane(
    address: str,
    identity: Identity,
    peer: VerifiedRecord,
    *,
    deployment: str,
    epoch: int,
    own_rank: int,
    peer_rank: int,
) -> Lane:
    """Dial the worker of `peer` at `address` (host:port) and seal a lane of this deployment and epoch.

    Raises Unreachable, Unauthenticated (another sealing key, deployment or epoch), what the peer refuses with
    (Conflict for a stale epoch), ProtocolViolation.
    """
    dialled = rpc.channel(address, identity, peer=(peer.node_id, peer.role), kind="tensor")
    call: Any = None
    try:
        call = dialled.stream_stream(METHOD)()
        opening = lane_pb2.Opening(deployment=deployment, epoch=epoch, source=own_rank, destination=peer_rank)
        try:
            conversation = await open_conversation(call, identity, peer, "lane", opening)
        except DeviceLost as error:
            # Before anything was said it is the address that is in question, not the device.
            if isinstance(error.__cause__, grpc.aio.AioRpcError):
                raise rpc.to_error(error.__cause__, address) from error
            raise
    except BaseException:
        if call is not None:
            call.cancel()
        await dialled.close()
        raise

    async def shut() -> None:
        # A cancelled call throws away what its peer has not read yet: half-close, and give the peer a moment.
        try:
            async with asyncio.timeout(_CLOSE_S / 2):
                await call.done_writing()
                await call.code()
        except (TimeoutError, *BROKEN):
            pass
        finally:
            call.cancel()
            await dialled.close()

    lane = Lane(call, conversation, own_rank, peer_rank, shut)
    call.add_done_callback(lambda _call: lane._end())
    return lane


# (node id, deployment, epoch, caller's rank, own rank as the caller sees it) -> the caller's record; raises a refusal
Accept = Callable[[str, str, int, int, int], VerifiedRecord]


class LaneServicer:
    """The accepting side: checks the caller, seals, hands the lane over, and keeps the stream until it is closed.

    `accept(node_id, deployment, epoch, rank, own_rank)` returns the caller's verified record, or raises: Conflict for a
    stale epoch, PermissionDenied for a stranger. `deliver(lane)` gets each sealed lane.
    """

    def __init__(self, identity: Identity, accept: Accept, deliver: Callable[[Lane], None]) -> None:
        self._identity = identity
        self._accept = accept
        self._deliver = deliver

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve `/ganglion.v1.Lane/Exchange` there, as raw bytes."""
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._exchange)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_NAME: handler}),))

    async def _exchange(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        node_id = peer_of(context).node_id

        def accept(opening: lane_pb2.Opening) -> VerifiedRecord:
            return self._accept(node_id, opening.deployment, opening.epoch, opening.source, opening.destination)

        stream: Any = context
        conversation = await accept_conversation(stream, self._identity, node_id, "lane", accept)
        own, peer = conversation.opening.destination, conversation.opening.source
        lane = Lane(stream, conversation, own, peer, _nothing)
        try:
            self._deliver(lane)
            await lane.wait_closed()
        finally:
            lane._end()


async def _nothing() -> None:
    """The handler itself ends the call when its lane is closed."""


def stale_epoch(deployment: str, epoch: int, current: int) -> Conflict:
    """The refusal of a lane or session of an epoch that is not the present one."""
    return Conflict(f"deployment {deployment} is at epoch {current}; epoch {epoch} is refused")
