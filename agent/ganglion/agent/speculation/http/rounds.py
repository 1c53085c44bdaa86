"""A verifier behind HTTP that speaks the dialect of rounds: replicas behind any router, exact at any temperature.

    verifier = RoundVerifier("https://host/verifier", key=...)         # rounds go to https://host/verifier/verify
    stream = await verifier.open(Open(prompt=..., contract=...))       # then as with a lead of our own

Drafts are kept at this end; each pass of the model is one request with the window that they give. A replica that is
lost costs time and no token: the same round is asked again with the whole text, of whoever answers then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import msgspec
from google.protobuf import json_format

from ganglion.agent.speculation.http.client import HttpClient, Timeouts
from ganglion.agent.speculation.http.round_messages import PATH, SESSION_HEADER, Facts, Rounded
from ganglion.agent.speculation.queue import DraftQueue
from ganglion.proto import lane_pb2
from ganglion.wire.errors import Exhausted, GanglionError, ProtocolViolation, Unavailable, Unsupported
from ganglion.wire.limits import DRAFT_CREDITS
from ganglion.wire.prefixes import Prefix

PATIENCE_S: Final = 30.0
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 2.0
_Answer = TypeVar("_Answer", Facts, Rounded)
FORGOTTEN: Final = 8  # times in a row that replicas do not know a text which they were told


log = logging.getLogger(__name__)


def round_base(url: str) -> str | None:
    """Of a URL whose path ends in "/verify", where rounds are asked, the part before; None for another one."""
    url = url.rstrip("/")
    try:
        return url.removesuffix(PATH) if urlsplit(url).path.endswith(PATH) else None
    except ValueError:
        return None


class RoundVerifier:
    """A `Verifier`. patience_s: for which a session that runs waits for a replica to answer before it fails.

    It asks what the verifier runs when the first session opens, and again after it was away or refused one.
    """

    def __init__(
        self, url: str, *, key: str | None = None, timeouts: Timeouts | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        """`url`: without the "/verify". Raises InvalidRequest for a URL that is none."""
        self._client = HttpClient(url, key=key, timeouts=timeouts)
        self._facts: Facts | None = None
        self._finding = asyncio.Lock()
        self._patience_s = patience_s
        self.name = self._client.where

    async def open(self, request: lane_pb2.Open) -> RoundStream:
        """Begin a session; manifest digest and numeric class of its contract are the verifier's where they are empty.

        Raises Unsupported where ids mean something else there, what the verifier refuses the session with, Unavailable
        and its kinds where it is away.
        """
        try:
            agreed = _agreed(request, await self.facts(), self.name)
            stream = RoundStream(agreed, self._client, patience_s=self._patience_s, away=self._forget)
            await stream.begin()
        except GanglionError:
            self._forget()
            raise
        return stream

    async def facts(self) -> Facts:
        """What the verifier runs; raises what it answers instead, ProtocolViolation for what are no facts."""
        async with self._finding:
            if self._facts is None:
                self._facts = facts = _converted(await self._client.get(PATH), Facts, self._client.where)
                self.name = f"{facts.model} at {self._client.where}"
                log.info("drafts are verified by %s, %s", self.name, facts.numeric_class)
            return self._facts

    def _forget(self) -> None:
        """It may be another one when it is back."""
        self._facts = None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


@dataclass(slots=True)
class Travelled:
    """What a session's rounds met. begun: how often a replica was told the whole text. replicas: who answered."""

    rounds: int = 0
    begun: int = 0
    lost: int = 0
    replicas: tuple[str, ...] = ()


class RoundStream:
    """A `VerifierStream`."""

    def __init__(
        self, request: lane_pb2.Open, client: HttpClient, *, patience_s: float, away: Callable[[], None]
    ) -> None:
        self._request = request
        self._client = client
        self._patience_s = patience_s
        self._away = away
        self._session = secrets.token_hex(16)
        self._ids = list(request.prompt)
        self._miss = request.contract.miss or lane_pb2.MISS_WAIT
        self._queue = DraftQueue(Prefix.of(self._ids), credits=DRAFT_CREDITS, vocab=request.contract.vocab)
        self._news = asyncio.Event()
        self._failure: GanglionError | None = None
        self._counts = lane_pb2.Speculation()
        self._bytes = client.sent_bytes, client.received_bytes
        self.accepted = lane_pb2.Accepted()
        self.travelled = Travelled()

    async def begin(self) -> None:
        """Have a verifier accept the session; raises what refuses it."""
        reply = await self._ask(None)
        if reply.accepted is None:
            raise ProtocolViolation(f"{self._client.where} did not say what it accepted")
        self.accepted = _message(reply.accepted, lane_pb2.Accepted())
        terms = self.accepted.terms
        terms.credits, terms.prefix = DRAFT_CREDITS, self._queue.tip.name

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
        """End the session; the replica is told, if it is there."""
        closed = self._failure is not None
        self._failure = self._failure or Unavailable("the session was closed")
        self._news.set()
        if not closed:
            with contextlib.suppress(GanglionError):
                await self._client.post(PATH, self._document(None) | {"close": True}, headers=self._headers)

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Tokens with an outcome, one event a pass, then Finished.

        Raises what the verifier fails the session with, Unavailable and its kinds when no replica came back in time.
        """
        began = time.perf_counter()
        first_s: float | None = None
        while True:
            hit = bool(self._queue.queued)
            reply = await self._ask(await self._window())
            if self._failure is not None:
                raise self._failure
            first_s = first_s if first_s is not None else time.perf_counter() - began
            for document in reply.outcomes:
                tokens = _message(document, lane_pb2.Tokens())
                yield self._told(tokens, hit=hit)
            if reply.at != len(self._ids) or (not reply.outcomes and reply.finished is None):
                raise ProtocolViolation(
                    f"{self._client.where} answered a round with {reply.at} tokens, its outcomes give {len(self._ids)}"
                )
            if reply.finished is not None:
                finished = _message(reply.finished, lane_pb2.Finished())
                yield self._finished(finished, time.perf_counter() - began, first_s)
                return

    async def _window(self) -> list[int]:
        """What the next pass verifies; the first token comes of the prompt and waits for nothing."""
        left = len(self._request.prompt) + self._request.max_tokens - len(self._ids) - 1
        most = max(0, min(self.accepted.terms.window_tokens, left))
        while True:
            if self._failure is not None:
                raise self._failure
            window = self._queue.window(most)
            if window or not most or self._miss != lane_pb2.MISS_WAIT or not self._counts.passes:
                return window
            self._news.clear()
            await self._news.wait()

    async def _ask(self, window: Sequence[int] | None) -> Rounded:
        """One round, asked until it is answered; raises Unavailable, Exhausted after the patience, what refuses it."""
        document = self._document(window)
        if window is None:
            document["begin"] = self._whole()
        since, pause_s, forgotten = time.perf_counter(), FIRST_PAUSE_S, 0
        while True:
            self.travelled.rounds += 1
            self.travelled.begun += "begin" in document
            try:
                answered = await self._client.post(PATH, document, headers=self._headers)
                reply = _converted(answered, Rounded, self._client.where)
            except (Unavailable, Exhausted) as error:
                self.travelled.lost += 1
                self._away()
                away = window is None and isinstance(error, Unavailable)  # who opens decides what to do then
                if away or time.perf_counter() - since + pause_s > self._patience_s:
                    raise
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                document["begin"] = self._whole()  # another replica may answer, or the same one anew
                continue
            if not reply.unknown:
                if reply.replica not in self.travelled.replicas:
                    self.travelled.replicas += (reply.replica,)
                return reply
            forgotten += 1
            if forgotten > FORGOTTEN:
                raise Unavailable(f"{self._client.where} does not keep a session from one request to the next")
            document["begin"] = self._whole()

    @property
    def _headers(self) -> dict[str, str]:
        return {SESSION_HEADER: self._session}

    def _document(self, window: Sequence[int] | None) -> dict[str, Any]:
        found = {"session": self._session, "at": len(self._ids), "prefix": Prefix.of(self._ids).name.hex()}
        if window is not None:
            found |= {"window": list(window), "own": self._miss == lane_pb2.MISS_DRAFT}
        return found

    def _whole(self) -> dict[str, Any]:
        """The session as it is now, to be gone on with."""
        answered = len(self._ids) - len(self._request.prompt)
        whole = lane_pb2.Open()
        whole.CopyFrom(self._request)
        del whole.prompt[:]
        whole.prompt.extend(self._ids)
        whole.answered += answered
        whole.max_tokens -= answered
        whole.contract.miss = lane_pb2.MISS_WAIT
        found: dict[str, Any] = json_format.MessageToDict(whole, preserving_proto_field_name=True)
        return found

    def _told(self, tokens: lane_pb2.Tokens, *, hit: bool) -> lane_pb2.SessionEvent:
        ids = [token.id for token in tokens.tokens]
        if not ids or max(ids) >= self._request.contract.vocab or tokens.outcome.accepted > tokens.outcome.drafted:
            raise ProtocolViolation(f"{self._client.where} answered a round with an outcome that cannot be")
        self._ids += ids
        done, outcome, counts = self._queue.commit(ids), tokens.outcome, self._counts
        outcome.round, outcome.prefix = done.round, done.prefix
        outcome.credits, outcome.queued = done.credits, done.queued
        counts.passes += 1
        counts.drafted += outcome.drafted
        counts.accepted += outcome.accepted
        counts.hits += hit
        counts.accepted_counts.extend([0] * (outcome.accepted + 1 - len(counts.accepted_counts)))
        counts.accepted_counts[outcome.accepted] += 1
        return lane_pb2.SessionEvent(tokens=tokens)

    def _finished(self, finished: lane_pb2.Finished, wall_s: float, first_s: float) -> lane_pb2.SessionEvent:
        """The verifier's Finished, with what only this end knows of all the replicas' parts."""
        self._failure = self._failure or Unavailable("the session is over")
        finished.prompt_tokens = len(self._request.prompt) - self._request.answered
        finished.completion_tokens = len(self._ids) - finished.prompt_tokens
        finished.timings.wall_s, finished.timings.ttft_s = wall_s, first_s
        finished.speculation.CopyFrom(self._counts)
        finished.speculation.sent_bytes = self._client.sent_bytes - self._bytes[0]
        finished.speculation.received_bytes = self._client.received_bytes - self._bytes[1]
        return lane_pb2.SessionEvent(finished=finished)


def _agreed(request: lane_pb2.Open, facts: Facts, name: str) -> lane_pb2.Open:
    """The request with a contract for this verifier; raises Unsupported."""
    contract = request.contract
    for field, ours, theirs in (
        ("vocab", contract.vocab, facts.vocab),
        ("tokenizer_digest", contract.tokenizer_digest.hex(), facts.tokenizer_digest),
    ):
        if ours != theirs:
            raise Unsupported(
                f"this device drafts for {field} {ours}, the verifier {name} has {theirs}; draft with a model of the"
                " same tokenizer",
                param=f"contract.{field}",
            )
    agreed = lane_pb2.Open()
    agreed.CopyFrom(request)
    agreed.contract.manifest_digest = contract.manifest_digest or facts.manifest_digest
    agreed.contract.numeric_class = contract.numeric_class or facts.numeric_class
    return agreed


def _converted(document: Any, kind: type[_Answer], where: str) -> _Answer:
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        raise ProtocolViolation(f"{where}: its answer is no {kind.__name__}: {error}") from None


def _message(document: dict[str, Any], into: Any) -> Any:
    try:
        return json_format.ParseDict(document, into)
    except json_format.ParseError as error:
        raise ProtocolViolation(f"an answer that does not parse: {str(error)[:200]}") from None
