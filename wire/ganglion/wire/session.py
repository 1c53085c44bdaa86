"""Sessions: the sealed stream to the lead's worker, of a gateway or of the owner's device that drafts. One a session.

Inside the sealing: `SessionRequest` (Open, then Drafts where there is a contract, or Choose and Ask where the client
chooses, then perhaps Cancel) one way, `SessionEvent` the other. Text stays at the gateway. Here the client's side;
`session_serving` has the lead's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire import rpc
from ganglion.wire.conversation import Conversation, Stream, open_conversation, read_message, write_message
from ganglion.wire.errors import (
    DeviceLost,
    ErrorBody,
    Exhausted,
    GanglionError,
    ProtocolViolation,
    Unreachable,
    from_body,
)
from ganglion.wire.identity import Identity, verify_record
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES, DRAFTS_BYTES

METHOD: Final = "/ganglion.v1.Session/Run"
REQUEST: Final = b"ganglion.v1 session request"
EVENT: Final = b"ganglion.v1 session event"


class End:
    """One end of an opened session. Bytes are those of messages before sealing, the handshake's not among them."""

    def __init__(self, stream: Stream, conversation: Conversation) -> None:
        self.sent_bytes = 0
        self.received_bytes = 0
        self._stream = stream
        self._sealer = conversation.sealer
        self._opener = conversation.opener
        self._who = f"the node {conversation.peer.node_id}"
        self._writing = asyncio.Lock()  # frames are numbered: they leave in the order in which they were sealed

    async def send(self, context: bytes, body: bytes) -> None:
        """Seal and send a message; raises Exhausted for one that is too large, DeviceLost."""
        if len(body) + 64 > CONTROL_MESSAGE_BYTES:
            raise Exhausted(f"a session message of {len(body)} bytes, at most {CONTROL_MESSAGE_BYTES - 64} are sent")
        async with self._writing:
            await write_message(self._stream, self._sealer.seal(context, body), self._who)
            self.sent_bytes += len(body)

    async def receive(self, context: bytes) -> bytes:
        """The next message; raises DeviceLost, ProtocolViolation, and what the peer ended the stream with."""
        body = self._opener.open(context, await read_message(self._stream, self._who))
        self.received_bytes += len(body)
        return body


class Opened:
    """The client's end of a session that runs; made by `SessionClient.open`."""

    def __init__(self, call: Any, end: End) -> None:
        self._call = call
        self._end = end
        self._over = False

    @property
    def sent_bytes(self) -> int:
        """Of all requests, Open among them, before sealing."""
        return self._end.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Of all events, before sealing."""
        return self._end.received_bytes

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Accepted, Tokens (Scored, to a client that chooses), and at last Finished; to be called once.

        Closing the generator closes the session. Raises what the lead fails with (its Failed event as an error of the
        tree), DeviceLost when the lead goes away.
        """
        try:
            while not self._over:
                try:
                    event = _parse_event(await self._end.receive(EVENT))
                except DeviceLost:
                    if self._over:  # closed here, meanwhile
                        return
                    raise
                self._over |= event.WhichOneof("body") in {"finished", "failed"}
                if event.WhichOneof("body") == "failed":
                    raise from_body(ErrorBody(event.failed.code, event.failed.message, event.failed.param or None))
                yield event
        finally:
            await self.close()

    async def send_drafts(self, drafts: lane_pb2.Drafts) -> None:
        """Send a message; where the session is over or the lead is gone it is dropped: `events` says why.

        Raises Exhausted for more than DRAFTS_BYTES. A cancelled send ends the session.
        """
        await self._say("drafts", lane_pb2.SessionRequest(drafts=drafts))

    async def choose(self, position: int, tokens: Sequence[int]) -> None:
        """Say what follows the Scored of `position`: one token, or several, of whose rows only the last is told.

        Without tokens the session is over, and Finished comes. Otherwise as `send_drafts`.
        """
        await self._say("tokens", lane_pb2.SessionRequest(choose=lane_pb2.Choose(position=position, tokens=tokens)))

    async def ask(self, position: int, ids: Sequence[int]) -> None:
        """Ask for more of the Scored of `position`: the logits of `ids`, at most ASKED_IDS; none: of all."""
        await self._say("ids", lane_pb2.SessionRequest(ask=lane_pb2.Ask(position=position, ids=ids)))

    async def _say(self, what: str, request: lane_pb2.SessionRequest) -> None:
        body = request.SerializeToString()
        if len(body) > DRAFTS_BYTES:
            raise Exhausted(f"{what} of {len(body)} bytes, at most {DRAFTS_BYTES} are sent at a time")
        if not self._over:
            with contextlib.suppress(GanglionError):
                await self._end.send(REQUEST, body)

    async def close(self) -> None:
        """Cancel what runs and end the stream; again: nothing."""
        if not self._over:
            self._over = True
            await _say_cancel(self._end)
        self._call.cancel()


class SessionClient:
    """The client's side: sessions on one lead, over one kept channel. Raises Unauthenticated for a record not signed.

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

    async def open(self, request: lane_pb2.Open) -> Opened:
        """Begin a session, which runs until its `events` end or it is closed.

        Raises Unreachable, DeviceLost, Conflict for a stale epoch, PermissionDenied, Unauthenticated, Exhausted.
        """
        call: Any = self._channel.stream_stream(METHOD)()
        try:
            end = End(call, await self._converse(call))
            await end.send(REQUEST, lane_pb2.SessionRequest(open=request).SerializeToString())
        except BaseException:
            call.cancel()
            raise
        return Opened(call, end)

    async def run(self, request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Run a session: yields Accepted, Tokens, and at last Finished. Closing the generator cancels the session.

        Raises what `open` and `Opened.events` raise.
        """
        opened = await self.open(request)
        async with contextlib.aclosing(opened.events()) as events:
            async for event in events:
                yield event

    async def _converse(self, call: Any) -> Conversation:
        opening = lane_pb2.Opening(deployment=self._deployment, epoch=self._epoch)
        try:
            return await open_conversation(call, self._identity, self._record, "session", opening)
        except DeviceLost as error:
            if isinstance(error.__cause__, grpc.aio.AioRpcError):
                mapped = rpc.to_error(error.__cause__, self._address)
                raise (mapped if isinstance(mapped, Unreachable) else error) from error
            raise


async def _say_cancel(end: End) -> None:
    cancel = lane_pb2.SessionRequest(cancel=lane_pb2.Cancel())
    try:
        async with asyncio.timeout(0.25):
            await end.send(REQUEST, cancel.SerializeToString())
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
