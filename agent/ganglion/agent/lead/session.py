"""A session at the lead: its tokens, its limits, where its time went, and the events for its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from ganglion.agent.lead.draw import Draw
from ganglion.agent.lead.grammar import Constraint
from ganglion.agent.lead.sampler import Drawn
from ganglion.agent.lead.steering import Steering
from ganglion.agent.speculation.contract import check_contract
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, Exhausted, GanglionError, InvalidRequest
from ganglion.wire.limits import EVENTS_QUEUED, TENANT_BYTES
from ganglion.wire.nouns import Manifest, Plan
from ganglion.wire.sampling.parameters import Sampling, parse_sampling


@dataclass(frozen=True, slots=True)
class Request:
    """A checked Open. `limit_tokens`: prompt and answer together never exceed it. `grammar`: "" for none.

    `tenant`: whose prompts may share what is kept of them, as the gateway says. `answered`: tokens at the end of
    `prompt` that were drawn before, of an answer that goes on. `contract`: the client drafts. `choosing`: it chooses.
    """

    prompt: tuple[int, ...]
    limit_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    grammar: str
    tenant: str
    answered: int = 0
    contract: lane_pb2.Contract | None = None
    choosing: lane_pb2.Choosing | None = None

    def draw(self, position: int) -> Draw:
        """What the shares are asked about the token at `position`, adjustments aside."""
        sampling = self.sampling
        if self.choosing is not None:
            return Draw(self.choosing.candidates, 0.0, 0, position, top_logprobs=0, keep=True)
        return Draw(
            sampling.candidates, sampling.temperature, sampling.seed, position, sampling.top_logprobs, sampling.mass
        )

    @property
    def asked_tokens(self) -> int:
        """Tokens of the prompt proper."""
        return len(self.prompt) - self.answered


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
    if message.answered >= len(prompt):
        raise InvalidRequest(f"answered is {message.answered} of {len(prompt)} tokens; the prompt is missing")
    contract = message.contract if message.HasField("contract") else None
    if contract is not None:
        check_contract(contract, manifest, plan.manifest_digest)
    stop_ids = frozenset(message.stop_ids)
    choosing = message.choosing if message.HasField("choosing") else None
    if choosing is not None:
        _check_choosing(message)
    if message.grammar:
        stop_ids |= frozenset(manifest.eos_ids)  # how a grammar ends
    sampling = Sampling() if choosing is not None else parse_sampling(message.sampling, vocab)
    answered, grammar = message.answered, message.grammar
    return Request(prompt, limit, sampling, stop_ids, grammar, message.tenant, answered, contract, choosing)


def _check_choosing(message: lane_pb2.Open) -> None:
    """Nothing else may draw, and nothing else end the answer, where the client chooses; raises InvalidRequest."""
    given = {field.name for field, _ in message.ListFields()}
    for field in ("sampling", "grammar", "stop_ids", "contract", "away"):
        if field in given:
            raise InvalidRequest(f"{field} is set where the client chooses every token; leave it out", param=field)


@dataclass(slots=True)
class Spent:
    """Seconds of a session, by what they were spent on, and bytes of frames on the lead's lanes."""

    queue_s: float = 0.0
    compute_s: float = 0.0
    exchange_s: float = 0.0
    seal_s: float = 0.0
    sample_s: float = 0.0
    draft_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


class Session:
    """One run of tokens. Invariant: `ids` holds the prompt and every drawn token that did not stop the session."""

    def __init__(self, number: int, request: Request, constraint: Constraint | None) -> None:
        self.number = number
        self.request = request
        steered = request.sampling.penalized or constraint is not None
        self.steering = (
            Steering(request.sampling, request.prompt[: request.asked_tokens], constraint) if steered else None
        )
        for token in request.prompt[request.asked_tokens :]:
            if self.steering is not None and self.steering.drawn(token):
                raise InvalidRequest("answered: the grammar lets nothing follow", param="grammar")
        self.ids = list(request.prompt)
        self.spent = Spent()
        self.speculated = lane_pb2.Speculation()
        self.ended = False
        self.cached_tokens = 0  # of the prompt: those that were not run again
        self._opened = time.perf_counter()
        self._first: float | None = None
        self._queue: asyncio.Queue[
            lane_pb2.Token | lane_pb2.Outcome | lane_pb2.Scored | lane_pb2.Finished | GanglionError
        ] = asyncio.Queue()

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

    def tell(self, scored: lane_pb2.Scored) -> None:
        """Tell a client that chooses a distribution, or more of it."""
        if self._first is None:
            self._first = time.perf_counter()
        self._queue.put_nowait(scored)

    def passed(self, drafted: int, accepted: int, *, hit: bool, outcome: lane_pb2.Outcome | None) -> None:
        """The tokens added last came of one pass over so many drafted ones; `outcome`: for a client that drafts."""
        speculated = self.speculated
        speculated.passes += 1
        speculated.drafted += drafted
        speculated.accepted += accepted
        speculated.hits += hit
        counts = speculated.accepted_counts
        counts.extend([0] * (accepted + 1 - len(counts)))
        counts[accepted] += 1
        if outcome is not None:
            self._queue.put_nowait(outcome)

    def finish(self, reason: lane_pb2.FinishReason) -> None:
        """The session is over; the last event."""
        self.ended = True
        prompt = self.request.asked_tokens
        self._queue.put_nowait(
            lane_pb2.Finished(
                reason=reason,
                prompt_tokens=prompt,
                completion_tokens=len(self.ids) - prompt,
                cached_tokens=self.cached_tokens,
                timings=self._timings(),
                speculation=self.speculated if self.speculated.passes else None,
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

    @property
    def untold_events(self) -> int:
        """Events that its stream has not taken."""
        return self._queue.qsize()

    def _timings(self) -> lane_pb2.Timings:
        wall, spent = time.perf_counter() - self._opened, self.spent
        parts = (spent.queue_s, spent.compute_s, spent.exchange_s, spent.seal_s, spent.sample_s, spent.draft_s)
        return lane_pb2.Timings(
            wall_s=wall,
            queue_s=spent.queue_s,
            compute_s=spent.compute_s,
            exchange_s=spent.exchange_s,
            seal_s=spent.seal_s,
            sample_s=spent.sample_s,
            draft_s=spent.draft_s,
            other_s=max(0.0, wall - sum(parts)),
            ttft_s=(self._first or time.perf_counter()) - self._opened,
            sent_bytes=spent.sent_bytes,
            received_bytes=spent.received_bytes,
        )

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Tokens as they are drawn, those that wait in one event, then Finished; raises what `fail` was given.

        To a client that drafts, those of each pass in one event with its outcome; to one that chooses, distributions.
        """
        tokens: list[lane_pb2.Token] = []
        while True:
            item = await self._queue.get()
            if isinstance(item, lane_pb2.Token):
                tokens.append(item)
                if self.request.contract is not None or not self._queue.empty():
                    continue
            if tokens or isinstance(item, lane_pb2.Outcome):
                outcome = item if isinstance(item, lane_pb2.Outcome) else None
                drawn = lane_pb2.Tokens(tokens=tokens, cached_tokens=self.cached_tokens, outcome=outcome)
                tokens = []
                yield lane_pb2.SessionEvent(tokens=drawn)
            if isinstance(item, lane_pb2.Scored):
                yield lane_pb2.SessionEvent(scored=item)
            if isinstance(item, lane_pb2.Finished):
                yield lane_pb2.SessionEvent(finished=item)
                return
            if isinstance(item, GanglionError):
                raise item
