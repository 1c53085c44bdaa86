"""The error tree: one class per decision that a caller makes.

    GanglionError
    ├── InvalidRequest          the caller can mend it            HTTP 400  exit 2
    │   ├── InvalidDocument     a noun or frame that does not parse
    │   ├── ContextExceeded     prompt and answer beyond the context
    │   └── Unsupported         a family, parameter or format that is not supported
    ├── NotFound                model, device, token, piece       HTTP 404  exit 3
    ├── Unauthenticated         who are you                       HTTP 401  exit 4
    ├── PermissionDenied        not with this role or label       HTTP 403  exit 4
    ├── Conflict                port in use, name taken, stale epoch  HTTP 409  exit 5
    ├── Exhausted               memory, queue, quota: try later or turn the knob  HTTP 429  exit 6
    ├── DoesNotFit              no set of devices can hold the plan   HTTP 422  exit 6
    ├── Unavailable             not reachable, not ready, device lost HTTP 503  exit 7
    │   ├── DeviceLost
    │   └── Unreachable
    ├── ProtocolViolation       a peer broke the contract: its stream ends  HTTP 502  exit 8
    ├── Corrupt                 bytes are not what their digest says  HTTP 500  exit 9
    └── Internal                a defect of ours                  HTTP 500  exit 70

A message says what happened, which figure, and which knob to turn. Codes are stable; exit codes are in docs/cli.md.
"""

# ruff: noqa: N818 - the tree is named by what went wrong; every member is an error

from __future__ import annotations

from http import HTTPStatus
from typing import ClassVar

import msgspec


class GanglionError(Exception):
    """Root of the tree; `code` is stable and travels, the message is for people."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = HTTPStatus.INTERNAL_SERVER_ERROR
    openai_type: ClassVar[str] = "server_error"
    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(GanglionError):
    """What was asked is wrong; the message names the field and the bound."""

    code = "invalid_request"
    http_status = HTTPStatus.BAD_REQUEST
    openai_type = "invalid_request_error"
    exit_code = 2


class InvalidDocument(InvalidRequest):
    """A document, token or header that does not parse."""

    code = "invalid_document"


class ContextExceeded(InvalidRequest):
    """Prompt and answer do not fit the context."""

    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    """A model family, parameter, format or protocol version that this release does not support, by name."""

    code = "unsupported"


class NotFound(GanglionError):
    """No such model, device, deployment, token or piece."""

    code = "not_found"
    http_status = HTTPStatus.NOT_FOUND
    openai_type = "invalid_request_error"
    exit_code = 3


class Unauthenticated(GanglionError):
    """No or wrong credentials."""

    code = "unauthenticated"
    http_status = HTTPStatus.UNAUTHORIZED
    openai_type = "authentication_error"
    exit_code = 4


class PermissionDenied(GanglionError):
    """Known, and not allowed."""

    code = "permission_denied"
    http_status = HTTPStatus.FORBIDDEN
    openai_type = "permission_error"
    exit_code = 4


class Conflict(GanglionError):
    """A port in use, a name taken, a stale epoch, a folder that another process holds."""

    code = "conflict"
    http_status = HTTPStatus.CONFLICT
    openai_type = "invalid_request_error"
    exit_code = 5


class Exhausted(GanglionError):
    """A budget is spent; the message names it and its knob."""

    code = "exhausted"
    http_status = HTTPStatus.TOO_MANY_REQUESTS
    openai_type = "rate_limit_error"
    exit_code = 6


class DoesNotFit(GanglionError):
    """No set of devices holds the plan; the message says how much is missing where."""

    code = "does_not_fit"
    http_status = HTTPStatus.UNPROCESSABLE_ENTITY
    openai_type = "invalid_request_error"
    exit_code = 6


class Unavailable(GanglionError):
    """Not ready or not reachable now; trying again may help."""

    code = "unavailable"
    http_status = HTTPStatus.SERVICE_UNAVAILABLE
    exit_code = 7


class DeviceLost(Unavailable):
    """A device of the deployment went away during the request."""

    code = "device_lost"


class Unreachable(Unavailable):
    """An address did not answer; the message says which and what to check."""

    code = "unreachable"


class ProtocolViolation(GanglionError):
    """A peer sent what the contract forbids; its stream is ended and the event counted."""

    code = "protocol_violation"
    http_status = HTTPStatus.BAD_GATEWAY
    exit_code = 8


class Corrupt(GanglionError):
    """Bytes that are not what their digest or their header says."""

    code = "corrupt"
    exit_code = 9


class Internal(GanglionError):
    """A defect of ours."""


def _tree(root: type[GanglionError]) -> dict[str, type[GanglionError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


_BY_CODE = _tree(GanglionError) | {"internal": Internal}


class ErrorBody(msgspec.Struct, frozen=True):
    """An error as it travels: inside gRPC status details, session frames and worker events."""

    code: str
    message: str
    param: str | None = None


def to_body(error: BaseException) -> ErrorBody:
    """Describe any exception for the other side; what is not of the tree becomes `internal` without its text."""
    if isinstance(error, GanglionError):
        return ErrorBody(error.code, error.message, error.param)
    return ErrorBody(Internal.code, f"internal error ({type(error).__name__}); the log of the process has the details")


def from_body(body: ErrorBody) -> GanglionError:
    """The exception that `to_body` described; an unknown code becomes `Internal`."""
    return _BY_CODE.get(body.code, Internal)(body.message, param=body.param)
