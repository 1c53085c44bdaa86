"""The piece service: hands out pieces to devices, gateways and the owner, and echoes for measuring links."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from ganglion.agent.store.bandwidth import Throttle
from ganglion.agent.store.pieces import PieceStore
from ganglion.proto import identity_pb2, pieces_pb2, pieces_pb2_grpc
from ganglion.wire.certificates import Role
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.limits import PIECE_CHUNK_BYTES

_TAKERS: Final = frozenset({Role.AGENT, Role.GATEWAY, Role.OWNER})
ALLOWED: Final = {
    "/ganglion.v1.Pieces/Greet": _TAKERS,
    "/ganglion.v1.Pieces/Fetch": _TAKERS,
    "/ganglion.v1.Pieces/Echo": _TAKERS,
}
STREAMS: Final = 32  # calls at once of one connection

Context = grpc.aio.ServicerContext[Any, Any]


class PieceService(pieces_pb2_grpc.PiecesServicer):
    """Serves the pieces of one store, all together within `throttle`; the server's interceptor checks roles."""

    def __init__(self, store: PieceStore, kernel_family: str = "", throttle: Throttle | None = None) -> None:
        self._store = store
        self._kernel_family = kernel_family
        self._throttle = throttle or Throttle()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with `server`."""
        pieces_pb2_grpc.add_PiecesServicer_to_server(self, server)  # type: ignore[no-untyped-call]

    async def Greet(self, request: identity_pb2.Hello, context: Context) -> identity_pb2.Hello:  # noqa: N802 - gRPC
        """Hello both ways; raises Unsupported."""
        check_hello(request)
        return hello(kernel_family=self._kernel_family)

    async def Fetch(  # noqa: N802 - gRPC
        self, request: pieces_pb2.FetchRequest, context: Context
    ) -> AsyncIterator[pieces_pb2.Chunk]:
        """Bytes of a held piece from `offset` on; raises NotFound, InvalidRequest."""
        with self._store.path_of(request.digest).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if request.offset > size:
                raise InvalidRequest(f"offset {request.offset} of piece {request.digest[:12]}, which has {size} bytes")
            at = request.offset
            while at < size:
                data = await asyncio.to_thread(os.pread, file.fileno(), self._throttle.chunk_bytes, at)
                if not data:
                    return
                await self._throttle.admit(len(data))
                yield pieces_pb2.Chunk(data=data)
                at += len(data)

    async def Echo(self, request: pieces_pb2.EchoRequest, context: Context) -> pieces_pb2.Chunk:  # noqa: N802 - gRPC
        """`reply_bytes` zero bytes; raises InvalidRequest beyond the size of a chunk."""
        if request.reply_bytes > PIECE_CHUNK_BYTES:
            raise InvalidRequest(
                f"reply_bytes: {request.reply_bytes}, at most {PIECE_CHUNK_BYTES}", param="reply_bytes"
            )
        return pieces_pb2.Chunk(data=bytes(request.reply_bytes))
