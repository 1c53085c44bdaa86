"""The port to a verifier, and the kind that is one of our own agents: the lead of the target's deployment."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Protocol

from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.identity import Identity
from ganglion.wire.session import Opened, SessionClient


class VerifierStream(Protocol):
    """An accepted verify session."""

    accepted: lane_pb2.Accepted

    async def send(self, drafts: lane_pb2.Drafts) -> None:
        """Send drafts; raises GanglionError when the stream is over."""
        ...

    def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Tokens with their outcomes, then Finished; raises what the session failed with, DeviceLost, Unreachable."""
        ...

    async def close(self) -> None:
        """End the session, whatever it does."""
        ...


class Verifier(Protocol):
    """Who runs the model that answers."""

    name: str

    async def open(self, request: lane_pb2.Open) -> VerifierStream:
        """Open a verify session; raises GanglionError: a refusal, or that the verifier is away."""
        ...


class AgentVerifier:
    """The lead of the target's deployment in one epoch; a new epoch is a new verifier. `close()` when done."""

    def __init__(self, identity: Identity, peer: identity_pb2.Peer, deployment: str, epoch: int) -> None:
        """Raises Unauthenticated for a record that the owner has not signed."""
        self.name = peer.name or deployment
        self._client = SessionClient(identity, peer, deployment, epoch)

    async def open(self, request: lane_pb2.Open) -> VerifierStream:
        """Raises what the lead refuses with, Unreachable, DeviceLost, Conflict for an epoch that is over."""
        opened = await self._client.open(request)
        try:
            return await _AgentStream.begin(self.name, opened)
        except BaseException:
            await opened.close()
            raise

    async def close(self) -> None:
        """End what runs and release the channel."""
        await self._client.close()


class _AgentStream:
    def __init__(self, opened: Opened, events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> None:
        self.accepted = lane_pb2.Accepted()
        self._opened = opened
        self._events = events

    @classmethod
    async def begin(cls, name: str, opened: Opened) -> _AgentStream:
        stream = cls(opened, opened.events())
        first = await anext(stream._events, None)
        if first is None or first.WhichOneof("body") != "accepted":
            raise ProtocolViolation(f"the verifier {name} did not begin with Accepted")
        stream.accepted = first.accepted
        return stream

    async def send(self, drafts: lane_pb2.Drafts) -> None:
        await self._opened.send_drafts(drafts)

    def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        return self._events

    async def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is being read: closing the stream ends that
            await self._events.aclose()
        await self._opened.close()
