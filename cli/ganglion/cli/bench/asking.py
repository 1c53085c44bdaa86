"""One request as a user makes it, timed: prompts of exact token counts, every token with the moment it came."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from ganglion.cli.api import open_client, stream_of
from ganglion.cli.bench.figures import gaps
from ganglion.wire.errors import ProtocolViolation


@dataclass
class Timed:
    """An answer as it came: ids, and seconds since the request was sent, of each; `grown` is set with every chunk."""

    ids: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    timings: dict[str, Any] = field(default_factory=dict)
    grown: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.at_s[0]

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens."""
        return gaps(self.at_s)


class Prompts:
    """Random token ids, another prompt every time: what a cache of prefixes could know is not asked twice.

    A block of a prompt is that of an earlier one by chance alone, once in vocabulary^length. `seed` makes a run again;
    `special`: ids that are left out.
    """

    def __init__(self, vocab: int, seed: int, special: Sequence[int] = ()) -> None:
        self._ids = [token for token in range(vocab) if token not in set(special)]
        self._random = random.Random(seed)  # noqa: S311 - a prompt, not a secret

    def fresh(self, tokens: int) -> list[int]:
        """`tokens` ids."""
        return self._random.choices(self._ids, k=tokens)


class Asker:
    """Requests to one model over one API. Greedy, and nothing ends an answer but its length."""

    def __init__(self, client: httpx.AsyncClient, base: str, model: str) -> None:
        self._client = client
        self._base = base
        self.model = model

    async def ask(self, prompt: Sequence[int], tokens: int) -> Timed:
        """An answer of exactly `tokens`; raises ProtocolViolation for another length, and what the API says."""
        timed = await self.collect(prompt, tokens, Timed())
        if not timed.timings:
            raise ProtocolViolation(f"the API of {self.model} gives no timings: it is of another release")
        if len(timed.ids) != tokens:
            raise ProtocolViolation(f"{self.model} gave {len(timed.ids)} tokens of {tokens} that were asked for")
        return timed

    async def collect(self, prompt: Sequence[int], tokens: int, into: Timed) -> Timed:
        """The same into `into`, which grows while it runs; cancelled, it ends the session."""
        body = {
            "model": self.model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "return_timings": True,
        }  # fmt: skip
        started = time.perf_counter()
        async with contextlib.aclosing(stream_of(self._client, self._base, "completions", body)) as chunks:
            async for chunk in chunks:
                now = time.perf_counter() - started
                into.ids.extend(chunk.ids)
                into.at_s.extend([now] * len(chunk.ids))
                into.timings = chunk.timings or into.timings
                into.grown.set()
        return into

    async def together(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[Timed], float]:
        """All prompts at once: the answers, and the seconds until the last one was complete."""
        started = time.perf_counter()
        asked = [asyncio.create_task(self.ask(prompt, tokens)) for prompt in prompts]
        try:
            answers = await asyncio.gather(*asked)
        finally:
            await ended(asked)
        return answers, time.perf_counter() - started


async def ended(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel what still runs, and wait for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def asker(base: str, model: str) -> AsyncIterator[Asker]:
    """An asker whose connections are closed after the block."""
    async with open_client() as client:
        yield Asker(client, base, model)
