"""Kept channels to leads: one for each deployment and epoch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.identity import Identity
from ganglion.wire.session import Opened, SessionClient

_Key = tuple[str, int, str]  # deployment, epoch, address


class LeadClients:
    """Opens sessions over the kept channels; `keep` closes those that no route names any more."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._clients: dict[_Key, SessionClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def run(
        self, deployment: str, epoch: int, peer: identity_pb2.Peer, request: lane_pb2.Open
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """The events of one session; closing the generator cancels it. Raises errors of the tree."""
        async with aclosing(self._client(deployment, epoch, peer).run(request)) as events:
            async for event in events:
                yield event

    async def open(self, deployment: str, epoch: int, peer: identity_pb2.Peer, request: lane_pb2.Open) -> Opened:
        """A session that hears its client while it runs; to be closed. Raises errors of the tree."""
        return await self._client(deployment, epoch, peer).open(request)

    def _client(self, deployment: str, epoch: int, peer: identity_pb2.Peer) -> SessionClient:
        key = (deployment, epoch, peer.address)
        client = self._clients.get(key)
        if client is None:
            client = self._clients[key] = SessionClient(self._identity, peer, deployment, epoch)
        return client

    def keep(self, keys: Iterable[_Key]) -> None:
        """Close every channel whose key is not among `keys`."""
        for key in self._clients.keys() - set(keys):
            task = asyncio.create_task(self._clients.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every channel."""
        self.keep(())
        await asyncio.gather(*self._closing, return_exceptions=True)
