"""A small fleet server that speaks real gRPC with mutual TLS: what tests put in `orders` is sent, what came is kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ganglion.proto import fleet_pb2, fleet_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.certificates import Role
from ganglion.wire.hello import hello

AGENTS = frozenset({Role.AGENT})
DEADLINE_S = 20.0


class Fleet(fleet_pb2_grpc.FleetServicer):
    def __init__(self, identity, port: int = 0) -> None:
        self.heard: list[fleet_pb2.AgentMessage] = []
        self.streams = 0
        self.features: tuple[str, ...] = ()
        self.orders: asyncio.Queue[fleet_pb2.CoordinatorMessage] = asyncio.Queue()
        self._news = asyncio.Event()
        self.bound = rpc.server(
            identity,
            bind="127.0.0.1",
            port=port,
            what="the fleet port",
            knob="--fleet-port",
            allowed={"/ganglion.v1.Fleet/Control": AGENTS},
        )
        fleet_pb2_grpc.add_FleetServicer_to_server(self, self.bound.server)

    async def Control(self, request_iterator, context):  # noqa: N802
        first = await anext(request_iterator)
        assert first.WhichOneof("body") == "hello"
        self.streams += 1
        yield fleet_pb2.CoordinatorMessage(hello=hello(features=self.features))
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                yield await self.orders.get()
        finally:
            reader.cancel()

    async def _read(self, messages) -> None:
        async for message in messages:
            self.heard.append(message)
            self._news.set()

    async def until(self, condition: Callable[[], object], what: str) -> object:
        """Wait until `condition()` is true, checked at every message and ten times a second."""
        async with asyncio.timeout(DEADLINE_S):
            while not (found := condition()):
                self._news.clear()
                try:
                    async with asyncio.timeout(0.1):
                        await self._news.wait()
                except TimeoutError:
                    continue
        assert found, what
        return found

    def of(self, body: str) -> list:
        return [getattr(message, body) for message in self.heard if message.WhichOneof("body") == body]

    def statuses(self, epoch: int) -> list[str]:
        """Phases reported for an epoch, repetitions left out."""
        found: list[str] = []
        for status in self.of("status"):
            name = fleet_pb2.AssignmentPhase.Name(status.phase).removeprefix("ASSIGNMENT_PHASE_").lower()
            if status.epoch == epoch and (not found or found[-1] != name):
                found.append(name)
        return found

    def send(self, **body) -> None:
        self.orders.put_nowait(fleet_pb2.CoordinatorMessage(**body))
