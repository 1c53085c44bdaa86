"""JSON over HTTP/1.1 with the standard library alone: kept connections, TLS, limits; on the event loop.

What a server answers other than 200 becomes an error of the tree:
    400, 413, 422 InvalidRequest · 401 Unauthenticated · 403 PermissionDenied · 404 NotFound · 429 Exhausted
    ContextExceeded where it says so · others Unavailable
429 and 503 that say when to come back (Retry-After) are waited for, up to `patience_s` of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from ganglion.agent.speculation.http.message import HEADER_BYTES, Reply, read_reply
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

REPLY_BYTES: Final = 64 << 20  # log-probabilities of a long prompt, as text
_REFUSALS: Final[dict[int, type[GanglionError]]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: PermissionDenied,
    404: NotFound,
    405: NotFound,
    413: InvalidRequest,
    422: InvalidRequest,
    429: Exhausted,
}
RETRIES: Final = 5  # of one request that was told to come back
_MESSAGE_CHARACTERS: Final = 300
_CONTEXT: Final = ("context_length_exceeded", "exceed_context_size", "maximum context length", "context window")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds. connect: to reach the server. answer: from the request to the end of its answer, waiting not
    counted. patience: of one request, in which it is told to come back later (429 and 503 with Retry-After).
    """

    connect_s: float = CONNECT_S
    answer_s: float = 60.0
    patience_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Base:
    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


class HttpClient:
    """Requests to one server; connections are kept and reused. `sent_bytes`, `received_bytes`: bodies so far.

    url: "http(s)://host[:port][/path]", the path before each request's own. key: sent as a bearer token. tls: a context
    of one's own, for a private authority. Raises InvalidRequest (param url) for another kind of URL.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeouts: Timeouts | None = None,
        reply_bytes: int = REPLY_BYTES,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._base = _parse(url)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InvalidRequest("the server's key has characters that no HTTP header carries", param="key")
        self._key = key
        self._timeouts = timeouts or Timeouts()
        self._reply_bytes = reply_bytes
        self._tls = tls or (ssl.create_default_context() if self._base.secure else None)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._closed = False
        self.sent_bytes = 0
        self.received_bytes = 0

    @property
    def where(self) -> str:
        """The server as a person knows it, without its key."""
        return f"{'https' if self._base.secure else 'http'}://{self._base.authority}{self._base.path}"

    async def close(self) -> None:
        """Close the connections that are kept; those in use are closed when they are done."""
        self._closed = True
        idle, self._idle = self._idle, []
        for _, writer in idle:
            await _close(writer)

    async def get(self, path: str, *, root: bool = False) -> Any:
        """The parsed body of GET `path`; raises as the module says, and as `post`."""
        return await self._ask("GET", path, root, None)

    async def post(
        self, path: str, document: Mapping[str, Any], *, root: bool = False, headers: Mapping[str, str] | None = None
    ) -> Any:
        """The parsed body of POST `path` with `document`, a request that may be repeated without harm.

        root: `path` is beside the URL's last folder, "/v1", not in it. headers: beside the usual ones. Raises
        Unreachable (also: no answer in time), DeviceLost (closed in the middle), ProtocolViolation (no HTTP, no JSON,
        too long), what other statuses become.
        """
        return await self._ask("POST", path, root, json.dumps(document, separators=(",", ":")).encode(), headers)

    async def _ask(
        self, method: str, path: str, root: bool, body: bytes | None, headers: Mapping[str, str] | None = None
    ) -> Any:
        path = (self._base.path.removesuffix("/v1") if root else self._base.path) + path
        request = self._head(method, path, body, headers or {}) + (body or b"")
        waited_s = 0.0
        for last in (*(False,) * RETRIES, True):
            try:
                async with asyncio.timeout(self._timeouts.answer_s):
                    reply = await self._exchange(request)
            except TimeoutError:
                raise Unreachable(
                    f"{self.where} gave no answer in {self._timeouts.answer_s:g} s; a longer answer_s waits on"
                ) from None
            if reply.status == 200:
                return self._parsed(reply)
            later_s = _retry_after(reply) if reply.status in {429, 503} else None
            if last or later_s is None or waited_s + later_s > self._timeouts.patience_s:
                raise self._refused(reply, path)
            waited_s += later_s
            await asyncio.sleep(later_s)
        raise AssertionError  # the last round returns or raises

    async def _exchange(self, request: bytes) -> Reply:
        while self._idle:
            try:
                return await self._over(self._idle.pop(), request)
            except EOFError:
                continue  # closed while it was kept: the server has not seen the request
        try:
            return await self._over(await self._connect(), request)
        except EOFError:
            raise DeviceLost(f"{self.where} closed the connection without an answer") from None

    async def _over(self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> Reply:
        reader, writer = connection
        kept = False
        try:
            try:
                writer.write(request)
                await writer.drain()
            except (ConnectionError, ssl.SSLError) as error:
                raise EOFError from error
            self.sent_bytes += len(request)
            try:
                reply = await read_reply(reader, self._reply_bytes)
            except ssl.SSLError as error:
                raise DeviceLost(f"{self.where}: TLS ended: {error.reason}") from error
            self.received_bytes += len(reply.body)
            kept = reply.kept and not self._closed
        except GanglionError as error:
            raise type(error)(f"{self.where}: {error.message}") from error
        finally:
            if kept:
                self._idle.append(connection)
            else:
                writer.transport.abort()  # a request may still be running behind it
        return reply

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        base = self._base
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                reader, writer = await asyncio.open_connection(base.host, base.port, ssl=self._tls, limit=HEADER_BYTES)
        except ssl.SSLCertVerificationError as error:
            raise Unauthenticated(f"{self.where}: its certificate is not accepted: {error.verify_message}") from error
        except (OSError, ssl.SSLError, TimeoutError) as error:
            reason = "no connection in time" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise Unreachable(f"{self.where} cannot be reached: {reason}") from error
        with contextlib.suppress(OSError):
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return reader, writer

    def _head(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> bytes:
        lines = [
            f"{method} {path} HTTP/1.1",
            f"Host: {self._base.authority}",
            "Accept: application/json",
            "User-Agent: ganglion",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        if self._key is not None:
            lines.append(f"Authorization: Bearer {self._key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode()

    def _parsed(self, reply: Reply) -> Any:
        try:
            return _parsed(reply.body)
        except (ValueError, RecursionError) as error:
            raise ProtocolViolation(
                f"{self.where}: its answer is no JSON, it begins with {reply.body[:40]!r}"
            ) from error

    def _refused(self, reply: Reply, path: str) -> GanglionError:
        said = _said(reply.body)
        message = f"{self.where}: {path} answered {reply.status}{': ' if said else ''}{said}"
        kind = _REFUSALS.get(reply.status, Unavailable)
        if reply.status in {400, 413, 422, 500} and any(word in said for word in _CONTEXT):
            kind = ContextExceeded
        if kind is Unauthenticated:
            message += "; the key for it is wrong or missing"
        if kind is Exhausted and (later_s := _retry_after(reply)) is not None:
            message += f"; it asks for {later_s:g} s, patience is {self._timeouts.patience_s:g} s"
        return kind(message)


def _parse(url: str) -> _Base:
    try:
        parts = urlsplit(url)
        secure, host, port = parts.scheme == "https", parts.hostname, parts.port
    except ValueError as error:
        raise InvalidRequest(f"{url[:200]!r} is no URL: {error}", param="url") from None
    if parts.scheme not in {"http", "https"} or not host or parts.username or parts.query or parts.fragment:
        raise InvalidRequest(f"{url[:200]!r} is not of the form http(s)://host[:port][/path]", param="url")
    if not (url.isascii() and url.isprintable()) or " " in url:
        raise InvalidRequest(f"{url[:200]!r} has characters that no URL has", param="url")
    return _Base(secure, host, port or (443 if secure else 80), parts.path.rstrip("/"))


def _parsed(body: bytes) -> Any:
    """JSON at msgspec's speed, since it is parsed on the event loop; json also takes the infinities that some write."""
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return json.loads(body)


def _retry_after(reply: Reply) -> float | None:
    """Seconds to wait, of a Retry-After in seconds or as a date."""
    value = reply.headers.get("retry-after", "")
    if value.isascii() and value.isdecimal():
        return float(value[:9])
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _said(body: bytes) -> str:
    """What an error's body says, on one line."""
    try:
        found: Any = json.loads(body)
        while isinstance(found, dict) and any(name in found for name in ("error", "message", "detail")):
            code = found.get("code")
            found = found.get("error") or found.get("message") or found.get("detail")
            if isinstance(code, str) and isinstance(found, str):
                found = f"{found} ({code})"
        text = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        text = body.decode("utf-8", "replace")
    line = " ".join(text.split())
    return line if len(line) <= _MESSAGE_CHARACTERS else line[:_MESSAGE_CHARACTERS] + " ..."


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()
