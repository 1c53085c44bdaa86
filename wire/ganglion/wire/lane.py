"""Lanes: the sealed stream between two workers of one epoch; one a pair, dialled by the lower rank.

What both kinds share: frames, sealing, checks and farewells. `lane_grpc` is the kind that is always there,
`lane_socket` the quick one of the local network, `lane_opening` how a lane comes to be.

A lane is used by one task at a time for sending and one for receiving: reading and writing happen in the task that
waits, without a queue or a reader task between. The stream's order is the frames' order.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganglion.wire.conversation import Conversation
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
    OVERHEAD_BYTES,
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
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES

CLOSE_S: Final = 1.0
_AS_CONTROL: Final[Mapping[Kind, int]] = MappingProxyType({})

__all__ = ["CLOSE_S", "Dtype", "Expectation", "Kind", "Lane", "Message", "stale_epoch"]


@dataclass(frozen=True, slots=True)
class Message:
    """A received message frame."""

    kind: Kind
    step: int
    exchange: int
    payload: bytes


class Lane(ABC):
    """One end of a lane. `sealing_s` adds up the seconds spent sealing and opening; bytes are of frames and their tags.

    Every method raises DeviceLost when the peer is gone (at once, also while waiting), the peer's own error when it
    ended the lane with one, and ProtocolViolation for a frame that the step did not announce; after any of these the
    lane is over. So it is after a cancelled wait.
    """

    medium: ClassVar[Literal["grpc", "socket"]]

    def __init__(self, conversation: Conversation, own_rank: int, peer_rank: int) -> None:
        self.peer = conversation.peer
        self.deployment: str = conversation.opening.deployment
        self.epoch: int = conversation.opening.epoch
        self.own_rank = own_rank
        self.peer_rank = peer_rank
        self.sealing_s = 0.0
        self.sent_bytes = self.received_bytes = 0
        self._sealer = conversation.sealer
        self._opener = conversation.opener
        self._outward = Ends(self.epoch, own_rank, peer_rank)
        self._inward = Ends(self.epoch, peer_rank, own_rank)
        self._closing = False
        self._who = f"rank {peer_rank} ({conversation.peer.node_id})"
        self._ended = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether the lane is over: closed here or there, broken, or ended by a violation."""
        return self._ended.is_set()

    async def wait_closed(self) -> None:
        """Return when the lane is over; a broken stream is noticed by who reads, and mostly also here."""
        await self._ended.wait()

    async def send_tensor(self, kind: Kind, step: int, exchange: int, array: NDArray[Any]) -> None:
        """Send `array`: [rows, columns], C-contiguous. It may be changed as soon as this returns.

        Raises also Exhausted for an array beyond one frame (16 MiB).
        """
        await self._send(tensor_header(kind, self._outward, step, exchange, array), array.data.cast("B"))
        self.sent_bytes += OVERHEAD_BYTES + array.nbytes

    async def send_message(self, kind: Kind, step: int, payload: bytes | memoryview, exchange: int = 0) -> None:
        """Send a message, for example a serialized Step; raises also Exhausted beyond what one of its kind may be."""
        await self._send(message_header(kind, self._outward, step, exchange, len(payload)), payload)
        self.sent_bytes += OVERHEAD_BYTES + len(payload)

    async def flush(self) -> None:
        """Return when the stream has taken all that was sent: for who computes next, and only while the peer reads."""
        await self._written()

    async def receive(self, expected: Expectation, into: NDArray[Any] | None = None) -> Any:
        """The one frame that may come now.

        A tensor comes as an array [rows, columns] of the expected dtype: `into`, filled, when it is given
        (C-contiguous, of that shape and dtype), otherwise a new read-only one. A message comes as bytes.
        """
        try:
            packed = await self._header()
            if expected.dtype is not Dtype.BYTES and packed == expected.pack(self._inward):
                return await self._tensor(packed, expected, into)
            header = check(packed, expected, self._inward)  # a message: no tensor but the expected one passes
            payload = await self._message(packed, header)
            if header.kind in (Kind.ERROR, Kind.CLOSE) and header.kind != expected.kind:
                raise self._farewell(header, payload)
        except BaseException:  # a cancelled wait too
            self._end()
            raise
        return payload

    async def receive_any(
        self, kinds: Collection[Kind] = (Kind.STEP,), largest_bytes: Mapping[Kind, int] = _AS_CONTROL
    ) -> Message:
        """A message of one of `kinds`, of any step: how a follower waits for the lead, and judges the step.

        largest_bytes: of kinds whose messages may be larger or must be smaller than a control message. The peer's CLOSE
        is returned when it is one of `kinds`, and raises DeviceLost otherwise.
        """
        try:
            packed = await self._header()
            header = parse(packed, self._inward)
            ending = header.kind is Kind.ERROR or (header.kind is Kind.CLOSE and Kind.CLOSE not in kinds)
            wanted = ending or header.kind in kinds
            most = largest_bytes.get(header.kind, CONTROL_MESSAGE_BYTES)
            if not wanted or header.dtype != Dtype.BYTES or header.payload_bytes > most:
                raise ProtocolViolation(
                    f"a {header.kind.name} frame of {header.payload_bytes} bytes from {self._who}, expected a message "
                    f"of {', '.join(kind.name for kind in kinds)} of at most {most} bytes"
                )
            payload = await self._message(packed, header)
            if ending:
                raise self._farewell(header, payload)
        except BaseException:
            self._end()
            raise
        if header.kind is Kind.CLOSE:
            self._end()
        return Message(header.kind, header.step, header.exchange, payload)

    async def _tensor(self, packed: bytes, expected: Expectation, into: NDArray[Any] | None) -> NDArray[Any]:
        dtype = numpy_dtype(expected.dtype)
        sealed = await self._sealed(expected.rows * expected.columns * dtype.itemsize)
        started = time.perf_counter()
        if into is None:
            into = np.frombuffer(self._opener.open(packed, sealed), dtype).reshape(expected.rows, expected.columns)
        else:
            self._opener.open_into(packed, sealed, into.data.cast("B"))
        self.sealing_s += time.perf_counter() - started
        self.received_bytes += OVERHEAD_BYTES + into.nbytes
        return into

    async def _message(self, packed: bytes, header: Header) -> bytes:
        sealed = await self._sealed(header.payload_bytes)
        started = time.perf_counter()
        payload = self._opener.open(packed, sealed)
        self.sealing_s += time.perf_counter() - started
        self.received_bytes += OVERHEAD_BYTES + header.payload_bytes
        return payload

    def _farewell(self, header: Header, payload: bytes) -> GanglionError:
        if header.kind is Kind.CLOSE:
            return DeviceLost(f"{self._who} closed the lane")
        try:
            return from_body(msgspec.json.decode(payload, type=ErrorBody))
        except msgspec.DecodeError:
            return ProtocolViolation(f"{self._who} ended the lane with an error that does not parse")

    def _over(self) -> DeviceLost:
        return DeviceLost(f"the lane to {self._who} is closed")

    def _end(self) -> None:
        """The lane is over, for whoever waits for it; may be repeated."""
        self._ended.set()

    async def close(self, error: GanglionError | None = None) -> None:
        """End the lane: say why (`error`) or that it is over, release the stream. Never raises; may be repeated."""
        if self._closing:
            return
        self._closing = True
        try:
            if not self._ended.is_set():
                async with asyncio.timeout(CLOSE_S):
                    if error is None:
                        await self.send_message(Kind.CLOSE, 0, b"")
                    else:
                        await self.send_message(Kind.ERROR, 0, msgspec.json.encode(to_body(error)))
                    await self._written()
        except (GanglionError, TimeoutError):
            pass  # the peer is gone already, or does not read: the stream is cut below
        finally:
            self._end()
            await self._shut()

    # What a kind of lane does in its own way. After an error of any of these the lane is over.

    @abstractmethod
    async def _send(self, header: bytes, payload: bytes | memoryview) -> None:
        """Seal and send one frame; what the stream does not take at once goes on behind the caller's back."""

    @abstractmethod
    async def _written(self) -> None:
        """Return when the stream has taken everything that was sent."""

    @abstractmethod
    async def _header(self) -> bytes:
        """The next frame's header, as it came."""

    @abstractmethod
    async def _sealed(self, payload_bytes: int) -> bytes | memoryview:
        """The sealed payload of that frame, valid until the next frame is read."""

    @abstractmethod
    async def _shut(self) -> None:
        """Release the stream of a lane that is over."""


def stale_epoch(deployment: str, epoch: int, current: int) -> Conflict:
    """The refusal of a lane or session of an epoch that is not the present one."""
    return Conflict(f"deployment {deployment} is at epoch {current}; epoch {epoch} is refused")
