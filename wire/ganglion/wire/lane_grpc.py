"""The lane that is always there: one kept gRPC stream, a message a frame."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from ganglion.wire.conversation import Conversation, Stream, read_message, write_message
from ganglion.wire.errors import GanglionError
from ganglion.wire.frames import HEADER_BYTES, check_carried
from ganglion.wire.lane import Lane

# Two ends that each wait for a large write before they read would wait for ever: HTTP/2 has a window.
_DIRECT_WRITE_BYTES: Final = 32 << 10


class GrpcLane(Lane):
    """A lane over `stream`; `abandon` ends the call without a word, `shut` releases it and its channel.

    gRPC ends a call whose reader is cancelled, and a lane with it.
    """

    medium = "grpc"

    def __init__(
        self,
        stream: Stream,
        conversation: Conversation,
        own_rank: int,
        peer_rank: int,
        *,
        abandon: Callable[[], object],
        shut: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(conversation, own_rank, peer_rank)
        self._stream = stream
        self._abandon = abandon
        self._release = shut
        self._writing: asyncio.Task[None] | None = None
        self._message_read = b""

    def cut(self) -> None:
        """End lane and call at once."""
        self._end()
        self._abandon()

    async def _send(self, header: bytes, payload: bytes | memoryview) -> None:
        if self._writing is not None:
            await self._written()
        if self._ended.is_set():
            raise self._over()
        started = time.perf_counter()
        message = header + self._sealer.seal(header, payload)
        self.sealing_s += time.perf_counter() - started
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

    async def _header(self) -> bytes:
        if self._ended.is_set():
            raise self._over()
        self._message_read = await read_message(self._stream, self._who)
        if self._writing is not None and self._writing.done():
            await self._written()
        return self._message_read[:HEADER_BYTES]

    async def _sealed(self, payload_bytes: int) -> memoryview:
        check_carried(payload_bytes, len(self._message_read))
        return memoryview(self._message_read)[HEADER_BYTES:]

    async def _shut(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait({self._writing})
        await self._release()
