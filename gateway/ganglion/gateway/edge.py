"""From the bytes of a request to one checked JSON object: size, media type, depth, duplicates, characters."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, NoReturn

from starlette.requests import Request

from ganglion.gateway.schemas import SCHEMA_DEPTH
from ganglion.wire.errors import GanglionError, InvalidRequest
from ganglion.wire.limits import HTTP_BODY_BYTES, JSON_DEPTH

BODY_S = 30.0  # for a whole body to arrive
BODY_DEPTH = JSON_DEPTH + SCHEMA_DEPTH  # a schema may be deep, whatever is around it
DRAINED_BYTES = 4 * HTTP_BODY_BYTES  # of a body that is too long, read so that the client hears why


class Refused(Exception):  # noqa: N818  (not a failure of ours: a decision with a status of its own)
    """An error of the tree with the precise HTTP status."""

    def __init__(self, error: GanglionError, status: HTTPStatus) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status


async def read_object(request: Request) -> dict[str, Any]:
    """The request's JSON object; raises Refused, InvalidRequest or ClientDisconnect."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Refused(
            InvalidRequest(f"content-type is {media or 'not given'}; it must be application/json"),
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        )
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read(request)
    except TimeoutError:
        raise Refused(
            InvalidRequest(f"the body did not arrive within {BODY_S:g} s"), HTTPStatus.REQUEST_TIMEOUT
        ) from None
    return parse_object(body)


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > DRAINED_BYTES:
        _too_long()
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= HTTP_BODY_BYTES:
            parts.append(part)
        elif size > DRAINED_BYTES:
            break
    if size > HTTP_BODY_BYTES:
        _too_long()
    return b"".join(parts)


def _too_long() -> NoReturn:
    raise Refused(
        InvalidRequest(f"the body is longer than {HTTP_BODY_BYTES} bytes"), HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    )


def parse_object(body: bytes) -> dict[str, Any]:
    """One JSON object (RFC 8259) without duplicate keys, lone surrogates or NUL; raises InvalidRequest saying where."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8 (byte {error.start})") from None
    if text.startswith("\ufeff"):
        raise InvalidRequest("the body begins with a byte order mark; send JSON without it")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # an integer of thousands of digits
        raise InvalidRequest("the body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    _check(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidRequest("an object of the body has the same key twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not JSON")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested deeper than {BODY_DEPTH} levels")


def _check(root: dict[str, Any]) -> None:
    """Depth and characters, without recursion."""
    level: list[Any] = [root]
    depth = 1
    while level:
        if depth > BODY_DEPTH:
            raise _too_deep()
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    _check_text(key)
                children: Any = value.values()
            else:
                children = value
            for child in children:
                if isinstance(child, str):
                    _check_text(child)
                elif isinstance(child, dict | list):
                    below.append(child)
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    if "\0" in text:
        raise InvalidRequest("a string of the body holds the character NUL (U+0000)")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("a string of the body holds half a character (a lone surrogate)") from None
