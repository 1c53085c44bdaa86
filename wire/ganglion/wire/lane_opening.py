"""How lanes come to be: dialled here, or accepted by a servicer; over gRPC, and over a socket where both ends agree."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc

from ganglion.proto import lane_pb2
from ganglion.wire import rpc
from ganglion.wire.address import split_address
from ganglion.wire.conversation import BROKEN, accept_conversation, open_conversation
from ganglion.wire.errors import DeviceLost, GanglionError
from ganglion.wire.identity import Identity, VerifiedRecord, peer_of
from ganglion.wire.lane import CLOSE_S, Lane
from ganglion.wire.lane_grpc import GrpcLane
from ganglion.wire.lane_socket import SocketLane
from ganglion.wire.lane_upgrade import Sockets, Upgraded

METHOD: Final = "/ganglion.v1.Lane/Exchange"
_SERVICE, _NAME = "ganglion.v1.Lane", "Exchange"


async def dial_lane(
    address: str,
    identity: Identity,
    peer: VerifiedRecord,
    *,
    deployment: str,
    epoch: int,
    own_rank: int,
    peer_rank: int,
    sockets: Sockets,
) -> Lane:
    """Dial the worker of `peer` at `address` (host:port) and seal a lane of this deployment and epoch.

    Raises Unreachable, Unauthenticated (another sealing key, deployment or epoch), what the peer refuses with
    (Conflict for a stale epoch), ProtocolViolation, and where `sockets` must have one what its `dialled` raises.
    """
    dialled = rpc.channel(address, identity, peer=(peer.node_id, peer.role), kind="tensor")
    call: Any = None
    try:
        call = dialled.stream_stream(METHOD)()
        opening = lane_pb2.Opening(deployment=deployment, epoch=epoch, source=own_rank, destination=peer_rank)
        try:
            conversation = await open_conversation(call, identity, peer, "lane", opening, features=sockets.features)
        except DeviceLost as error:
            # Before anything was said it is the address that is in question, not the device.
            if isinstance(error.__cause__, grpc.aio.AioRpcError):
                raise rpc.to_error(error.__cause__, address) from error
            raise
        upgraded = await sockets.dialled(call, conversation, identity.node_id, split_address(address)[0])
    except BaseException:
        if call is not None:
            call.cancel()
        await dialled.close()
        raise

    async def shut() -> None:
        # A cancelled call throws away what its peer has not read yet: half-close, and give the peer a moment.
        try:
            async with asyncio.timeout(CLOSE_S / 2):
                await call.done_writing()
                await call.code()
        except (TimeoutError, *BROKEN):
            pass
        finally:
            call.cancel()
            await dialled.close()

    carrier = GrpcLane(call, conversation, own_rank, peer_rank, abandon=call.cancel, shut=shut)
    call.add_done_callback(lambda _call: carrier._end())
    return _lane(carrier, upgraded)


def _lane(carrier: GrpcLane, upgraded: Upgraded | None) -> Lane:
    if upgraded is None:
        return carrier
    ranks = carrier.own_rank, carrier.peer_rank
    return SocketLane(upgraded.connection, upgraded.conversation, *ranks, carrier)


# (node id, deployment, epoch, caller's rank, own rank as the caller sees it) -> the caller's record; raises a refusal
Accept = Callable[[str, str, int, int, int], VerifiedRecord]


class LaneServicer:
    """The accepting side: checks the caller, seals, hands the lane over, and keeps the stream until it is closed.

    `accept(node_id, deployment, epoch, rank, own_rank)` returns the caller's verified record, or raises: Conflict for a
    stale epoch, PermissionDenied for a stranger. `deliver(lane)` gets each sealed lane, `failed(rank, error)` what kept
    one that was accepted from coming to be for want of a socket.
    """

    def __init__(
        self,
        identity: Identity,
        accept: Accept,
        deliver: Callable[[Lane], None],
        failed: Callable[[int, GanglionError], None],
        sockets: Sockets,
    ) -> None:
        self._identity = identity
        self._failed = failed
        self._sockets = sockets
        self._accept = accept
        self._deliver = deliver

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve `/ganglion.v1.Lane/Exchange` there, as raw bytes."""
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._exchange)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_NAME: handler}),))

    async def _exchange(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        node_id = peer_of(context).node_id

        def accept(opening: lane_pb2.Opening) -> VerifiedRecord:
            return self._accept(node_id, opening.deployment, opening.epoch, opening.source, opening.destination)

        stream: Any = context
        sockets, own = self._sockets, self._identity.node_id
        conversation = await accept_conversation(
            stream, self._identity, node_id, "lane", accept, features=sockets.features
        )
        ranks = conversation.opening.destination, conversation.opening.source
        try:
            upgraded = await sockets.accepted(stream, conversation, own)
        except GanglionError as error:
            self._failed(ranks[1], error)
            raise
        carrier = GrpcLane(stream, conversation, *ranks, abandon=lambda: None, shut=_nothing)
        try:
            self._deliver(_lane(carrier, upgraded))
            await carrier.wait_closed()
        finally:
            carrier._end()


async def _nothing() -> None:
    """The handler itself ends the call when its lane is closed."""
