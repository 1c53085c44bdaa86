"""The verifier's side of the dialect of rounds: requests in, the sessions of a lead beside it, answers out.

A session of the lead lives as long as its rounds come: the ones longest unused are closed for new ones, and those that
nobody asked for in `idle_s`. Nothing is lost by that (see `round_messages`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Callable
from http import HTTPStatus
from typing import Any, Final

import msgspec
from google.protobuf import json_format

from ganglion.agent.speculation.http.round_messages import Facts, Round, Rounded
from ganglion.proto import lane_pb2
from ganglion.wire.errors import (
    Exhausted,
    GanglionError,
    Internal,
    InvalidDocument,
    InvalidRequest,
    Unauthenticated,
    Unavailable,
    to_body,
)
from ganglion.wire.limits import HTTP_BODY_BYTES
from ganglion.wire.prefixes import Prefix
from ganglion.wire.session_serving import Said

log = logging.getLogger(__name__)

IDLE_S: Final = 120.0
Serve = Callable[[lane_pb2.Open, str, Said], AsyncGenerator[lane_pb2.SessionEvent, None]]
_NODE: Final = "rounds"  # whose kept prompts they are: of all that use this verifier, by tenant


class RoundServer:
    """Answers rounds by `serve`, a lead's. `sessions`: kept at a time. `key`: that requests must bear; None: none."""

    def __init__(
        self,
        serve: Serve,
        facts: Facts,
        *,
        sessions: int,
        name: str,
        key: str | None = None,
        idle_s: float = IDLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serve = serve
        self._facts = msgspec.json.encode(facts)
        self._most = sessions
        self._name = name
        self._bearer = f"Bearer {key}".encode() if key is not None else None
        self._idle_s = idle_s
        self._clock = clock
        self._kept: dict[str, _Kept] = {}  # those used last at the end

    def facts(self, authorization: str = "") -> tuple[int, bytes]:
        """Status and JSON body of GET; never raises."""
        try:
            self._admit(authorization)
        except GanglionError as error:
            return error.http_status, _told(error)
        return HTTPStatus.OK, self._facts

    async def answer(self, body: bytes, authorization: str = "") -> tuple[int, bytes]:
        """Status and JSON body of one round; never raises but when it is cancelled."""
        try:
            self._admit(authorization)
            return HTTPStatus.OK, msgspec.json.encode(await self._round(_parse(body)))
        except GanglionError as error:
            return error.http_status, _told(error)
        except Exception:
            log.exception("a round failed by a defect")
            return HTTPStatus.INTERNAL_SERVER_ERROR, _told(Internal("the verifier failed; its log has the details"))

    def _admit(self, authorization: str) -> None:
        if self._bearer is not None and not hmac.compare_digest(authorization.encode(), self._bearer):
            raise Unauthenticated("the key for this verifier is wrong or missing")

    async def close(self) -> None:
        """End every session."""
        kept, self._kept = list(self._kept.values()), {}
        await asyncio.gather(*(one.close() for one in kept))

    @property
    def sessions(self) -> int:
        """Sessions that are kept."""
        return len(self._kept)

    async def _round(self, asked: Round) -> Rounded:
        await self._forget_idle()
        kept = self._kept.get(asked.session)
        accepted = None
        if kept is not None and (asked.close or not kept.knows(asked.at, asked.prefix)):
            del self._kept[asked.session]
            await kept.close()
            kept = None
        if asked.close:
            return Rounded(replica=self._name)
        if kept is None:
            if asked.begin is None:
                return Rounded(replica=self._name, unknown=True)
            kept = await self._begin(asked, asked.begin)
        if asked.begin is not None:
            accepted = _document(kept.accepted)
        self._kept[asked.session] = self._kept.pop(asked.session, kept)
        kept.busy += 1
        try:
            if asked.window is not None:
                await kept.advance(asked.at, asked.window, own=asked.own)
        except GanglionError:
            if self._kept.get(asked.session) is kept:
                del self._kept[asked.session]
            await kept.close()
            raise
        finally:
            kept.busy -= 1
            kept.used_s = self._clock()
        return kept.since(asked.at, self._name, accepted)

    async def _begin(self, asked: Round, document: dict[str, Any]) -> _Kept:
        try:
            request = json_format.ParseDict(document, lane_pb2.Open())
        except json_format.ParseError as error:
            raise InvalidRequest(f"begin is no Open: {str(error)[:200]}", param="begin") from None
        if not request.HasField("contract"):
            raise InvalidRequest("begin has no contract", param="begin.contract")
        if (len(request.prompt), Prefix.of(request.prompt).name.hex()) != (asked.at, asked.prefix):
            raise InvalidRequest("begin holds another text than that which at and prefix name", param="begin.prompt")
        if request.contract.miss != lane_pb2.MISS_WAIT:
            raise InvalidRequest("of rounds the contract's miss is MISS_WAIT", param="contract.miss")
        while len(self._kept) >= self._most:
            idle = next((session for session, kept in self._kept.items() if not kept.busy), None)
            if idle is None:
                raise Exhausted(f"{self._most} sessions are verified now; try later, or deploy with more --sessions")
            await self._kept.pop(idle).close()
        kept = await _Kept.begin(request, self._serve)
        kept.used_s = self._clock()
        other, self._kept[asked.session] = self._kept.get(asked.session), kept
        if other is not None:  # the same round twice, side by side
            await other.close()
        return kept

    async def _forget_idle(self) -> None:
        now = self._clock()
        for session, kept in list(self._kept.items()):
            if not kept.busy and now - kept.used_s > self._idle_s:
                self._kept.pop(session, None)
                await kept.close()


class _Kept:
    """One session of the lead. Invariant: `told[i]` went on from the first `starts[i]` of `ids`."""

    def __init__(self, request: lane_pb2.Open, events: AsyncGenerator[lane_pb2.SessionEvent, None], said: Said) -> None:
        self.accepted = lane_pb2.Accepted()
        self.busy = 0
        self.used_s = 0.0
        self._ids = list(request.prompt)
        self._starts: list[int] = []
        self._told: list[lane_pb2.Tokens] = []
        self._finished: lane_pb2.Finished | None = None
        self._failure: GanglionError | None = None
        self._tip = b""
        self._runs = False  # without drafts, until the next outcome
        self._news = asyncio.Event()
        self._events, self._said = events, said
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def begin(cls, request: lane_pb2.Open, serve: Serve) -> _Kept:
        """Raises what refuses the session."""
        said = Said()
        kept = cls(request, serve(request, _NODE, said), said)
        first = await anext(kept._events)
        said.begin()
        kept.accepted = first.accepted
        kept._tip = first.accepted.terms.prefix
        kept._reading = asyncio.create_task(kept._read())
        return kept

    def knows(self, at: int, prefix: str) -> bool:
        """Whether the text of this name is one that it went on from, or will."""
        held = at == len(self._ids) or at in self._starts
        return held and Prefix.of(self._ids[:at]).name.hex() == prefix

    async def advance(self, at: int, window: tuple[int, ...], *, own: bool) -> None:
        """Have the lead go on from the first `at` tokens, until it has; raises what ends the session."""
        terms = self.accepted.terms
        if len(window) > terms.window_tokens:
            raise InvalidRequest(f"a window of {len(window)} tokens, at most {terms.window_tokens}", param="window")
        if at == len(self._ids) and self._finished is None and self._failure is None:
            if window:
                branch = lane_pb2.Branch(parent=self._tip, tokens=window)
                self._said.hear(lane_pb2.Drafts(round=len(self._told), branches=[branch]))
            elif self._told:  # the first token comes of the prompt, whatever is asked
                self._runs = True
                miss = lane_pb2.MISS_DRAFT if own else lane_pb2.MISS_RUN
                self._said.hear(lane_pb2.Drafts(round=len(self._told), miss=miss))
        while at == len(self._ids) and self._finished is None and self._failure is None:
            self._news.clear()
            await self._news.wait()
        if self._failure is not None:
            raise self._failure

    def since(self, at: int, replica: str, accepted: dict[str, Any] | None) -> Rounded:
        """What came after the first `at` tokens."""
        first = self._starts.index(at) if at in self._starts else len(self._told)
        return Rounded(
            replica=replica,
            outcomes=tuple(_document(one) for one in self._told[first:]),
            at=len(self._ids),
            prefix=Prefix.of(self._ids).name.hex(),
            finished=_document(self._finished) if self._finished is not None else None,
            accepted=accepted,
        )

    async def close(self) -> None:
        """End the session at the lead."""
        self._failure = self._failure or Unavailable("the session was closed for another; begin it again")
        self._news.set()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    self._take(event)
                    self._news.set()
        except GanglionError as error:
            self._failure = error
        except Exception as error:
            log.exception("a session failed by a defect")
            self._failure = Internal(to_body(error).message)
        finally:
            self._said.end()
            self._news.set()

    def _take(self, event: lane_pb2.SessionEvent) -> None:
        if event.WhichOneof("body") == "finished":
            self._finished = event.finished
        elif event.tokens.HasField("outcome"):
            # A pass that ends the answer may have no token: what is told is then that it is over.
            if event.tokens.tokens:
                self._starts.append(len(self._ids))
                self._told.append(event.tokens)
                self._ids += [token.id for token in event.tokens.tokens]
            self._tip = event.tokens.outcome.prefix
            if self._runs:
                self._runs = False
                self._said.hear(lane_pb2.Drafts(round=event.tokens.outcome.round, miss=lane_pb2.MISS_WAIT))


def _parse(body: bytes) -> Round:
    if len(body) > HTTP_BODY_BYTES:
        raise InvalidRequest(f"a round of {len(body)} bytes, at most {HTTP_BODY_BYTES}")
    try:
        return msgspec.json.decode(body, type=Round)
    except msgspec.DecodeError as error:
        raise InvalidDocument(f"a round that does not parse: {error}") from None


def _document(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def _told(error: GanglionError) -> bytes:
    return msgspec.json.encode({"error": to_body(error)})
