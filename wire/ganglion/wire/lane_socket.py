"""The quick lane of the local network: a TCP socket that belongs to the thread that computes.

An exchange crosses no other thread and no event loop: a frame is sealed and handed to the kernel at once, and whoever
waits for one looks for it again and again for a moment, then sleeps in the kernel for another, and only then waits by
the event loop. So a step's exchanges are quick, and a follower without work costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from typing import Final

from ganglion.wire.conversation import Conversation
from ganglion.wire.errors import DeviceLost
from ganglion.wire.frames import HEADER_BYTES
from ganglion.wire.lane import CLOSE_S, Lane
from ganglion.wire.lane_grpc import GrpcLane
from ganglion.wire.limits import FIRST_FRAME_S
from ganglion.wire.sealing import TAG_BYTES

SPIN_S: Final = 300e-6
IN_PLACE_S: Final = 0.02  # and asleep in the kernel; the event loop stands still so long at most
_SLOWEST_BYTES_PER_S: Final = 1 << 20  # of a frame that has begun
_BUFFER_BYTES: Final = 128 << 10
_LAST_WORDS_S: Final = 0.1

# Lanes of this process whose frames the kernel has not taken whole. While there are any nobody may wait in place: two
# ends that each wait for a large write before they read would wait for ever.
_UNSENT: Final[set[SocketLane]] = set()


class SocketLane(Lane):
    """A lane over the connected, non-blocking `connection`, whose keys are `conversation`'s.

    `carrier`, the lane inside which both ends agreed on this one, watches over the peer: each ends with the other.
    """

    medium = "socket"

    def __init__(
        self,
        connection: socket.socket,
        conversation: Conversation,
        own_rank: int,
        peer_rank: int,
        carrier: GrpcLane,
    ) -> None:
        super().__init__(conversation, own_rank, peer_rank)
        self._socket = connection
        self._fd = connection.fileno()
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._loop = asyncio.get_running_loop()
        # What came and is not read yet is _view[_start:_stop].
        self._view = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._stop = 0
        self._sealing = memoryview(bytearray(_BUFFER_BYTES))
        self._rest = memoryview(b"")  # of the frame in _sealing, not taken by the kernel
        self._readable: asyncio.Future[None] | None = None
        self._drained = asyncio.Event()
        self._carrier = carrier
        self._watch = asyncio.create_task(self._follow_carrier())

    # Sending.

    async def _send(self, header: bytes, payload: bytes | memoryview) -> None:
        try:
            while self._rest:
                await self._written()
        except BaseException:
            self._end()
            raise
        if self._ended.is_set():
            raise self._over()
        size = HEADER_BYTES + len(payload) + TAG_BYTES
        if size > len(self._sealing):
            self._sealing = memoryview(bytearray(size))
        frame = self._sealing[:size]
        started = time.perf_counter()
        frame[:HEADER_BYTES] = header
        self._sealer.seal_into(header, payload, frame[HEADER_BYTES:])
        self.sealing_s += time.perf_counter() - started
        try:
            sent = self._socket.send(frame)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._end()
            raise self._broke(error) from error
        if sent < size:
            self._rest = frame[sent:]
            self._drained.clear()
            _UNSENT.add(self)
            self._loop.add_writer(self._fd, self._push)

    def _push(self) -> None:
        """The kernel takes more of the rest: called by the event loop."""
        try:
            self._rest = self._rest[self._socket.send(self._rest) :]
        except BlockingIOError:
            return
        except OSError:
            self._end()  # who sends or reads next is told
            return
        if not self._rest:
            self._stop_pushing()

    def _stop_pushing(self) -> None:
        if self in _UNSENT:
            _UNSENT.discard(self)
            self._loop.remove_writer(self._fd)
        self._drained.set()

    async def _written(self) -> None:
        if self._rest:
            await self._drained.wait()
        if self._rest and self._ended.is_set():
            raise self._over()

    # Receiving.

    async def _header(self) -> bytes:
        if self._ended.is_set():
            raise self._over()
        await self._fill(HEADER_BYTES)
        start = self._start
        self._start = start + HEADER_BYTES
        return bytes(self._view[start : self._start])

    async def _sealed(self, payload_bytes: int) -> memoryview:
        size = payload_bytes + TAG_BYTES
        await self._fill(size, within_frame=True)
        start = self._start
        self._start = start + size
        return self._view[start : self._start]

    async def _fill(self, size: int, *, within_frame: bool = False) -> None:
        """Return when `size` bytes lie at _start, in one piece."""
        if self._stop - self._start >= size:
            return
        if self._start == self._stop:
            self._start = self._stop = 0
        elif self._start + size > len(self._view):
            held = self._stop - self._start
            self._view[:held] = self._view[self._start : self._stop]
            self._start, self._stop = 0, held
        if _UNSENT or not self._in_place(size):
            await self._by_loop(size, within_frame=within_frame)

    def _take(self, size: int) -> bool:
        """Take what is there of the `size` bytes and beyond; whether they are complete. Raises DeviceLost."""
        if self._stop == len(self._view):
            # Memory follows what came, never what was declared.
            larger = memoryview(bytearray(min(2 * self._stop, HEADER_BYTES + size)))
            larger[: self._stop] = self._view
            self._view = larger
        try:
            count = self._socket.recv_into(self._view[self._stop :])
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._broke(error) from error
        if count == 0:
            raise DeviceLost(f"{self._who} closed its socket")
        self._stop += count
        return self._stop - self._start >= size

    def _in_place(self, size: int) -> bool:
        """Whether the bytes came while this thread did nothing but look for them."""
        began = time.perf_counter()
        while True:
            if self._take(size):
                return True
            waited_s = time.perf_counter() - began
            if waited_s >= SPIN_S:
                break
        while waited_s < IN_PLACE_S and self._poll.poll((IN_PLACE_S - waited_s) * 1e3):
            if self._take(size):
                return True
            waited_s = time.perf_counter() - began
        return False

    async def _by_loop(self, size: int, *, within_frame: bool) -> None:
        deadline = None
        self._loop.add_reader(self._fd, self._wake)
        try:
            while not self._take(size):
                if self._ended.is_set():
                    raise self._over()
                if deadline is None and (within_frame or self._stop > self._start):
                    deadline = self._loop.time() + FIRST_FRAME_S + size / _SLOWEST_BYTES_PER_S
                self._readable = self._loop.create_future()
                async with asyncio.timeout_at(deadline):
                    await self._readable
        except TimeoutError:
            raise DeviceLost(
                f"{self._who} stopped within a frame: {self._stop - self._start} of {size} bytes came in time"
            ) from None
        finally:
            self._readable = None
            if self._fd >= 0:
                self._loop.remove_reader(self._fd)

    def _wake(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    # The end.

    def _broke(self, error: OSError) -> DeviceLost:
        return DeviceLost(f"the socket to {self._who} broke: {error.strerror or error}")

    async def _follow_carrier(self) -> None:
        await self._carrier.wait_closed()
        if not self._peer_left():
            # Its last words may still be on their way on this socket.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._ended.wait()
        self._end()

    def _peer_left(self) -> bool:
        try:
            return self._fd < 0 or not self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _end(self) -> None:
        if self._ended.is_set():
            return
        super()._end()
        self._stop_pushing()
        self._wake()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # the peer notices, after what was sent before
        self._carrier.cut()

    async def _shut(self) -> None:
        self._end()
        if self._fd >= 0:
            await self._until_peer_left()
            self._fd = -1
            self._socket.close()
        self._watch.cancel()
        await asyncio.wait({self._watch})
        await self._carrier._shut()

    async def _until_peer_left(self) -> None:
        """A socket closed on unread bytes throws away what its peer has not been sent yet: give it a moment."""
        await asyncio.sleep(0)  # whoever reads leaves first
        self._loop.add_reader(self._fd, self._wake)
        try:
            async with asyncio.timeout(CLOSE_S / 2):
                while True:
                    self._start = self._stop = 0
                    if not self._take(1):
                        self._readable = self._loop.create_future()
                        await self._readable
        except (DeviceLost, TimeoutError):
            pass
        finally:
            self._loop.remove_reader(self._fd)
