"""Answers that go out while they are made: server-sent events, a bounded queue, a client that leaves or is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ganglion.gateway.choices import Numbered
from ganglion.gateway.failures import describe, known
from ganglion.wire.errors import Exhausted
from ganglion.wire.limits import EVENTS_QUEUED

SLOW_READER_S = 10.0  # to read what was queued, after its generation was cancelled
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled and ClientDisconnect raised.

    The request's body must have been read.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        for task in (doing, leaving):
            if not task.done():
                task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Pump:
    """Takes parts as fast as they are made, whatever the client does; at most EVENTS_QUEUED wait for it.

    One more, and the generation is cancelled: the client gets what is queued, then the error.
    """

    def __init__(self, parts: AsyncGenerator[Numbered, None]) -> None:
        self._queue: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue()
        self.overflowed = asyncio.Event()
        self._task = asyncio.create_task(self._run(parts))

    async def next(self) -> Numbered | None:
        """The next part, None at the end; raises what the generation raised."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def close(self) -> None:
        """End the generation, if it is not over."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, parts: AsyncGenerator[Numbered, None]) -> None:
        last: BaseException | None = None
        try:
            async with aclosing(parts):
                async for part in parts:
                    if self._queue.qsize() >= EVENTS_QUEUED:
                        self.overflowed.set()
                        last = Exhausted(f"{EVENTS_QUEUED} events wait for this client: it reads too slowly")
                        break
                    self._queue.put_nowait(part)
        except Exception as error:  # noqa: BLE001  (raised again where the client is answered)
            last = error
        self._queue.put_nowait(last)


class EventStream(Response):
    """A response of server-sent events; a failure becomes an event {"error": ...} and the stream ends."""

    media_type = "text/event-stream"

    def __init__(self, pump: Pump, chunks: AsyncIterator[Any]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pump = pump
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, the client's leaving, or its slowness."""
        try:
            await unless_gone(receive, self._send(send))
        finally:
            await self._pump.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_events(send))
        slow = asyncio.ensure_future(self._pump.overflowed.wait())
        try:
            await asyncio.wait({sending, slow}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                async with asyncio.timeout(SLOW_READER_S):
                    await asyncio.shield(sending)
            sending.result()
        except TimeoutError:
            return  # without the end of the body: the server closes the connection
        finally:
            for task in (sending, slow):
                task.cancel()
            await asyncio.gather(sending, slow, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        try:
            async for chunk in self._chunks:
                await _send_body(send, event(chunk))
        except Exception as error:  # noqa: BLE001  (of the tree or made Internal by `known`)
            await _send_body(send, event(describe(known(error))))
        else:
            await _send_body(send, DONE)
        await _send_body(send, b"", more=False)


async def _send_body(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
