"""Asking somebody else's OpenAI-compatible server: one streamed answer over HTTP.

What it answers other than 200 becomes an error of the tree:
    400, 413, 422 InvalidRequest · 401 Unauthenticated · 403 PermissionDenied · 404, 405 NotFound · 429 Exhausted
    ContextExceeded where it says so · 3xx ProtocolViolation (text follows no redirect) · others Unavailable
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Final

import httpx
import msgspec

from ganglion.gateway.experts.parts import Over, Said, Taken
from ganglion.gateway.experts.replies import BODY_BYTES, Events, NonsenseError, Piece, read_piece
from ganglion.gateway.experts.servers import Server
from ganglion.gateway.stopping import StopMatcher
from ganglion.wire.errors import (
    ContextExceeded,
    DeviceLost,
    Exhausted,
    GanglionError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from ganglion.wire.limits import CONNECT_S

READ_S: Final = 600.0  # between two parts of an answer; an expert's own patience is shorter
ERROR_BYTES: Final = 64 << 10
DRAIN_S: Final = 0.05  # from the end of an answer to that of its reply, in which the connection is kept
_MESSAGE_CHARACTERS: Final = 300
_REFUSALS: Final[Mapping[int, type[GanglionError]]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    405: NotFound,
    413: InvalidRequest,
    422: InvalidRequest,
    429: Exhausted,
}
_CONTEXT: Final = ("context_length_exceeded", "exceed_context_size", "maximum context length", "context window")
_REASONS: Final = {"length": "length"}  # whatever else ends an answer is an end


@dataclass(frozen=True)
class Question:
    """POST `path` with `document` (without what streaming needs). stops: cut here too, whatever the server does.

    most: tokens of the answer.
    """

    path: str
    document: Mapping[str, Any]
    stops: tuple[str, ...] = ()
    most: int = 1 << 31


class ServerClient:
    """Kept connections to the servers that are asked; one client for each URL."""

    def __init__(self) -> None:
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._tls: ssl.SSLContext | None = None  # with the system's authorities: read when it is first needed

    async def close(self) -> None:
        """Close every connection."""
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.aclose()

    async def ask(self, server: Server, question: Question) -> AsyncGenerator[Taken | Said | Over, None]:
        """One answer: Taken, Said…, Over. Closing it ends the request.

        Raises NonsenseError and errors of the tree, whose messages may hold the server's words.
        """
        document = {**question.document, "stream": True, "stream_options": {"include_usage": True}}
        matcher, counted = StopMatcher(question.stops), _Counted(question.most)
        async with self._posted(server, question.path, document) as reply:
            yield Taken()
            async with aclosing(_pieces(server, reply)) as pieces:
                async for piece in pieces:
                    counted.add(piece)
                    text = matcher.push(piece.text)
                    if text or piece.logprobs:
                        yield Said(text, 1 if piece.text else 0, piece.logprobs)
                    if matcher.stopped:
                        break
        if not matcher.stopped and (rest := matcher.finish()):
            yield Said(rest, 0)
        yield Over("stop" if matcher.stopped else counted.reason, counted.prompt_tokens, counted.completion_tokens)

    async def link_s(self, server: Server) -> float:
        """Time of one small request to the server; seconds. Raises Unreachable."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._client(server).head("/models", headers=_headers(server))
        except (httpx.HTTPError, OSError, TimeoutError) as error:
            raise Unreachable(f"{server.url} cannot be reached ({type(error).__name__})") from None
        return time.monotonic() - began_s

    def _client(self, server: Server) -> httpx.AsyncClient:
        client = self._clients.get(server.url)
        if client is None:
            if self._tls is None and server.url.startswith("https:"):
                self._tls = ssl.create_default_context()
            # No proxy and no .netrc of the environment: text and key go to this server and nowhere else.
            client = self._clients[server.url] = httpx.AsyncClient(
                base_url=server.url,
                follow_redirects=False,
                trust_env=False,
                verify=self._tls or ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),  # which trusts nobody
                timeout=httpx.Timeout(CONNECT_S, read=READ_S),
                limits=httpx.Limits(max_connections=64, max_keepalive_connections=8),
            )
            client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=()))  # one request knows of no other
        return client

    @asynccontextmanager
    async def _posted(self, server: Server, path: str, document: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        content = msgspec.json.encode(document)
        headers = {**_headers(server), "content-type": "application/json"}
        try:
            async with self._client(server).stream("POST", path, content=content, headers=headers) as reply:
                if reply.status_code != 200:
                    raise _refused(server, reply.status_code, await _start_of(reply))
                if reply.headers.get("content-encoding", "identity") != "identity":
                    raise NonsenseError("its answer is compressed, which was not asked for")
                yield reply
        except httpx.ConnectError as error:
            cause = error.__cause__ or error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Unauthenticated(
                    f"{server.url}: its certificate is not accepted: {cause.verify_message}"
                ) from None
            raise Unreachable(f"{server.url} cannot be reached ({cause})") from None
        except httpx.ConnectTimeout:
            raise Unreachable(f"{server.url} cannot be reached: no connection within {CONNECT_S:g} s") from None
        except httpx.TimeoutException:
            raise Unavailable(f"{server.url} said nothing for {READ_S:g} s") from None
        except httpx.RemoteProtocolError as error:
            if "without sending" in str(error) or "incomplete" in str(error) or "closed" in str(error):
                raise DeviceLost(f"{server.url} closed the connection before its answer was whole") from None
            raise NonsenseError("its answer is no HTTP") from None
        except httpx.HTTPError as error:
            raise DeviceLost(f"the connection to {server.url} was lost ({type(error).__name__})") from None


class _Counted:
    """Tokens of an answer. The server's own count is bounded by what it can be: a token has a byte at least."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = self._said = 0
        self._claimed: int | None = None
        self.prompt_tokens = 0
        self.reason = "stop"

    def add(self, piece: Piece) -> None:
        self._bytes += len(piece.text.encode())
        self._said += max(len(piece.logprobs), 1 if piece.text else 0)
        if piece.prompt_tokens is not None:
            self.prompt_tokens = piece.prompt_tokens
        if piece.completion_tokens is not None:
            self._claimed = piece.completion_tokens
        if piece.reason:
            self.reason = _REASONS.get(piece.reason, "stop")

    @property
    def completion_tokens(self) -> int:
        return min(self._said if self._claimed is None else self._claimed, self._bytes + 1, self._most)


async def _pieces(server: Server, reply: httpx.Response) -> AsyncGenerator[Piece, None]:
    """What the answer is made of, streamed or (of a server that does not stream) whole."""
    ended = False
    media = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media == "application/json":
        parts: list[bytes] = []
        async for content in reply.aiter_raw():
            parts.append(content)
            if sum(map(len, parts)) > BODY_BYTES:
                raise NonsenseError(f"its answer is longer than {BODY_BYTES} bytes")
        yield read_piece(b"".join(parts))
        return
    events, contents = Events(), reply.aiter_raw()
    async for content in contents:
        for data in events.push(content):
            piece = read_piece(data)
            ended = ended or bool(piece.reason)
            yield piece
        if events.done:
            await _drain(contents)
            return
    for data in events.finish():
        piece = read_piece(data)
        ended = ended or bool(piece.reason)
        yield piece
    if not ended and not events.done:
        raise DeviceLost(f"{server.url} ended its answer in the middle")


async def _drain(contents: AsyncIterator[bytes]) -> None:
    """Read the end of the reply, which comes with that of the answer: only of a whole one the connection is kept."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            async for _ in contents:
                pass


def _headers(server: Server) -> dict[str, str]:
    headers = {"accept": "text/event-stream, application/json", "accept-encoding": "identity", "user-agent": "ganglion"}
    return headers if server.key is None else headers | {"authorization": f"Bearer {server.key}"}


async def _start_of(reply: httpx.Response) -> bytes:
    content = b""
    async for part in reply.aiter_raw():
        content += part
        if len(content) > ERROR_BYTES:
            break
    return content[:ERROR_BYTES]


def _refused(server: Server, status: int, body: bytes) -> GanglionError:
    if 300 <= status < 400:
        return ProtocolViolation(f"{server.url} leads elsewhere (HTTP {status}); text follows no redirect")
    said = " ".join(body.decode("utf-8", "replace").split())
    kind = _REFUSALS.get(status, Unavailable)
    if kind is InvalidRequest and any(words in said for words in _CONTEXT):
        kind = ContextExceeded
    message = "".join(character for character in said[:_MESSAGE_CHARACTERS] if character.isprintable())
    return kind(f"{server.url} answered {status}{': ' if message else ''}{message}")
