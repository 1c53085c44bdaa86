"""A session at the lead: its tokens, its limits, where its time went, and the events for its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ganglion.agent.lead.grammar import Constraint
from ganglion.agent.lead.sampler import Drawn
from ganglion.agent.lead.sampling import Sampling, parse_sampling
from ganglion.agent.lead.steering import Steering
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, Exhausted, GanglionError, InvalidRequest
from ganglion.wire.limits import EVENTS_QUEUED, TENANT_BYTES
from ganglion.wire.nouns import Manifest, Plan


@dataclass(frozen=True, slots=True)
class Request:
    """A checked Open. `limit_tokens`: prompt and answer together never exceed it. `grammar`: "" for none.

    `tenant`: whose prompts may share what is kept of them, as the gateway says.
    """

    prompt: tuple[int, ...]
    limit_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    grammar: str
    tenant: str


def parse_open(message: lane_pb2.Open, manifest: Manifest, plan: Plan) -> Request:
    """Check a gateway's request; raises InvalidRequest or ContextExceeded naming the field and its bound."""
    prompt = tuple(message.prompt)
    if not prompt:
        raise InvalidRequest("the prompt is empty; at least one token is needed", param="prompt")
    vocab = manifest.geometry.vocab
    if max(prompt) >= vocab:
        raise InvalidRequest(f"the prompt has token id {max(prompt)}; the vocabulary has {vocab}", param="prompt")
    if len(prompt) >= plan.context:
        raise ContextExceeded(
            f"the prompt has {len(prompt)} tokens and the context holds {plan.context}, answer included;"
            " shorten the prompt, or deploy with a longer --context",
            param="prompt",
        )
    if message.max_tokens < 1:
        raise InvalidRequest("max_tokens is 0; use at least 1", param="max_tokens")
    limit = min(len(prompt) + message.max_tokens, plan.context)
    if len(message.tenant.encode()) > TENANT_BYTES:
        raise InvalidRequest(f"tenant has {len(message.tenant.encode())} bytes, at most {TENANT_BYTES}", param="tenant")
    stop_ids = frozenset(message.stop_ids)
    if message.grammar:
        stop_ids |= frozenset(manifest.eos_ids)  # how a grammar ends
    sampling = parse_sampling(message.sampling, vocab)
    return Request(prompt, limit, sampling, stop_ids, message.grammar, message.tenant)


@dataclass(slots=True)
class Spent:
    """Seconds of a session, by what they were spent on, and bytes of frames on the lead's lanes."""

    queue_s: float = 0.0
    compute_s: float = 0.0
    exchange_s: float = 0.0
    seal_s: float = 0.0
    sample_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


class Session:
    """One run of tokens. Invariant: `ids` holds the prompt and every drawn token that did not stop the session."""

    def __init__(self, number: int, request: Request, constraint: Constraint | None) -> None:
        self.number = number
        self.request = request
        steered = request.sampling.penalized or constraint is not None
        self.steering = Steering(request.sampling, request.prompt, constraint) if steered else None
        self.ids = list(request.prompt)
        self.spent = Spent()
        self.ended = False
        self.cached_tokens = 0  # of the prompt: those that were not run again
        self._opened = time.perf_counter()
        self._first: float | None = None
        self._queue: asyncio.Queue[lane_pb2.Token | lane_pb2.Finished | GanglionError] = asyncio.Queue()

    def waited(self, now: float) -> None:
        """The session was admitted: what passed until now was the queue."""
        self.spent.queue_s += now - self._opened

    def add(self, drawn: Drawn) -> lane_pb2.FinishReason | None:
        """Take a drawn token; returns why the session ends with it, or None. A stop id is no part of the answer.

        Raises Exhausted when the client does not read, and what a grammar raises that cannot go on.
        """
        if self._first is None:
            self._first = time.perf_counter()
        if drawn.token in self.request.stop_ids:
            return lane_pb2.FINISH_REASON_STOP
        self.ids.append(drawn.token)
        top = [lane_pb2.TokenLogprob(id=one.token, logprob=one.logprob) for one in drawn.top]
        self._queue.put_nowait(lane_pb2.Token(id=drawn.token, logprob=drawn.logprob, top=top))
        if self._queue.qsize() > EVENTS_QUEUED:
            raise Exhausted(f"the client has not taken {EVENTS_QUEUED} tokens; its session is cancelled")
        if self.steering is not None and self.steering.drawn(drawn.token):
            return lane_pb2.FINISH_REASON_STOP
        return lane_pb2.FINISH_REASON_LENGTH if len(self.ids) >= self.request.limit_tokens else None

    def finish(self, reason: lane_pb2.FinishReason) -> None:
        """The session is over; the last event."""
        self.ended = True
        prompt = len(self.request.prompt)
        self._queue.put_nowait(
            lane_pb2.Finished(
                reason=reason,
                prompt_tokens=prompt,
                completion_tokens=len(self.ids) - prompt,
                cached_tokens=self.cached_tokens,
                timings=self._timings(),
            )
        )

    def fail(self, error: GanglionError) -> None:
        """The session cannot go on; `events` raises `error` after what was drawn before."""
        self.ended = True
        self._queue.put_nowait(error)

    @property
    def untold(self) -> bool:
        """Whether tokens wait that its stream has not taken."""
        return not self._queue.empty()

    def _timings(self) -> lane_pb2.Timings:
        wall, spent = time.perf_counter() - self._opened, self.spent
        parts = (spent.queue_s, spent.compute_s, spent.exchange_s, spent.seal_s, spent.sample_s)
        return lane_pb2.Timings(
            wall_s=wall,
            queue_s=spent.queue_s,
            compute_s=spent.compute_s,
            exchange_s=spent.exchange_s,
            seal_s=spent.seal_s,
            sample_s=spent.sample_s,
            other_s=max(0.0, wall - sum(parts)),
            ttft_s=(self._first or time.perf_counter()) - self._opened,
            sent_bytes=spent.sent_bytes,
            received_bytes=spent.received_bytes,
        )

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Tokens as they are drawn, those that wait in one event, then Finished; raises what `fail` was given."""
        while True:
            waiting = [await self._queue.get()]
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            tokens = [one for one in waiting if isinstance(one, lane_pb2.Token)]
            if tokens:
                drawn = lane_pb2.Tokens(tokens=tokens, cached_tokens=self.cached_tokens)
                yield lane_pb2.SessionEvent(tokens=drawn)
            last = waiting[-1]
            if isinstance(last, lane_pb2.Finished):
                yield lane_pb2.SessionEvent(finished=last)
                return
            if isinstance(last, GanglionError):
                raise last
