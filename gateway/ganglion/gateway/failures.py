"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}} with the status of the error tree."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.responses import Response

from ganglion.wire.errors import Exhausted, GanglionError, Internal, Unavailable

RETRY_AFTER_S = 1

_log = logging.getLogger(__name__)


class JSONBody(Response):
    """A JSON response; numbers that JSON does not know are refused when it is made."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Compact UTF-8."""
        return msgspec.json.encode(content)


def describe(error: GanglionError) -> dict[str, Any]:
    """The body of an error, also for an event of a stream."""
    return {
        "error": {"message": error.message, "type": error.openai_type, "param": error.param, "code": error.code},
    }


def failure(error: GanglionError, *, status: int | None = None, headers: Mapping[str, str] | None = None) -> JSONBody:
    """The response for `error`; `status` where HTTP has a more precise one than the tree."""
    extra = dict(headers or {})
    if isinstance(error, Exhausted | Unavailable):
        extra["retry-after"] = str(RETRY_AFTER_S)
    if status is None:
        status = int(error.http_status)
    if status == HTTPStatus.UNAUTHORIZED:
        extra["www-authenticate"] = "Bearer"
    return JSONBody(describe(error), status, headers=extra)


def known(error: BaseException) -> GanglionError:
    """`error` itself when it is of the tree, else Internal.

    The log gets its type and where it happened, never its text: that may hold a part of a prompt.
    """
    if isinstance(error, GanglionError):
        return error
    _log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return Internal(f"internal error ({type(error).__name__}); the gateway's log says where")
