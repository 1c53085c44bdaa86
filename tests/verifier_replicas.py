"""Verifier replicas as processes of their own, a router in front of them, and a device that drafts for them."""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ganglion.agent.speculation.http.rounds import RoundStream, RoundVerifier
from ganglion.proto import lane_pb2
from ganglion.wire.nouns import Manifest, digest, tokenizer_digest
from ganglion.wire.prefixes import Prefix

SCRIPT = Path(__file__).parents[1] / "deploy" / "ray" / "replica.py"
DEADLINE_S = 60.0


@dataclass
class Process:
    """`deploy/ray/replica.py` with its port."""

    process: asyncio.subprocess.Process
    port: int

    @classmethod
    async def start(cls, store: Path, model: str, *more: str) -> Process:
        arguments = ["--store", str(store), "--model", model, "--port", "0", "--threads", "1", *more]
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(SCRIPT), *arguments, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = (await process.stdout.readline()).decode()
        assert " is verified on http://" in line, line
        return cls(process, int(line.rsplit(":", 1)[1]))

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()


@dataclass
class Router:
    """Sends a round to the replica that its session's hash chooses of those that live, as Serve's router does."""

    replicas: Sequence[Process]
    seen: dict[str, list[int]] = field(default_factory=dict)  # session -> ports, in order
    port: int = 0
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Router:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def chosen(self, session: str) -> Process:
        living = [one for one in self.replicas if one.process.returncode is None]
        return max(living, key=lambda one: hashlib.sha256(f"{session} {one.port}".encode()).digest())

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
                body = await reader.readexactly(int(lines.get("Content-Length", "0")))
                session = lines.get("x-session-id", "")
                replica = self.chosen(session)
                if session:
                    self.seen.setdefault(session, []).append(replica.port)
                theirs, ours = await asyncio.open_connection("127.0.0.1", replica.port)
                try:
                    ours.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + body)
                    answer = await theirs.read()
                finally:
                    ours.close()
                writer.write(answer)
                await writer.drain()
                return  # it said that it would close
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)


@dataclass
class Device:
    """Drafts what it knows to follow (`answer`), wrong in every `wrong`th token; 0: never."""

    manifest: Manifest
    answer: Sequence[int]
    wrong: int = 4
    window: int = 4

    async def tokens(self, verifier: RoundVerifier, prompt: Sequence[int], on_pass: Any = None, **sampling: Any):
        """(tokens, Finished, the stream) of one answer."""
        described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
        contract = lane_pb2.Contract(
            manifest_digest=digest(self.manifest),
            numeric_class=self.manifest.numeric_class.name,
            tokenizer_digest=tokenizer_digest(self.manifest),
            vocab=self.manifest.geometry.vocab,
            window_tokens=self.window,
            miss=lane_pb2.MISS_WAIT,
        )
        wanted = lane_pb2.Open(
            request_id="r",
            prompt=prompt,
            max_tokens=len(self.answer),
            sampling=lane_pb2.Sampling(**described),
            contract=contract,
        )
        stream: RoundStream = await verifier.open(wanted)
        found: list[int] = []
        prefix = Prefix.of(list(prompt))
        try:
            async for event in stream.events():
                if event.WhichOneof("body") == "finished":
                    return found, event.finished, stream
                ids = [token.id for token in event.tokens.tokens]
                found += ids
                prefix = prefix.through(ids)
                assert event.tokens.outcome.prefix == prefix.name
                if on_pass is not None:
                    await on_pass(len(found), stream)
                await stream.send(self._drafts(event.tokens.outcome.round, prefix, len(found)))
        finally:
            await stream.close()
        raise AssertionError("no finished event")

    def _drafts(self, round_: int, prefix: Prefix, at: int) -> lane_pb2.Drafts:
        vocab = self.manifest.geometry.vocab
        told = [
            (token + 1) % vocab if self.wrong and (at + index) % self.wrong == self.wrong - 1 else token
            for index, token in enumerate(self.answer[at : at + self.window])
        ] or [0]
        return lane_pb2.Drafts(round=round_, branches=[lane_pb2.Branch(parent=prefix.name, tokens=told)])
