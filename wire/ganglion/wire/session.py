"""Sessions: the sealed stream between a gateway and the lead's worker. One stream a session; text stays at the gateway.

Inside the sealing: `SessionRequest` (Open, then perhaps Cancel) one way, `SessionEvent` the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire import rpc
from ganglion.wire.conversation import (
    Conversation,
    Stream,
    accept_conversation,
    open_conversation,
    read_message,
    write_message,
)
from ganglion.wire.errors import (
    DeviceLost,
    ErrorBody,
    Exhausted,
    GanglionError,
    ProtocolViolation,
    Unreachable,
    from_body,
    to_body,
)
from ganglion.wire.identity import Identity, VerifiedRecord, peer_of, verify_record
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES

log = logging.getLogger(__name__)

METHOD: Final = "/ganglion.v1.Session/Run"
_SERVICE, _NAME = "ganglion.v1.Session", "Run"
_REQUEST: Final = b"ganglion.v1 session request"
_EVENT: Final = b"ganglion.v1 session event"


class _End:
    """One end of an opened session."""

    def __init__(self, stream: Stream, conversation: Conversation) -> None:
        self._stream = stream
        self._sealer = conversation.sealer
        self._opener = conversation.opener
        self._who = f"the node {conversation.peer.node_id}"

    async def send(self, context: bytes, body: bytes) -> None:
        if len(body) + 64 > CONTROL_MESSAGE_BYTES:
            raise Exhausted(f"a session message of {len(body)} bytes, at most {CONTROL_MESSAGE_BYTES - 64} are sent")
        await write_message(self._stream, self._sealer.seal(context, body), self._who)

    async def receive(self, context: bytes) -> bytes:
        return self._opener.open(context, await read_message(self._stream, self._who))


class SessionClient:
    """The gateway's side: sessions on one lead, over one kept channel. Raises Unauthenticated for a record not signed.

    `lead`: the lead's worker, with an address; its record is verified under the owner's key. `close()` when done.
    """

    def __init__(self, identity: Identity, lead: identity_pb2.Peer, deployment: str, epoch: int) -> None:
        self._identity = identity
        self._record = verify_record(lead.record, identity.owner_public_key)
        self._address = lead.address
        self._deployment = deployment
        self._epoch = epoch
        self._channel = rpc.channel(lead.address, identity, peer=(self._record.node_id, self._record.role))

    async def close(self) -> None:
        """End what runs and release the channel."""
        await self._channel.close()

    async def run(self, request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Run a session: yields Accepted, Tokens, and at last Finished. Closing the generator cancels the session.

        Raises what the lead fails with (its Failed event as an error of the tree), Unreachable, DeviceLost when the
        lead goes away, Conflict for a stale epoch, Unauthenticated.
        """
        call: Any = self._channel.stream_stream(METHOD)()
        finished = False
        end: _End | None = None
        try:
            end = _End(call, await self._open(call))
            await end.send(_REQUEST, lane_pb2.SessionRequest(open=request).SerializeToString())
            while not finished:
                event = _parse_event(await end.receive(_EVENT))
                if event.WhichOneof("body") == "failed":
                    finished = True
                    raise from_body(ErrorBody(event.failed.code, event.failed.message, event.failed.param or None))
                finished = event.WhichOneof("body") == "finished"
                yield event
        finally:
            if not finished and end is not None:
                await _say_cancel(end)
            call.cancel()

    async def _open(self, call: Any) -> Conversation:
        opening = lane_pb2.Opening(deployment=self._deployment, epoch=self._epoch)
        try:
            return await open_conversation(call, self._identity, self._record, "session", opening)
        except DeviceLost as error:
            if isinstance(error.__cause__, grpc.aio.AioRpcError):
                mapped = rpc.to_error(error.__cause__, self._address)
                raise (mapped if isinstance(mapped, Unreachable) else error) from error
            raise


async def _say_cancel(end: _End) -> None:
    cancel = lane_pb2.SessionRequest(cancel=lane_pb2.Cancel())
    try:
        async with asyncio.timeout(0.25):
            await end.send(_REQUEST, cancel.SerializeToString())
    except (GanglionError, TimeoutError):
        pass  # the lead is gone; cutting the call says the same


def _parse_event(body: bytes) -> lane_pb2.SessionEvent:
    try:
        event = lane_pb2.SessionEvent.FromString(body)
    except DecodeError:
        raise ProtocolViolation("a session event does not parse") from None
    if event.WhichOneof("body") is None:
        raise ProtocolViolation("a session event without a body")
    return event


# node id of the caller -> its record, or raises a refusal
AcceptGateway = Callable[[str, str, int], VerifiedRecord]
# the events of one session of the gateway of this node id; closed (a cancellation at its await) as soon as the client
# leaves or cancels
OnSession = Callable[[lane_pb2.Open, str], AsyncGenerator[lane_pb2.SessionEvent, None]]


class SessionServicer:
    """The lead's side.

    `accept(node_id, deployment, epoch)` returns the gateway's verified record, or raises PermissionDenied, Conflict.
    `on_session(open, node_id)` is an async generator of events, the last of them Finished; an error that it raises
    becomes Failed. When the client leaves or cancels, the generator is cancelled where it waits, at once; its `finally`
    frees the session.
    """

    def __init__(self, identity: Identity, accept: AcceptGateway, on_session: OnSession) -> None:
        self._identity = identity
        self._accept = accept
        self._on_session = on_session

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve `/ganglion.v1.Session/Run` there, as raw bytes."""
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._run)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_NAME: handler}),))

    async def _run(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        node_id = peer_of(context).node_id

        def accept(opening: lane_pb2.Opening) -> VerifiedRecord:
            return self._accept(node_id, opening.deployment, opening.epoch)

        stream: Any = context
        conversation = await accept_conversation(stream, self._identity, node_id, "session", accept)
        end = _End(stream, conversation)
        request = await self._request(end)
        if request.WhichOneof("body") != "open":
            raise ProtocolViolation("a session begins with Open")
        serving = asyncio.create_task(self._serve(end, request.open, node_id))
        leaving = asyncio.create_task(self._until_cancelled(end))
        try:
            await asyncio.wait({serving, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (serving, leaving):
                task.cancel()
            await asyncio.gather(serving, leaving, return_exceptions=True)
        if not serving.cancelled() and (error := serving.exception()) is not None:
            raise error

    async def _request(self, end: _End) -> lane_pb2.SessionRequest:
        try:
            return lane_pb2.SessionRequest.FromString(await end.receive(_REQUEST))
        except DecodeError:
            raise ProtocolViolation("a session request does not parse") from None

    async def _until_cancelled(self, end: _End) -> None:
        """Return when the client cancels or leaves; anything else that it says now is a violation, and ends it too."""
        try:
            await self._request(end)
        except GanglionError:
            return

    async def _serve(self, end: _End, request: lane_pb2.Open, node_id: str) -> None:
        events = self._on_session(request, node_id)
        try:
            async for event in events:
                await end.send(_EVENT, event.SerializeToString())
        except DeviceLost as error:
            if isinstance(error.__cause__, grpc.RpcError | grpc.aio.BaseError):
                return  # the client left
            await self._fail(end, error)
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes Failed
            await self._fail(end, error)
        finally:
            await events.aclose()

    async def _fail(self, end: _End, error: Exception) -> None:
        if not isinstance(error, GanglionError):
            log.error("a session failed by a defect", exc_info=error)
        body = to_body(error)
        failed = lane_pb2.Failed(code=body.code, message=body.message, param=body.param or "")
        await end.send(_EVENT, lane_pb2.SessionEvent(failed=failed).SerializeToString())
