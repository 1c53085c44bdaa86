"""Errors across gRPC: the tree of `errors` as a status with its body in the trailing metadata, and back."""

from __future__ import annotations

import logging
from typing import Any, Final, NoReturn

import grpc
import msgspec

from ganglion.wire.errors import (
    Conflict,
    Corrupt,
    DoesNotFit,
    ErrorBody,
    Exhausted,
    GanglionError,
    Internal,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unavailable,
    Unreachable,
    Unsupported,
    from_body,
    to_body,
)

log = logging.getLogger(__name__)

METADATA_KEY: Final = "ganglion-error-bin"
_MESSAGE_CHARACTERS: Final = 2000  # trailing metadata are limited to 8 KiB
_Code = grpc.StatusCode

_STATUS: Final[tuple[tuple[type[GanglionError], grpc.StatusCode], ...]] = (
    (Unsupported, _Code.UNIMPLEMENTED),
    (InvalidRequest, _Code.INVALID_ARGUMENT),
    (NotFound, _Code.NOT_FOUND),
    (Unauthenticated, _Code.UNAUTHENTICATED),
    (PermissionDenied, _Code.PERMISSION_DENIED),
    (Conflict, _Code.ABORTED),
    (Exhausted, _Code.RESOURCE_EXHAUSTED),
    (DoesNotFit, _Code.FAILED_PRECONDITION),
    (Unavailable, _Code.UNAVAILABLE),
    (ProtocolViolation, _Code.FAILED_PRECONDITION),
    (Corrupt, _Code.DATA_LOSS),
)


def status_of(error: GanglionError) -> grpc.StatusCode:
    """The gRPC status of an error of the tree."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), _Code.INTERNAL)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End a call with an error; what is not of the tree is logged here and travels as `internal` without its text."""
    if not isinstance(error, GanglionError):
        log.error("a call failed by a defect", exc_info=error)
    body = to_body(error)
    body = msgspec.structs.replace(body, message=body.message[:_MESSAGE_CHARACTERS])
    status = status_of(from_body(body))
    await context.abort(status, body.message, trailing_metadata=((METADATA_KEY, msgspec.json.encode(body)),))
    raise AssertionError("unreachable")  # abort always raises


def to_error(error: grpc.RpcError, address: str) -> GanglionError:
    """The error of the tree behind a failed call to `address` (host:port), which Unreachable names."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return Internal(f"a call to {address} failed: {type(error).__name__}")
    for key, value in error.trailing_metadata() or ():
        if key == METADATA_KEY and isinstance(value, bytes):
            try:
                return from_body(msgspec.json.decode(value, type=ErrorBody))
            except msgspec.DecodeError:
                break
    status, details = error.code(), (error.details() or "")[:300]
    if status in (_Code.UNAVAILABLE, _Code.DEADLINE_EXCEEDED):
        return Unreachable(
            f"{address} does not answer ({details or status.name.lower()}); check that the process there runs, "
            f"that the address and the port are right, and that no firewall is between"
        )
    kinds: dict[grpc.StatusCode, type[GanglionError]] = {
        _Code.UNAUTHENTICATED: Unauthenticated,
        _Code.PERMISSION_DENIED: PermissionDenied,
        _Code.UNIMPLEMENTED: Unsupported,
        _Code.NOT_FOUND: NotFound,
        _Code.INVALID_ARGUMENT: InvalidRequest,
        _Code.RESOURCE_EXHAUSTED: Exhausted,
        _Code.CANCELLED: Unavailable,
    }
    return kinds.get(status, Internal)(f"{address}: {details or status.name.lower()}")
