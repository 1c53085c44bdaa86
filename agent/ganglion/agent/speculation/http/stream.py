"""One session with a server over HTTP: windows of drafts become requests, answers become outcomes.

By text (`echo`) a prompt can come to a place where the server would make other tokens of it than it has drawn itself:
models do not always write as their tokenizers do. From there on nothing can be verified; the server then goes on by
itself from the last place where both agree, more tokens at a time, and drafts are compared with what it drew. The
tokens are exact all the same, and cost it a pass each.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ganglion.agent.speculation.http.checking import Ask, Choice, Dialect, Differs
from ganglion.agent.speculation.http.client import HttpClient
from ganglion.agent.speculation.http.echo import Echo
from ganglion.agent.speculation.queue import DraftQueue
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, GanglionError, ProtocolViolation, Unavailable, Unsupported
from ganglion.wire.prefixes import Prefix

TAIL_TOKENS: Final = 16  # that a server draws by itself at first; twice as many each time after
TAIL_MOST: Final = 256
TAIL_PLACES: Final = 8  # before a difference, that are tried to begin from
NEAR: Final = 1e-3  # log-probabilities nearer than this are counted as near ties
_FULL: Final = Choice(None)  # the server's context is


@dataclass(slots=True)
class Requests:
    """What a session cost. near_ties: tokens whose margin was below NEAR. drawn_alone: see the module."""

    count: int = 0
    seconds: float = 0.0
    near_ties: int = 0
    drawn_alone: int = 0


@dataclass(slots=True)
class _Counts:
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    hits: int = 0
    by_accepted: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int, hit: bool) -> None:
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.hits += hit
        self.by_accepted += [0] * (accepted + 1 - len(self.by_accepted))
        self.by_accepted[accepted] += 1


@dataclass(frozen=True, slots=True)
class _Pass:
    """What came of a pass. reason: why the session ends with it, None: it goes on."""

    tokens: list[Choice]
    drafted: int
    accepted: int
    reason: lane_pb2.FinishReason | None
    verify_s: float
    idle_s: float


class HttpStream:
    """A `VerifierStream`. Invariant: `_ahead` is what the server draws after the committed `_ids`, as far as known."""

    def __init__(
        self,
        request: lane_pb2.Open,
        client: HttpClient,
        dialect: Dialect,
        *,
        name: str,
        credit_tokens: int,
        away: Callable[[], None],
    ) -> None:
        """`name`: of the server, for messages. `away`: called when it is found to be."""
        self._request = request
        self._client = client
        self._dialect = dialect
        self._name = name
        self._away = away
        self._stop_ids = frozenset(request.stop_ids)
        self._ids = list(request.prompt)
        limit = len(self._ids) + request.max_tokens
        self._limit = min(limit, dialect.context) if dialect.context else limit
        wanted = request.contract.window_tokens
        self._most = min(wanted, dialect.window_tokens) if wanted else dialect.window_tokens
        self._top = max(0, request.sampling.top_logprobs)
        self._miss = request.contract.miss or lane_pb2.MISS_RUN
        tip = Prefix.of(self._ids)
        self._queue = DraftQueue(tip, credits=credit_tokens, vocab=dialect.vocab)
        self._ahead: list[Choice] = []
        self._agree: int | None = None  # tokens that both ends write alike, where it is not all of them
        self._difference = ""  # what follows them, for messages
        self._tail = TAIL_TOKENS
        self._news = asyncio.Event()
        self._failure: GanglionError | None = None
        self._counts = _Counts()
        self._bytes = client.sent_bytes, client.received_bytes
        self.requests = Requests()
        terms = lane_pb2.Terms(window_tokens=self._most, credits=credit_tokens, prefix=tip.name)
        self.accepted = lane_pb2.Accepted(numeric_class="", terms=terms)

    async def send(self, drafts: lane_pb2.Drafts) -> None:
        """Take drafts; raises ProtocolViolation for what the protocol forbids, and so do the events."""
        try:
            self._queue.add(drafts)
        except GanglionError as error:
            self._failure = error
            raise
        finally:
            self._news.set()
        self._miss = drafts.miss or self._miss

    async def close(self) -> None:
        """End the session; a request that is under way is broken off when `events` is closed."""
        self._failure = self._failure or Unavailable("the session was closed")
        self._news.set()

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Tokens with an outcome, one event a pass, then Finished.

        Raises what the client raises (Unavailable and its kinds: the server is away), ProtocolViolation for its answers
        that are none and for drafts that the protocol forbids, Unsupported where its tokens cannot be told.
        """
        began = ended = time.perf_counter()
        first_s: float | None = None
        try:
            while True:
                window, hit = await self._window()
                started = time.perf_counter()
                choices, follow = await self._choices(window)
                idle_s, ended = started - ended, time.perf_counter()
                if self._failure is not None:
                    raise self._failure
                passed = self._judge(window, choices, follow, (ended - started, idle_s))
                self._counts.add(passed.drafted, passed.accepted, hit)
                first_s = first_s if first_s is not None else ended - began
                if passed.tokens:
                    yield self._told(passed)
                if passed.reason is not None:
                    yield self._finished(passed.reason, time.perf_counter() - began, first_s)
                    return
        except Unavailable:
            self._away()
            raise

    async def _window(self) -> tuple[list[int], bool]:
        """What the next pass verifies, and whether it was at hand."""
        most = max(0, min(self._most, self._limit - len(self._ids) - 1))
        hit = bool(self._queue.queued)
        while True:
            if self._failure is not None:
                raise self._failure
            window = self._queue.window(most)
            if window or not most or self._miss != lane_pb2.MISS_WAIT:
                return window, hit
            self._news.clear()
            await self._news.wait()

    async def _choices(self, window: Sequence[int]) -> tuple[list[Choice], bool]:
        """What the server draws next and after each token of the window, at least one of them, at most all.

        True: they follow one another, whatever the window says.
        """
        if self._ahead:
            return self._ahead, True
        if self._agree is None and (found := await self._verified(window)):
            return found, False
        return await self._drawn_alone(len(self._ids) if self._agree is None else self._agree), True

    async def _verified(self, window: Sequence[int]) -> list[Choice]:
        """By one request, or a second one without a window.

        None where the server's tokens are others, which `_agree` says then, or the next one cannot be told by its text.
        """
        window = window[: self._dialect.usable(self._ids, window)]
        for some in (window, ()) if window else ((),):
            try:
                ask = self._dialect.ask(self._ids, some, top=self._top)
                found = self._dialect.read(await self._timed(ask), self._ids, some, top=self._top)
            except Differs as difference:
                if not some:
                    self._difference = str(difference)
                    self._agree = None if difference.passing else difference.at
            except ContextExceeded:
                if not some:
                    return [_FULL]
            else:
                if found:
                    return found
        return []

    async def _timed(self, ask: Ask) -> Any:
        began = time.perf_counter()
        reply = await self._client.post(ask.path, ask.document, root=ask.root)
        self.requests.count += 1
        self.requests.seconds += time.perf_counter() - began
        return reply

    async def _drawn_alone(self, agree: int) -> list[Choice]:
        """What the server draws by itself after the first `agree` tokens or fewer, from the committed ones on."""
        dialect, prompt = self._dialect, len(self._request.prompt)
        if not isinstance(dialect, Echo):
            raise ProtocolViolation(f"{self._name} gave no choice for a token")
        trouble = self._difference or "the next one cannot be told by its text"
        for at in range(min(agree, len(self._ids)), prompt - 1, -1)[:TAIL_PLACES]:
            tail = self._ids[at:]
            for more in (self._tail, 1):
                try:
                    found = await self._went_on(dialect, at, tail, min(more, self._limit - len(self._ids)))
                except Differs as difference:
                    trouble = str(difference)
                    break
                except ContextExceeded:
                    return [_FULL]
                if [one.token for one in found[: len(tail)]] == tail and len(found) > len(tail):
                    if self._agree is not None:
                        self._agree, self._tail = at, min(TAIL_MOST, 2 * self._tail)
                    self.requests.drawn_alone += len(found) - len(tail)
                    return found[len(tail) :]
        raise Unsupported(
            f"{self._name} takes text only, and its tokens of this one are others ({trouble}); use a server that takes"
            " token ids (vLLM, llama.cpp's own)",
            param="prompt",
        )

    async def _went_on(self, dialect: Echo, at: int, tail: Sequence[int], more: int) -> list[Choice]:
        ask = dialect.ask(self._ids[:at], (), top=0, more=len(tail) + more)
        return dialect.read(await self._timed(ask), self._ids[:at], (), top=0, tail=tail)

    def _judge(
        self, window: Sequence[int], choices: Sequence[Choice], follow: bool, spent_s: tuple[float, float]
    ) -> _Pass:
        """Accept the window's tokens as long as they are the server's, and one token more; commits them."""
        window = window[: len(choices) - 1]
        taken: list[Choice] = []
        accepted, reason = 0, None
        for at, choice in enumerate(choices[: len(window) + 1]):
            if choice.token is None or choice.token in self._stop_ids:
                reason = lane_pb2.FINISH_REASON_LENGTH if choice is _FULL else lane_pb2.FINISH_REASON_STOP
                break
            taken.append(choice)
            agreed = at < len(window) and window[at] == choice.token
            accepted += agreed
            if len(self._ids) + len(taken) >= self._limit:
                reason = lane_pb2.FINISH_REASON_LENGTH
                break
            if not agreed:
                break
        self._ahead = list(choices[len(taken) :]) if follow or len(taken) == len(window) + 1 else []
        self._ids += [one.token for one in taken if one.token is not None]
        self.requests.near_ties += sum(one.margin < NEAR for one in taken)
        return _Pass(taken, len(window), accepted, reason, *spent_s)

    def _told(self, passed: _Pass) -> lane_pb2.SessionEvent:
        committed = self._queue.commit(self._ids[len(self._ids) - len(passed.tokens) :])
        outcome = lane_pb2.Outcome(
            round=committed.round,
            prefix=committed.prefix,
            drafted=passed.drafted,
            accepted=passed.accepted,
            credits=committed.credits,
            queued=committed.queued,
            verify_s=passed.verify_s,
            idle_s=passed.idle_s,
        )
        tokens = [self._token(one) for one in passed.tokens]
        return lane_pb2.SessionEvent(tokens=lane_pb2.Tokens(tokens=tokens, outcome=outcome))

    def _token(self, choice: Choice) -> lane_pb2.Token:
        told = lane_pb2.Token(id=choice.token or 0)
        if self._request.sampling.top_logprobs >= 0 and choice.logprob is not None:
            told.logprob = choice.logprob
            told.top.extend(lane_pb2.TokenLogprob(id=token, logprob=logprob) for token, logprob in choice.top)
        return told

    def _finished(self, reason: lane_pb2.FinishReason, wall_s: float, first_s: float) -> lane_pb2.SessionEvent:
        counts, (sent, received) = self._counts, self._bytes
        speculation = lane_pb2.Speculation(
            passes=counts.passes,
            drafted=counts.drafted,
            accepted=counts.accepted,
            hits=counts.hits,
            accepted_counts=counts.by_accepted,
            sent_bytes=self._client.sent_bytes - sent,
            received_bytes=self._client.received_bytes - received,
        )
        waited_s, prompt = self.requests.seconds, len(self._request.prompt)
        timings = lane_pb2.Timings(
            wall_s=wall_s, exchange_s=waited_s, other_s=max(0.0, wall_s - waited_s), ttft_s=first_s
        )
        finished = lane_pb2.Finished(
            reason=reason,
            prompt_tokens=prompt,
            completion_tokens=len(self._ids) - prompt,
            timings=timings,
            speculation=speculation,
        )
        return lane_pb2.SessionEvent(finished=finished)
