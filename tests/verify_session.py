"""The client's end of a verify session: it checks every outcome, and a test says what it drafts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ganglion.proto import lane_pb2
from ganglion.wire.nouns import digest, tokenizer_digest
from ganglion.wire.prefixes import Prefix

DEADLINE_S = 20.0


def contract(manifest: Any, **changes: Any) -> lane_pb2.Contract:
    fields = {
        "manifest_digest": digest(manifest),
        "numeric_class": manifest.numeric_class.name,
        "tokenizer_digest": tokenizer_digest(manifest),
        "vocab": manifest.geometry.vocab,
        "miss": lane_pb2.MISS_WAIT,
    }
    return lane_pb2.Contract(**(fields | changes))


def opening(manifest: Any, prompt: Sequence[int], count: int, *, answered: int = 0, terms: Any = None, **sampling: Any):
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
    return lane_pb2.Open(
        prompt=prompt,
        max_tokens=count,
        sampling=lane_pb2.Sampling(**described),
        answered=answered,
        contract=contract(manifest, **(terms or {})),
    )


@dataclass
class Device:
    """Follows a verify session; `draft` says what is sent after each outcome."""

    tokens: list[int] = field(default_factory=list)
    told: list[lane_pb2.Token] = field(default_factory=list)
    outcomes: list[lane_pb2.Outcome] = field(default_factory=list)
    terms: lane_pb2.Terms | None = None
    finished: lane_pb2.Finished | None = None
    spent: int = 0

    async def run(self, client: Any, request: lane_pb2.Open, draft: Any, leave_after: int = 10_000) -> None:
        opened = await client.open(request)
        prefix = Prefix.of(request.prompt)
        async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(opened.events()) as events:
            async for event in events:
                match event.WhichOneof("body"):
                    case "accepted":
                        self.terms = event.accepted.terms
                        assert self.terms.prefix == prefix.name
                    case "tokens":
                        outcome, ids = event.tokens.outcome, [token.id for token in event.tokens.tokens]
                        self.tokens += ids
                        self.told += event.tokens.tokens
                        self.outcomes.append(outcome)
                        prefix = prefix.through(ids)
                        self.spent -= outcome.credits
                        assert outcome.prefix == prefix.name
                        assert outcome.round == len(self.outcomes)
                        assert outcome.accepted <= outcome.drafted
                        assert outcome.own + outcome.beside <= outcome.drafted
                        assert outcome.branched <= (outcome.beside > 0)
                        assert len(ids) <= outcome.accepted + 1
                        assert outcome.queued <= self.spent
                        if len(self.outcomes) == leave_after:
                            return
                        drafts = draft(self, prefix)
                        if drafts is not None:
                            self.spent += sum(len(branch.tokens) for branch in drafts.branches)
                            await opened.send_drafts(drafts)
                    case "finished":
                        self.finished = event.finished
