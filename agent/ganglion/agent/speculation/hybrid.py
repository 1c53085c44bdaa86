"""Answers of a model that runs elsewhere: drafted here, verified there, and gone on with here when that is away.

A gateway's session is one answer. Each verify session of it says in `Open.answered` what was answered before, so
after a loss the same tokens follow: they depend on model, prompt, sampling and seed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from ganglion.agent.speculation.answer import Answer
from ganglion.agent.speculation.contract import draws_as
from ganglion.agent.speculation.drafting import Drafting, Limits, without_drafts
from ganglion.agent.speculation.guesser import Guesser
from ganglion.agent.speculation.knowledge import Knowledge, Mode
from ganglion.agent.speculation.pilot import WINDOW_TOKENS, Pilot
from ganglion.agent.speculation.pool import DraftPool
from ganglion.agent.speculation.verifier import Verifier, VerifierStream
from ganglion.proto import lane_pb2
from ganglion.wire.errors import Conflict, DeviceLost, GanglionError, ProtocolViolation, Unavailable, Unreachable
from ganglion.wire.sampling.parameters import Sampling, parse_sampling

log = logging.getLogger(__name__)

# Runs a session of this node id's gateway on the device's own model, as its lead does.
Local = Callable[[lane_pb2.Open, str], AsyncGenerator[lane_pb2.SessionEvent, None]]

OPEN_S: Final = 10.0  # for a verifier to accept a session; it does so before anything runs
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Target:
    """The model that answers, as a contract names it. eos_ids: nothing is drafted after them.

    manifest_digest, numeric_class: empty where they are not known; then the verifier says what it is.
    """

    name: str
    manifest_digest: str
    numeric_class: str
    tokenizer_digest: bytes
    vocab: int
    context: int
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Policy:
    """mode: None chooses. away: where a request does not say. wait_s: for a verifier that is away, in AWAY_WAIT.

    window_tokens: drafted tokens of a pass at most; 0: as the verifier likes.
    """

    mode: Mode | None = None
    away: lane_pb2.Away = lane_pb2.AWAY_WAIT
    wait_s: float = 60.0
    window_tokens: int = 0


class Hybrid:
    """Serves sessions for `target` by drafting here; `target` and `policy` may be set anew between answers."""

    def __init__(
        self,
        guesser: Guesser | None,
        verifier: Callable[[], Verifier | None],
        local: Local | None,
        target: Target,
        policy: Policy | None = None,
    ) -> None:
        """guesser: None, the device does not draft. verifier: the present one. local: None, no model is here."""
        self.target = target
        self.policy = policy or Policy()
        self._verifier = verifier
        self._local = local
        self._context = guesser.context if guesser is not None else 0
        self._pool = DraftPool(guesser) if guesser is not None else None
        self._knowledge: WeakKeyDictionary[Verifier, Knowledge] = WeakKeyDictionary()
        self._last = Knowledge()  # of the verifier before: the next one begins with it

    async def close(self) -> None:
        """Stop drafting; answers that run go on without."""
        if self._pool is not None:
            await self._pool.close()

    async def serve(
        self, request: lane_pb2.Open, gateway: str, said: object = None
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Events of one session; closing the generator ends it at the verifier too.

        Raises what the verifier refuses the request with. Where it is away: by policy Unavailable or DeviceLost, after
        waiting or at once; ProtocolViolation where it broke the protocol and the policy is not to go on here.
        """
        del said  # a gateway drafts nothing
        answer = Answer(request, time.monotonic())
        away = request.away or self.policy.away
        waiting = _Waiting(self.policy.wait_s)
        while True:
            try:
                async with contextlib.aclosing(self._verified(answer)) as events:
                    async for event in events:
                        waiting.over()
                        yield event
                return
            except GanglionError as error:
                if not _is_away(error) or (isinstance(error, ProtocolViolation) and away != lane_pb2.AWAY_LOCAL):
                    raise
                lost = error
            log.warning("%s is away: %s", self.target.name, lost.message)
            if away == lane_pb2.AWAY_FAIL:
                raise _described(
                    lost,
                    f"{self.target.name} is away ({lost.message}); --away wait waits for it, --away local goes"
                    " on by this device's own model",
                ) from lost
            if away == lane_pb2.AWAY_LOCAL:
                break
            await asyncio.sleep(waiting.pause(self.target.name, lost, time.monotonic()))
        async with contextlib.aclosing(self._alone(answer, gateway, lost)) as events:
            async for event in events:
                yield event

    # At the verifier.

    async def _verified(self, answer: Answer) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """The answer from here on by a verify session; ends with Finished."""
        if answer.accepted and answer.left == 0:  # it was lost before it said so
            yield answer.finish(lane_pb2.Finished(reason=lane_pb2.FINISH_REASON_LENGTH), time.monotonic())
            return
        verifier = self._verifier()
        if verifier is None:
            raise Unavailable(f"nobody verifies for {self.target.name} at present")
        sampling = parse_sampling(answer.request.sampling, self.target.vocab)
        knowledge = self._known(verifier)
        request = answer.open(self._contract())
        before = time.monotonic()
        try:
            async with asyncio.timeout(OPEN_S):
                stream = await verifier.open(request)
        except TimeoutError:
            raise Unreachable(
                f"the verifier {verifier.name} did not accept a session in {OPEN_S:g} s; is it on, and the link up?"
            ) from None
        try:
            knowledge.opened(time.monotonic() - before)
            if not draws_as(stream.accepted.numeric_class, self.target.numeric_class):
                raise ProtocolViolation(
                    f"accepted in numeric class {stream.accepted.numeric_class[:80]!r},"
                    f" where the contract says {self.target.numeric_class}"
                )
            drafting = self._drafting(answer, request, stream.accepted.terms, knowledge, sampling)
            for event in answer.accept(stream.accepted.numeric_class):
                yield event
            async with contextlib.aclosing(self._follow(answer, stream, drafting, sampling)) as events:
                async for event in events:
                    yield event
        except ProtocolViolation as error:
            raise ProtocolViolation(f"the verifier {verifier.name}: {error.message}") from error
        finally:
            answer.mode = answer.mode or self.policy.mode
            await stream.close()

    async def _follow(
        self, answer: Answer, stream: VerifierStream, drafting: Drafting, sampling: Sampling
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Draft, send and pass on what comes, until Finished."""
        changed = asyncio.Event()
        seat = None
        if self._pool is not None:
            prompt = len(answer.request.prompt) - answer.request.answered
            seat = self._pool.join(drafting, sampling, prompt, changed.set)
        if seat is None:
            drafting.stop_drafting()
        changed.set()
        sending = asyncio.create_task(_send(stream, drafting, changed))
        try:
            async with contextlib.aclosing(_or_fail(stream.events(), sending)) as events:
                async for event in events:
                    now = time.monotonic()
                    body = event.WhichOneof("body")
                    if body == "finished":
                        yield answer.finish(event.finished, now)
                        return
                    if body != "tokens" or not event.tokens.HasField("outcome"):
                        raise ProtocolViolation(f"a {body} event where tokens with an outcome are due")
                    ids = [token.id for token in event.tokens.tokens]
                    if ids and max(ids) >= self.target.vocab:
                        raise ProtocolViolation(f"token id {max(ids)}, where the vocabulary has {self.target.vocab}")
                    drafting.figures.received_bytes += event.ByteSize()
                    drafting.outcome(event.tokens.outcome, ids, now)
                    answer.mode = drafting.pilot.mode
                    if seat is not None and self._pool is not None:
                        self._pool.committed(seat, ids)
                    changed.set()
                    for told in answer.add(event.tokens, now):
                        yield told
            raise DeviceLost("the verify session ended without Finished")
        finally:
            if seat is not None and self._pool is not None:
                self._pool.leave(seat)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    def _contract(self) -> lane_pb2.Contract:
        target = self.target
        return lane_pb2.Contract(
            manifest_digest=target.manifest_digest,
            numeric_class=target.numeric_class,
            tokenizer_digest=target.tokenizer_digest,
            vocab=target.vocab,
            window_tokens=self.policy.window_tokens,
            miss=without_drafts(self.policy.mode),
        )

    def _drafting(
        self,
        answer: Answer,
        request: lane_pb2.Open,
        terms: lane_pb2.Terms,
        knowledge: Knowledge,
        sampling: Sampling,
    ) -> Drafting:
        corrections = knowledge.greedy if sampling.temperature == 0.0 else knowledge.sampled
        pilot = Pilot(
            knowledge,
            corrections,
            forced=self.policy.mode,
            drafts=self._pool is not None,
            own=bool(terms.drafter),
            window_tokens=min(terms.window_tokens, self.policy.window_tokens or WINDOW_TOKENS),
        )
        tokens = min(len(request.prompt) + request.max_tokens, self.target.context)
        limits = Limits(tokens, self._context, self.target.eos_ids | frozenset(request.stop_ids))
        said = request.contract.miss
        return Drafting(request.prompt, terms, limits, pilot, corrections, said=said, figures=answer.figures)

    def _known(self, verifier: Verifier) -> Knowledge:
        """What was learned of a verifier; of a new one what was learned of the one before."""
        if verifier not in self._knowledge:
            self._knowledge[verifier] = self._last
        self._last = self._knowledge[verifier]
        return self._last

    # Without it.

    async def _alone(
        self, answer: Answer, gateway: str, lost: GanglionError
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """The answer from here on by the device's own model, marked as such."""
        if self._local is None:
            raise _described(
                lost,
                f"{self.target.name} is away ({lost.message}) and no model on this device can go on; --away wait"
                " waits for it",
            ) from lost
        async with contextlib.aclosing(self._local(answer.open(None), gateway)) as events:
            async for event in events:
                now, body = time.monotonic(), event.WhichOneof("body")
                if body == "accepted":
                    for told in answer.accept(event.accepted.numeric_class):
                        yield told
                elif body == "tokens":
                    for told in answer.add(event.tokens, now, local=True):
                        yield told
                elif body == "finished":
                    yield answer.finish(event.finished, now)


class _Waiting:
    """Pauses between tries, until the verifier has been away for `most_s`."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._since: float | None = None
        self._next_s = _FIRST_PAUSE_S

    def over(self) -> None:
        """The verifier has said something."""
        self._since, self._next_s = None, _FIRST_PAUSE_S

    def pause(self, name: str, lost: GanglionError, now: float) -> float:
        """Seconds until the next try; raises Unavailable or DeviceLost when it has been long enough."""
        self._since = self._since if self._since is not None else now
        left = self._since + self._most_s - now
        if left <= 0.0:
            raise _described(
                lost,
                f"{name} has been away for {self._most_s:g} s ({lost.message}); wait longer by wait_s, or choose"
                " --away local or fail",
            ) from lost
        self._next_s, found = min(2 * self._next_s, _LONGEST_PAUSE_S), self._next_s
        return min(found, left)


def _is_away(error: GanglionError) -> bool:
    """Whether an error says that the verifier is not there, or not to be trusted; everything else is for the client."""
    return isinstance(error, Unavailable | ProtocolViolation | Conflict)  # Conflict: its epoch is over


def _described(lost: GanglionError, message: str) -> GanglionError:
    return DeviceLost(message) if isinstance(lost, DeviceLost) else Unavailable(message)


async def _send(stream: VerifierStream, drafting: Drafting, changed: asyncio.Event) -> None:
    """Send what there is to send, whenever something changed; runs until cancelled or the stream is over."""
    while True:
        await changed.wait()
        changed.clear()
        while (drafts := drafting.take(time.monotonic())) is not None:
            await stream.send(drafts)


async def _next(events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> lane_pb2.SessionEvent | None:
    try:
        return await anext(events)
    except StopAsyncIteration:
        return None


async def _or_fail(
    events: AsyncGenerator[lane_pb2.SessionEvent, None], sending: asyncio.Task[None]
) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
    """Events as they come; raises what sending raised where events wait for ever because of it."""
    while True:
        reading = asyncio.create_task(_next(events))
        try:
            await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        if not reading.cancelled():
            event = reading.result()
            if event is None:
                return
            yield event
        elif not sending.cancelled() and (error := sending.exception()) is not None:
            raise error
