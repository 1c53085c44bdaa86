"""The device of bench/speculation.py: opens sessions at the verifier over a link, drafting for them as it is told.

JSON lines: it says {"ready": …}, takes {"mode", "asks": [{"prompt", "tokens", "sampling"}, …]} and answers with what
became of each ask, all of a line having run at once, each on a device of its own where there are several.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from padded import block_until, drafter_of, due_s, wait_until

from ganglion.agent.executor.loader import start_runtime
from ganglion.agent.speculation.engine import DraftEngine
from ganglion.agent.speculation.guessing import Ask, Guess
from ganglion.agent.speculation.hybrid import Hybrid, Policy, Target
from ganglion.agent.speculation.pool import DraftPool, Seat
from ganglion.agent.speculation.tree import Node
from ganglion.agent.speculation.verifier import AgentVerifier
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, digest, from_json, tokenizer_digest
from ganglion.wire.session import SessionClient

Guessed = tuple[Sequence[tuple[Seat, Node, Ask]], list[Guess], float]


class PaddedPool(DraftPool):
    """A pool whose steps take `token_s`: what they gave is taken when they are over, and outcomes may come before."""

    def __init__(self, guesser: DraftEngine, setup: dict[str, Any]) -> None:
        super().__init__(guesser)
        self._token_s, self._rows, self._blocking = setup["token_ms"] / 1e3, setup["step_rows"], setup["blocking"]
        self._given: Guessed | None = None

    def _guess(self, asked: Sequence[tuple[Seat, Node, Ask]]) -> None:
        if not self._token_s:
            super()._guess(asked)
            return
        began = time.perf_counter()
        self._given = asked, self._guesser.step([ask for _, _, ask in asked]), began

    async def _run(self) -> None:
        try:
            await self._steps()
        except Exception:  # noqa: BLE001 - the bench is to end, where answers would go on without drafts
            traceback.print_exc()
            os._exit(1)

    async def _steps(self) -> None:
        while self._seats:
            self._woken.clear()
            worked = self._step()
            if self._given is not None:
                asked, guesses, began = self._given
                self._given, due = None, due_s(began, self._token_s, len(asked) / self._rows)
                if self._blocking:
                    block_until(due)
                else:
                    await wait_until(due)
                self._take(asked, guesses, time.perf_counter() - began)
            if not worked:
                await self._woken.wait()
            for _ in range(4):
                await asyncio.sleep(0)

    def _take(self, asked: Sequence[tuple[Seat, Node, Ask]], guesses: Sequence[Guess], took_s: float) -> None:
        for knowledge in {id(seat): seat.drafting.pilot.knowledge for seat, _, _ in asked}.values():
            knowledge.drafts.measured(len(asked), took_s)
        for (seat, node, _), guess in zip(asked, guesses, strict=True):
            seat.drafting.guessed(node, guess)  # of a node that an outcome has dropped: nobody comes by there any more
            seat.changed()


@dataclass
class Told:
    """What arrived of a session: ids, when each event came (seconds after Open), tokens of each."""

    ids: list[int]
    at_s: list[float]
    counts: list[int]
    finished: dict[str, Any]

    @property
    def document(self) -> dict[str, Any]:
        return {"ids": self.ids, "at_s": self.at_s, "counts": self.counts, **self.finished}


def turned(engine: DraftEngine, how: str) -> DraftEngine:
    """The engine, or one that guesses at random, or one whose first guess is its second: it changes times, no token."""
    computed = engine.step

    def other(tokens: tuple[int, ...], at: int) -> tuple[int, ...]:
        if how == "random":
            return tuple((token * 31 + at * 17) % engine.vocab for token in tokens[:1])
        return (*tokens[1:2], *tokens[:1], *tokens[2:])

    def step(asks: Sequence[Ask]) -> list[Guess]:
        pairs = zip(computed(asks), asks, strict=True)
        return [replace(one, tokens=other(one.tokens, len(ask.tokens))) for one, ask in pairs]

    if how != "good":
        engine.step = step  # type: ignore[method-assign]
    return engine


class Device:
    """One device: the verifier as it knows it, and its drafter."""

    def __init__(self, setup: dict[str, Any], identity: Identity, number: int) -> None:
        lead = identity_pb2.Peer(
            record=identity_pb2.SignedRecord.FromString(bytes.fromhex(setup["record"])),
            address=setup["address"],
            name="verifier",
        )
        where = lead, setup["deployment"], setup["epoch"]
        self._client = SessionClient(identity, *where)
        self._verifier = AgentVerifier(identity, *where)
        manifest = from_json(Manifest, setup["target"].encode(), limit_bytes=MANIFEST_BYTES)
        target = Target(
            manifest.name,
            digest(manifest),
            manifest.numeric_class.name,
            tokenizer_digest(manifest),
            manifest.geometry.vocab,
            setup["context"],
            frozenset(manifest.eos_ids) if setup["stops"] else frozenset(),
        )
        engine = turned(drafter_of(setup, slots=8, number=number), setup["drafts"])
        self.hybrid = Hybrid(engine, lambda: self._verifier, None, target)
        self.hybrid._pool = PaddedPool(engine, setup)
        self._window = setup["window"]

    async def ask(self, mode: str, ask: dict[str, Any]) -> Told:
        """A session; alone, and own where windows are as the verifier likes: without anything of the device's."""
        request = lane_pb2.Open(
            request_id="bench",
            prompt=ask["prompt"],
            max_tokens=ask["tokens"],
            sampling=lane_pb2.Sampling(**{"top_p": 1.0, "top_logprobs": -1} | ask["sampling"]),
        )
        if mode == "alone" or (mode == "own" and not self._window):
            return await listen(self._client.run(request))
        forced: Any = None if mode == "auto" else mode
        self.hybrid.policy = replace(Policy(), mode=forced, away=lane_pb2.AWAY_FAIL, window_tokens=self._window)
        return await listen(self.hybrid.serve(request, "bench"))

    async def close(self) -> None:
        await self.hybrid.close()
        await self._client.close()
        await self._verifier.close()


async def listen(events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> Told:
    """Take a session's events to its end."""
    began, told = time.perf_counter(), Told([], [], [], {})
    async with aclosing(events) as stream:
        async for event in stream:
            kind = event.WhichOneof("body")
            if kind == "tokens" and event.tokens.tokens:
                told.at_s.append(time.perf_counter() - began)
                told.counts.append(len(event.tokens.tokens))
                told.ids += [token.id for token in event.tokens.tokens]
            elif kind == "finished":
                said = MessageToDict(event.finished.speculation, preserving_proto_field_name=True)
                told.finished = {"speculation": said}
    return told


async def serve(setup: dict[str, Any]) -> None:
    """Until standard input ends."""
    start_runtime(1)
    identity = Identity.load(Home(Path(setup["home"])).identity)
    devices = [Device(setup, identity, number) for number in range(setup["devices"])]
    loop = asyncio.get_running_loop()
    print(json.dumps({"ready": True}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        wanted = json.loads(line)
        each = [devices[at % len(devices)].ask(wanted["mode"], ask) for at, ask in enumerate(wanted["asks"])]
        found = await asyncio.gather(*each)
        print(json.dumps([one.document for one in found]), flush=True)
    for device in devices:
        await device.close()
