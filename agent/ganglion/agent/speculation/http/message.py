"""HTTP/1.1 as a client reads it: a status line, headers, a body of known or chunked length. RFC 9112."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from ganglion.wire.errors import DeviceLost, ProtocolViolation

HEADER_BYTES: Final = 64 << 10
INTERIM_REPLIES: Final = 8  # 1xx, before the one that counts
_CHUNK_LINE_BYTES: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply; names of headers are in lower case. kept: the connection may carry another request."""

    status: int
    headers: dict[str, str]
    body: bytes
    kept: bool


async def read_reply(reader: asyncio.StreamReader, most_bytes: int) -> Reply:
    """Read one reply with a body of at most `most_bytes`.

    Raises EOFError where the other side closed before a reply began, DeviceLost where it did later, ProtocolViolation
    for what is no HTTP or is too long.
    """
    for _ in range(INTERIM_REPLIES):
        version, status, headers = await _head(reader)
        if status >= 200:
            break
    else:
        raise ProtocolViolation(f"the server sent {INTERIM_REPLIES} interim replies and no answer")
    try:
        body, bounded = await _body(reader, status, headers, most_bytes)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise DeviceLost("the server closed the connection in the middle of an answer") from error
    kept = bounded and version == "HTTP/1.1" and "close" not in headers.get("connection", "").lower()
    return Reply(status, headers, body, kept)


async def _head(reader: asyncio.StreamReader) -> tuple[str, int, dict[str, str]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            raise EOFError from error
        raise DeviceLost("the server closed the connection in the middle of an answer") from error
    except ConnectionError as error:
        raise EOFError from error
    except asyncio.LimitOverrunError as error:
        raise ProtocolViolation(f"an HTTP header of more than {HEADER_BYTES >> 10} KiB") from error
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    parts = first.split(" ", 2)
    if len(parts) < 2 or parts[0] not in {"HTTP/1.1", "HTTP/1.0"} or not (parts[1].isdecimal() and len(parts[1]) == 3):
        raise ProtocolViolation(f"the answer begins with {first[:40]!r}, which is no HTTP")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise ProtocolViolation(f"an HTTP header line without a colon: {line[:40]!r}")
        headers[name.strip().lower()] = value.strip()
    return parts[0], int(parts[1]), headers


async def _body(reader: asyncio.StreamReader, status: int, headers: dict[str, str], most: int) -> tuple[bytes, bool]:
    if status in {204, 304}:
        return b"", True
    coding = headers.get("transfer-encoding", "").lower()
    if coding == "chunked":
        return await _chunks(reader, most), True
    if coding or headers.get("content-encoding", "identity").lower() != "identity":
        raise ProtocolViolation(f"an answer coded as {(coding or headers['content-encoding'])[:40]!r}, not asked for")
    length = headers.get("content-length")
    if length is None:
        body = await reader.read(most + 1)
        while not reader.at_eof() and len(body) <= most:
            body += await reader.read(most + 1 - len(body))
        return _bounded(body, most), False
    if not (length.isascii() and length.isdecimal() and len(length) < 16):
        raise ProtocolViolation(f"a Content-Length of {length[:40]!r}")
    if int(length) > most:
        raise ProtocolViolation(f"an answer of {length} bytes, at most {most} are read")
    return await reader.readexactly(int(length)), True


async def _chunks(reader: asyncio.StreamReader, most: int) -> bytes:
    body = bytearray()
    while True:
        size = (await _line(reader)).split(b";", 1)[0].strip()
        try:
            length = int(size, 16) if size.isalnum() else -1
        except ValueError:
            length = -1
        if length < 0:
            raise ProtocolViolation(f"a chunk of {size[:20]!r} bytes")
        if length == 0:
            while await _line(reader):
                pass
            return bytes(body)
        if len(body) + length > most:
            raise ProtocolViolation(f"an answer of more than {most} bytes")
        body += await reader.readexactly(length)
        if await reader.readexactly(2) != b"\r\n":
            raise ProtocolViolation("a chunk that does not end where it says")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readuntil(b"\r\n")
    except asyncio.LimitOverrunError as error:
        raise ProtocolViolation("a chunk's line without an end") from error
    if len(line) > _CHUNK_LINE_BYTES:
        raise ProtocolViolation(f"a chunk's line of {len(line)} bytes")
    return line[:-2]


def _bounded(body: bytes, most: int) -> bytes:
    if len(body) > most:
        raise ProtocolViolation(f"an answer of more than {most} bytes")
    return body
