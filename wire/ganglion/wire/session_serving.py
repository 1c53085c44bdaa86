"""Sessions at the lead's worker: who may open one, what it says meanwhile, and the events of its answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from ganglion.proto import lane_pb2
from ganglion.wire.conversation import accept_conversation
from ganglion.wire.errors import DeviceLost, GanglionError, PermissionDenied, ProtocolViolation, to_body
from ganglion.wire.identity import Identity, Role, TrustLabel, VerifiedRecord, peer_of
from ganglion.wire.limits import DRAFTS_BYTES, DRAFTS_WAITING, HANDSHAKE_S
from ganglion.wire.session import EVENT, REQUEST, End

log = logging.getLogger(__name__)

ROLES: Final = frozenset({Role.GATEWAY, Role.AGENT})
_SERVICE, _NAME = "ganglion.v1.Session", "Run"


def check_client(record: VerifiedRecord, name: str) -> None:
    """Whether such a node may be admitted to sessions at all: a gateway, or an agent of the owner's, which drafts.

    Raises PermissionDenied.
    """
    if record.role not in ROLES:
        raise PermissionDenied(f"{name} is enrolled as {record.role}, where a gateway or a drafting agent is expected")
    if record.role is Role.AGENT and record.label is not TrustLabel.OWNER:
        raise PermissionDenied(f"{name} is labelled {record.label}; only the owner's own agents may draft")


class Said:
    """What a session's client says while it runs.

    `on_drafts` takes its Drafts, in order, on the event loop; `on_choice` what a client that chooses says. The lead
    sets one of them before its first event; Drafts that come before wait. Where it is not set, they are a violation.
    An error that it raises ends the session.
    """

    def __init__(self) -> None:
        self.on_drafts: Callable[[lane_pb2.Drafts], None] | None = None
        self.on_choice: Callable[[lane_pb2.Choose | lane_pb2.Ask], None] | None = None
        self._waiting: list[lane_pb2.Drafts] = []
        self._begun = False
        self._over = False

    def hear(self, drafts: lane_pb2.Drafts) -> None:
        """A message came; raises ProtocolViolation, and what `on_drafts` raises."""
        if self._over:
            return  # it was on its way when the session ended
        if not self._begun:
            if len(self._waiting) >= DRAFTS_WAITING:
                raise ProtocolViolation(f"more than {DRAFTS_WAITING} messages of drafts before the session began")
            self._waiting.append(drafts)
        elif self.on_drafts is None:
            raise ProtocolViolation("drafts of a session that has no contract")
        else:
            self.on_drafts(drafts)

    def choice(self, said: lane_pb2.Choose | lane_pb2.Ask) -> None:
        """A message of a client that chooses came; raises ProtocolViolation, and what `on_choice` raises."""
        if self._over:
            return
        if self.on_choice is None:
            raise ProtocolViolation(f"{type(said).__name__} in a session whose client does not choose, or not yet")
        self.on_choice(said)

    @property
    def listened(self) -> bool:
        """Whether the lead takes anything that the client says."""
        return self.on_drafts is not None or self.on_choice is not None

    def begin(self) -> None:
        """The session's first event is here: what waits is taken; raises as `hear`."""
        if self._begun:
            return
        self._begun = True
        waiting, self._waiting = self._waiting, []
        for drafts in waiting:
            self.hear(drafts)

    def end(self) -> None:
        """The session is over: what still comes is dropped."""
        self._over = True


# node id of the caller -> its record, or raises a refusal
AcceptClient = Callable[[str, str, int], VerifiedRecord]
# the events of one session of the client of this node id; closed (a cancellation at its await) as soon as the client
# leaves, cancels or breaks the contract
OnSession = Callable[[lane_pb2.Open, str, Said], AsyncGenerator[lane_pb2.SessionEvent, None]]


class SessionServicer:
    """The lead's side.

    `accept(node_id, deployment, epoch)` returns the client's verified record, or raises PermissionDenied, Conflict.
    `on_session(open, node_id, said)` is an async generator of events, the last of them Finished; an error that it
    raises becomes Failed. When the client leaves or cancels, or says what it may not, the generator is cancelled where
    it waits, at once; its `finally` frees the session.
    """

    def __init__(self, identity: Identity, accept: AcceptClient, on_session: OnSession) -> None:
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
        end = End(stream, conversation)
        request = _parse_request(await end.receive(REQUEST))
        if request.WhichOneof("body") != "open":
            raise ProtocolViolation("a session begins with Open")
        said = Said()
        serving = asyncio.create_task(self._serve(end, request.open, node_id, said))
        listening = asyncio.create_task(_listen(end, said))
        try:
            await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
            ended = serving if serving.done() else listening
            if ended is serving and said.listened:
                # More may be under way: who writes to a stream that is over loses the events that it has not read.
                await asyncio.wait({listening}, timeout=HANDSHAKE_S)
        finally:
            for task in (serving, listening):
                task.cancel()
            await asyncio.gather(serving, listening, return_exceptions=True)
        if not ended.cancelled() and (error := ended.exception()) is not None:
            if ended is listening:
                log.warning("the session of %s is cut off: %s", node_id, error)
            raise error

    async def _serve(self, end: End, request: lane_pb2.Open, node_id: str, said: Said) -> None:
        events = self._on_session(request, node_id, said)
        try:
            async for event in events:
                said.begin()
                if event.WhichOneof("body") == "finished":
                    said.end()
                await end.send(EVENT, event.SerializeToString())
        except DeviceLost as error:
            if isinstance(error.__cause__, grpc.RpcError | grpc.aio.BaseError):
                return  # the client left
            await self._fail(end, error, said)
        except Exception as error:  # noqa: BLE001 - the edge: everything becomes Failed
            await self._fail(end, error, said)
        finally:
            said.end()
            await events.aclose()

    async def _fail(self, end: End, error: Exception, said: Said) -> None:
        said.end()
        if not isinstance(error, GanglionError):
            log.error("a session failed by a defect", exc_info=error)
        body = to_body(error)
        failed = lane_pb2.Failed(code=body.code, message=body.message, param=body.param or "")
        await end.send(EVENT, lane_pb2.SessionEvent(failed=failed).SerializeToString())


async def _listen(end: End, said: Said) -> None:
    """Return when the client cancels or leaves; raises ProtocolViolation, and what `said` raises."""
    while True:
        try:
            body = await end.receive(REQUEST)
        except DeviceLost:
            return
        if len(body) > DRAFTS_BYTES:
            raise ProtocolViolation(f"a session request of {len(body)} bytes after Open, at most {DRAFTS_BYTES}")
        request = _parse_request(body)
        match request.WhichOneof("body"):
            case "cancel":
                return
            case "drafts":
                said.hear(request.drafts)
            case "choose":
                said.choice(request.choose)
            case "ask":
                said.choice(request.ask)
            case other:
                raise ProtocolViolation(f"{other or 'an empty request'} in a session that runs already")


def _parse_request(body: bytes) -> lane_pb2.SessionRequest:
    try:
        return lane_pb2.SessionRequest.FromString(body)
    except DecodeError:
        raise ProtocolViolation("a session request does not parse") from None
