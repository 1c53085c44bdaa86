"""Edge experts of bench/edge_latency.py: OpenAI-compatible servers whose tokens take a set time, each behind a link.

A server speaks HTTP/1.1 with kept connections, streams one event per token, answers `slots` requests at a time and lets
the others wait in order. A link is a TCP proxy: every part that passes takes half a round trip, drawn within `jitter`
of it, keeps its order, and with the chance `stall` waits for a retransmission more; a new connection waits a round trip
for its handshake. Nothing computes: times are waited for, so that they are right beside other load.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final

RETRANSMIT_S: Final = 0.2  # Linux's least
PART_BYTES: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Way:
    """A link: round trip, its spread either side as a share, and the chance that a part has to be sent again."""

    rtt_s: float = 0.0
    jitter: float = 0.3
    stall: float = 0.01

    def delay_s(self, chance: random.Random) -> float:
        """Of one part, one way."""
        if not self.rtt_s:
            return 0.0
        again_s = max(RETRANSMIT_S, 2.0 * self.rtt_s) if chance.random() < self.stall else 0.0
        return self.rtt_s / 2.0 * chance.uniform(1.0 - self.jitter, 1.0 + self.jitter) + again_s


@dataclass(kw_only=True)
class Make:
    """What a server is. prompt_s, token_s: of one answer; spread: of both, a standard deviation of logarithms.

    claims: times faster than it is, in what its owner says of it. accuracy: how often it says what is right.
    """

    name: str
    way: Way
    token_s: float
    prompt_s: float = 0.03
    spread: float = 0.1
    slots: int = 2
    energy_j: float = 1.0  # per token
    domains: tuple[str, ...] = ()
    claims: float = 1.0
    accuracy: float = 0.7


@dataclass
class EdgeServer:
    """One server behind its link; within `serve`. slow: times slower than it was made."""

    make: Make
    seed: int
    slow: float = 1.0
    tokens: int = 0
    answers: int = 0
    port: int = 0
    waiting: int = 0
    _chance: random.Random = field(init=False)
    _free: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._free = asyncio.Semaphore(self.make.slots)

    @property
    def url(self) -> str:
        """Of the near end of its link."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def energy_j(self) -> float:
        """Of all tokens that it made."""
        return self.tokens * self.make.energy_j

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[EdgeServer]:
        """Listen."""
        peers = _Peers()
        far = await asyncio.start_server(peers.tracked(self._talk), "127.0.0.1", 0)
        there = far.sockets[0].getsockname()[1]

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._carry(reader, writer, there)

        near = await asyncio.start_server(peers.tracked(carry), "127.0.0.1", 0)
        self.port = near.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            near.close()
            far.close()
            await peers.end()

    # The link

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, there: int) -> None:
        await asyncio.sleep(self.make.way.rtt_s)
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", there)
        ways = [
            asyncio.create_task(self._one_way(source, sink))
            for source, sink in ((reader, far_writer), (far_reader, writer))
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ways:
                task.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.close()

    async def _one_way(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def give() -> None:
            while True:
                due_s, part = await parts.get()
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                if not part:
                    return
                sink.write(part)
                await sink.drain()

        giving, due_s = asyncio.create_task(give()), 0.0
        try:
            while not giving.done():
                part = await source.read(PART_BYTES)
                due_s = max(due_s, loop.time() + self.make.way.delay_s(self._chance))
                parts.put_nowait((due_s, part))
                if not part:
                    await giving
        finally:
            giving.cancel()
            await asyncio.gather(giving, return_exceptions=True)

    # The server

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().split("\r\n")
            length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
            document = json.loads(await reader.readexactly(length)) if length else {}
            if not lines[0].startswith("POST"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                continue
            self.waiting += 1
            try:
                async with self._free:
                    await self._answer(document, writer)
            finally:
                self.waiting -= 1

    async def _answer(self, document: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        make, loop = self.make, asyncio.get_running_loop()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        most = int(document.get("max_tokens", 16))
        word = "right" if self._chance.random() < make.accuracy else f"wrong-{make.name}"
        due_s = loop.time() + self._drawn(make.prompt_s)
        for at in range(most):
            due_s += self._drawn(make.token_s)
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            choice: dict[str, Any] = {"index": 0, "delta": {"content": f"{word} "}, "finish_reason": None}
            if at == most - 1:
                choice["finish_reason"] = "length"
            if document.get("logprobs"):
                choice["logprobs"] = {"content": [{"token": word, "logprob": -self._chance.uniform(0.2, 0.9)}]}
            await self._event(writer, {"choices": [choice]})
            self.tokens += 1
        await self._event(writer, {"choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": most}})
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        self.answers += 1

    async def _event(self, writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
        if writer.is_closing():
            raise ConnectionResetError
        writer.write(_chunk(b"data: " + json.dumps(document).encode() + b"\n\n"))
        await writer.drain()

    def _drawn(self, time_s: float) -> float:
        return self.slow * time_s * math.exp(self._chance.gauss(0.0, self.make.spread))


def _chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


class _Peers:
    """Connections that are open, to be ended together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def tracked(self, handler: Handler) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("a connection has no task")
            self._tasks.add(task)
            try:
                # A client that goes away is no fault.
                with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                    await handler(reader, writer)
            finally:
                writer.close()
                self._tasks.discard(task)

        return handle

    async def end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
