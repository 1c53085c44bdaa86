"""What every server of ours does around a handler: map errors, check the role, and, for one test, record."""

from __future__ import annotations

import inspect
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import msgspec

from ganglion.wire.certificates import Role
from ganglion.wire.errors import GanglionError, PermissionDenied, Unauthenticated, to_body
from ganglion.wire.identity import peer_of
from ganglion.wire.status import abort

if TYPE_CHECKING:  # generic only to type checkers
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any]
    Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]

REFUSED: Final = "not allowed"  # one text for every refusal: a stranger learns nothing from it
_RECORD: Final = struct.Struct("<BHI")  # direction (0 in, 1 out), bytes of the method's name, bytes of the message


def _rebuild(
    handler: Handler,
    behavior: Callable[..., Any],
    deserializer: Callable[[bytes], Any] | None,
    serializer: Callable[[Any], bytes] | None,
) -> Handler:
    make: Callable[..., Handler]
    if handler.request_streaming:
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
    else:
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
    return make(behavior, request_deserializer=deserializer, response_serializer=serializer)


def _behavior(handler: Handler) -> Callable[..., Any]:
    found = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    if found is None:
        raise TypeError("a handler without behavior")
    return found


class GuardInterceptor(grpc.aio.ServerInterceptor):
    """Refuses before the handler runs, and maps what the handler raises to a status.

    `allowed`: full method name → roles; a method that is not listed is refused. None: server TLS without client
    certificates (enrolment), nothing is asked. `is_revoked`: whether a node id is shut out now. `recorder`: told of
    the errors, which travel outside the messages.
    """

    def __init__(
        self,
        allowed: Mapping[str, frozenset[Role]] | None,
        is_revoked: Callable[[str], bool] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._allowed = allowed
        self._is_revoked = is_revoked
        self._recorder = recorder

    async def _end(self, method: str, context: Context, error: Exception) -> NoReturn:
        if self._recorder is not None:
            self._recorder.write_error(method, error)
        await abort(context, error)

    def _check(self, method: str, context: Context) -> None:
        if self._allowed is None:
            return
        try:
            peer = peer_of(context)
        except GanglionError:
            raise Unauthenticated(REFUSED) from None
        if peer.role not in self._allowed.get(method, frozenset()):
            raise PermissionDenied(REFUSED)
        if self._is_revoked is not None and self._is_revoked(peer.node_id):
            raise PermissionDenied(REFUSED)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap the handler of the called method."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:  # unknown method: gRPC answers UNIMPLEMENTED
            return handler
        inner = _behavior(handler)

        if inspect.isasyncgenfunction(inner):

            async def streaming(request: Any, context: Context) -> AsyncIterator[Any]:
                replies = inner(request, context)
                try:
                    self._check(method, context)
                    async for reply in replies:
                        yield reply
                except grpc.aio.AbortError:
                    raise
                except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
                    await self._end(method, context, error)
                finally:
                    await replies.aclose()

            return _rebuild(handler, streaming, handler.request_deserializer, handler.response_serializer)

        async def plain(request: Any, context: Context) -> Any:
            try:
                self._check(method, context)
                return await inner(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001 - the edge: everything becomes a status
                await self._end(method, context, error)

        return _rebuild(handler, plain, handler.request_deserializer, handler.response_serializer)


class Recorder(grpc.aio.ServerInterceptor):
    """Appends every message that a server reads and writes, as serialized after TLS, to a file.

    For the test that shows what a coordinator sees. `read_recording` reads the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def write_error(self, method: str, error: Exception) -> None:
        """Append an error as it travels in the trailing metadata."""
        self._write(1, method.encode(), msgspec.json.encode(to_body(error)))

    def _write(self, direction: int, method: bytes, message: bytes) -> None:
        with self._lock:
            self._file.write(_RECORD.pack(direction, len(method), len(message)) + method + message)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Handler | None:
        """Wrap the serializers of the called method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        name = handler_call_details.method.encode()
        deserialize, serialize = handler.request_deserializer, handler.response_serializer

        def read(message: bytes) -> Any:
            self._write(0, name, message)
            return message if deserialize is None else deserialize(message)

        def written(reply: Any) -> bytes:
            message: bytes = reply if serialize is None else serialize(reply)
            self._write(1, name, message)
            return message

        return _rebuild(handler, _behavior(handler), read, written)


def read_recording(path: Path) -> list[tuple[str, str, bytes]]:
    """(direction "in" or "out", method, message) of a recording, in order; a cut last entry is left out."""
    content, at, found = path.read_bytes(), 0, []
    while at + _RECORD.size <= len(content):
        direction, name_size, size = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        if at + name_size + size > len(content):
            break
        method = content[at : at + name_size].decode()
        found.append(("out" if direction else "in", method, content[at + name_size : at + name_size + size]))
        at += name_size + size
    return found
