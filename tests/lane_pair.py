"""Both ends of a lane in one process, over real mutual TLS on loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ganglion.wire import rpc
from ganglion.wire.errors import GanglionError, PermissionDenied
from ganglion.wire.identity import Identity, Role, VerifiedRecord
from ganglion.wire.lane import Lane, stale_epoch
from ganglion.wire.lane_opening import METHOD, LaneServicer, dial_lane
from ganglion.wire.lane_upgrade import LaneMode, Sockets

DEADLINE_S = 10.0


@dataclass
class Worker:
    """The accepting side, as a worker has it: knows its peers and its epoch."""

    identity: Identity
    peers: dict[str, VerifiedRecord]
    epoch: int = 3
    sockets: Sockets = field(default_factory=lambda: Sockets("grpc", "127.0.0.1"))
    lanes: asyncio.Queue[Lane] = field(default_factory=asyncio.Queue)
    failures: list[tuple[int, GanglionError]] = field(default_factory=list)

    def accept(self, node_id: str, deployment: str, epoch: int, rank: int, own_rank: int) -> VerifiedRecord:
        assert (deployment, rank, own_rank) == ("demo", 0, 1)
        if epoch != self.epoch:
            raise stale_epoch(deployment, epoch, self.epoch)
        if node_id not in self.peers:
            raise PermissionDenied("no device of this plan")
        return self.peers[node_id]


@contextlib.asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[rpc.BoundServer]:
    bound = rpc.server(
        worker.identity,
        bind="127.0.0.1",
        port=0,
        what="the lane port",
        knob="--bind",
        allowed={METHOD: frozenset({Role.AGENT})},
        kind="tensor",
    )

    def failed(rank: int, error: GanglionError) -> None:
        worker.failures.append((rank, error))

    LaneServicer(worker.identity, worker.accept, worker.lanes.put_nowait, failed, worker.sockets).add_to(bound.server)
    await bound.start()
    try:
        yield bound
    finally:
        await bound.stop()


@dataclass
class Pair:
    """A sealed lane, both ends."""

    bound: rpc.BoundServer
    worker: Worker
    dialler: Identity
    near: Lane
    far: Lane


def dial(
    bound: rpc.BoundServer, dialler: Identity, peer: VerifiedRecord, epoch: int = 3, mode: LaneMode = "grpc"
) -> Any:
    sockets = Sockets(mode, "127.0.0.1")
    return dial_lane(
        bound.address, dialler, peer, deployment="demo", epoch=epoch, own_rank=0, peer_rank=1, sockets=sockets
    )


@contextlib.asynccontextmanager
async def lane_pair(
    world: Any, near_mode: LaneMode, far_mode: LaneMode, far_sockets: Sockets | None = None
) -> AsyncIterator[Pair]:
    """A lane between two fresh nodes that think so of sockets; closed at the end."""
    dialler, accepter = world.node(), world.node()
    sockets = far_sockets or Sockets(far_mode, "127.0.0.1")
    worker = Worker(accepter, {dialler.node_id: dialler.verified}, sockets=sockets)
    async with serving(worker) as bound, asyncio.timeout(60):
        near = await dial(bound, dialler, accepter.verified, mode=near_mode)
        far = await asyncio.wait_for(worker.lanes.get(), DEADLINE_S)
        try:
            yield Pair(bound, worker, dialler, near, far)
        finally:
            await asyncio.gather(near.close(), far.close())
