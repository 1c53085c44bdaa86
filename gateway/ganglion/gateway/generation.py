"""One answer: a session on a lead, its events turned into certain text. Whoever stops listening ends the session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from ganglion.gateway.deployments import Route
from ganglion.gateway.metrics import Metrics
from ganglion.gateway.transcript import Alternative, Delta, Drawn, Placed, Transcript
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import (
    DeviceLost,
    ErrorBody,
    Exhausted,
    GanglionError,
    Internal,
    ProtocolViolation,
    Unavailable,
    from_body,
)

SESSIONS_OPEN = 128  # of one gateway; a lead's own queue is shorter
SILENCE_S = 600.0  # of a lead; a lost device is noticed long before this

_REASONS = {lane_pb2.FINISH_REASON_STOP: "stop", lane_pb2.FINISH_REASON_LENGTH: "length"}


class Leads(Protocol):
    """Opens sessions; closing the generator cancels the session."""

    def run(
        self, deployment: str, epoch: int, peer: identity_pb2.Peer, request: lane_pb2.Open
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """The events of one session, in order; raises errors of the tree."""
        ...


@dataclass(frozen=True)
class Began:
    """The lead has taken the session; `numeric_class` is what its tokens depend on."""

    numeric_class: str


@dataclass(frozen=True)
class Ended:
    """The answer is complete; `reason` is OpenAI's finish_reason. `cached_tokens`: of the prompt, not run again.

    timings, speculation: the lead's account where it gave one. local_tokens: of the answer, drawn by a device's own
    model while the one that was asked was away. experts: of edge experts, which were asked and what became of them.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: lane_pb2.Timings | None = None
    local_tokens: int = 0
    speculation: lane_pb2.Speculation | None = None
    experts: Mapping[str, Any] | None = None


Part = Began | Delta | Ended


class _Running:
    """One open session: how it is ended from outside while it waits for the lead."""

    def __init__(self) -> None:
        self._error: GanglionError | None = None
        self._limit: asyncio.Timeout | None = None

    def fail(self, error: GanglionError) -> None:
        self._error = error
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def next(self, events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> lane_pb2.SessionEvent | None:
        """The next event, None at the end; raises the error given to `fail`, also when it was given before."""
        if self._error is not None:
            raise self._error
        try:
            async with asyncio.timeout(SILENCE_S) as self._limit:
                return await anext(events, None)
        except TimeoutError:
            raise self._error or Unavailable(f"the lead said nothing for {SILENCE_S:g} s") from None
        finally:
            self._limit = None


class Sessions:
    """Every open session of this gateway."""

    def __init__(self, leads: Leads, metrics: Metrics) -> None:
        self._leads = leads
        self._metrics = metrics
        self._open: dict[tuple[str, int], set[_Running]] = {}
        self._count = 0

    @property
    def count(self) -> int:
        """How many are open."""
        return self._count

    def end(self, keys: Iterable[tuple[str, int]]) -> None:
        """A (deployment, epoch) is over: its sessions fail now, whatever their leads do."""
        for key in keys:
            for running in tuple(self._open.get(key, ())):
                running.fail(DeviceLost(f"the deployment was planned anew while it answered (epoch {key[1]} ended)"))

    def end_all(self, why: str) -> None:
        """Fail every session."""
        for key in tuple(self._open):
            for running in tuple(self._open[key]):
                running.fail(Unavailable(why))

    async def generate(
        self, route: Route, request: lane_pb2.Open, transcript: Transcript, arrived_s: float
    ) -> AsyncGenerator[Part, None]:
        """Began, then Deltas, then Ended; raises errors of the tree. `arrived_s`: time.monotonic() of the request.

        Closing it cancels the session. Invariant: nothing is yielded while the lead's stream is read.
        """
        if route.lead is None:
            raise Unavailable(f"{route.model} has no lead")
        if self._count >= SESSIONS_OPEN:
            raise Exhausted(
                f"{self._count} sessions are open on this gateway, at most {SESSIONS_OPEN}; try again later"
            )
        running = _Running()
        self._open.setdefault(route.key, set()).add(running)
        self._count += 1
        self._metrics.sessions.inc()
        try:
            events = self._leads.run(route.deployment, route.epoch, route.lead, request)
            async with aclosing(_parts(running, events, transcript, len(request.prompt))) as parts:
                measured = _Measured(self._metrics, arrived_s)
                async for part in parts:
                    if isinstance(part, Delta):
                        measured.delta(transcript.tokens)
                    elif isinstance(part, Ended):
                        measured.ended(part, stopped=transcript.stopped)
                    yield part
        except (GeneratorExit, asyncio.CancelledError):
            self._metrics.cancelled("left")
            raise
        except GanglionError as error:
            self._metrics.cancelled(error.code)
            raise
        finally:
            self._count -= 1
            self._metrics.sessions.dec()
            self._open[route.key].discard(running)
            if not self._open[route.key]:
                del self._open[route.key]


class _Measured:
    """Times of one session, for the metrics."""

    def __init__(self, metrics: Metrics, arrived_s: float) -> None:
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._first_s: float | None = None
        self._last_s = 0.0

    def delta(self, tokens: int) -> None:
        self._last_s = time.monotonic()
        if self._first_s is None and tokens:
            self._first_s = self._last_s
            self._metrics.first_token(self._first_s - self._arrived_s)

    def ended(self, end: Ended, *, stopped: bool) -> None:
        spread = end.completion_tokens - 1
        tpot_s = (self._last_s - self._first_s) / spread if self._first_s is not None and spread > 0 else None
        self._metrics.finished(end.prompt_tokens, end.cached_tokens, end.completion_tokens, tpot_s)
        if stopped:
            self._metrics.cancelled("stop_string")


async def _parts(
    running: _Running,
    events: AsyncGenerator[lane_pb2.SessionEvent, None],
    transcript: Transcript,
    prompt_tokens: int,
) -> AsyncGenerator[Part, None]:
    finished: lane_pb2.Finished | None = None
    cached_tokens = local_tokens = 0
    async with aclosing(events):
        while finished is None and not transcript.stopped:
            event = await running.next(events)
            if event is None:
                raise DeviceLost("the lead ended the stream before the answer was complete")
            match event.WhichOneof("body"):
                case "accepted":
                    yield Began(event.accepted.numeric_class)
                case "tokens":
                    cached_tokens = event.tokens.cached_tokens
                    before = transcript.tokens
                    delta = _pushed(transcript, event.tokens)
                    local_tokens += transcript.tokens - before if event.tokens.local else 0
                    yield delta
                case "finished":
                    finished = event.finished
                case "failed":
                    raise from_body(ErrorBody(event.failed.code, event.failed.message, event.failed.param or None))
                case "hello":
                    pass
                case other:
                    raise ProtocolViolation(f"the lead sent an event that this release does not know ({other})")
    # The session is over (a stop string cancels it) before the client reads the rest.
    if finished is None:
        yield Ended("stop", prompt_tokens, transcript.tokens, cached_tokens, local_tokens=local_tokens)
        return
    rest = transcript.finish()
    if rest.text or rest.tokens:
        yield rest
    reason = "stop" if transcript.stopped else _REASONS.get(finished.reason)
    if reason is None:
        raise Unavailable("the lead cancelled the session")
    if finished.completion_tokens < transcript.tokens:
        raise Internal(f"the lead counts {finished.completion_tokens} tokens and sent {transcript.tokens}")
    yield Ended(
        reason,
        prompt_tokens,
        finished.completion_tokens,
        finished.cached_tokens,
        finished.timings,
        local_tokens=max(local_tokens, finished.local_tokens),
        speculation=finished.speculation if finished.HasField("speculation") else None,
    )


def _pushed(transcript: Transcript, tokens: lane_pb2.Tokens) -> Delta:
    text: list[str] = []
    placed: list[Placed] = []
    ids: list[int] = []
    for token in tokens.tokens:
        if not transcript.stopped:
            ids.append(token.id)
        top = tuple(Alternative(entry.id, entry.logprob) for entry in token.top)
        delta = transcript.push(Drawn(token.id, token.logprob if token.HasField("logprob") else None, top))
        text.append(delta.text)
        placed.extend(delta.tokens)
    return Delta("".join(text), tuple(placed), tuple(ids), tokens.local)
