"""Which lanes a worker dials and which it awaits, and the records that both are checked against."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from ganglion.agent.control import PeerEntry
from ganglion.agent.exchange.plan import lane_pairs
from ganglion.proto import identity_pb2
from ganglion.wire.certificates import Role
from ganglion.wire.errors import GanglionError, InvalidDocument, PermissionDenied, Unavailable, Unreachable
from ganglion.wire.identity import Identity, VerifiedRecord, verify_record
from ganglion.wire.lane import Lane, stale_epoch
from ganglion.wire.lane_opening import dial_lane
from ganglion.wire.lane_upgrade import Sockets
from ganglion.wire.limits import CONNECT_S
from ganglion.wire.nouns import Plan

log = logging.getLogger(__name__)

_RETRY_S: Final = 0.05


def record_of(entry: PeerEntry, owner_public_key: bytes) -> VerifiedRecord:
    """The record of `entry`; raises Unauthenticated (not the owner's), InvalidDocument."""
    try:
        signed = identity_pb2.SignedRecord.FromString(entry.record)
    except DecodeError:
        raise InvalidDocument(f"the record of {entry.name} does not parse") from None
    return verify_record(signed, owner_public_key)


def verified(entry: PeerEntry, owner_public_key: bytes, role: Role) -> VerifiedRecord:
    """The same; raises PermissionDenied for another role."""
    record = record_of(entry, owner_public_key)
    if record.role != role:
        raise PermissionDenied(f"{entry.name} is enrolled as {record.role.name.lower()}, not as {role.name.lower()}")
    return record


class LaneBoard:
    """The lanes of one worker and epoch: dials the peers of higher rank, takes those of lower rank as they come."""

    def __init__(
        self, identity: Identity, deployment: str, epoch: int, plan: Plan, rank: int, *, sockets: Sockets
    ) -> None:
        pairs = lane_pairs(plan)
        self.lanes: dict[int, Lane] = {}
        self.names: tuple[str, ...] = ()
        self._identity = identity
        self._deployment = deployment
        self._epoch = epoch
        self._plan = plan
        self._rank = rank
        self._sockets = sockets
        self._reasons: dict[int, str] = {}  # of the last try
        self._dialled = sorted(high for low, high in pairs if low == rank)
        self._awaited = {low for low, high in pairs if high == rank}
        self._records: tuple[VerifiedRecord, ...] = ()
        self._complete = asyncio.Event()
        self._failure: GanglionError | None = None

    def accept(self, node_id: str, deployment: str, epoch: int, rank: int, own_rank: int) -> VerifiedRecord:
        """The record of a caller, for LaneServicer; raises Conflict, Unavailable (not told yet), PermissionDenied."""
        if (deployment, epoch) != (self._deployment, self._epoch):
            raise stale_epoch(deployment, epoch, self._epoch)
        if not self._records:
            raise Unavailable("this worker has not been told its peers yet; try again")
        if own_rank != self._rank or rank not in self._awaited or self._records[rank].node_id != node_id:
            raise PermissionDenied(f"the plan has no lane from {node_id} as rank {rank} to rank {own_rank} here")
        if rank in self.lanes:
            raise PermissionDenied(f"the lane of rank {rank} is connected already")
        return self._records[rank]

    def deliver(self, lane: Lane) -> None:
        """Take a sealed lane, for LaneServicer."""
        self.lanes[lane.peer_rank] = lane
        log.info("the lane with rank %d is %s", lane.peer_rank, lane.medium)
        self._look()

    def failed(self, rank: int, error: GanglionError) -> None:
        """A peer's lane did not come to be, for LaneServicer; it may dial again unless the reason stays."""
        self._reasons[rank] = error.message
        if not isinstance(error, Unavailable):
            self._failure = error
            self._complete.set()

    def _look(self) -> None:
        if len(self.lanes) == len(self._dialled) + len(self._awaited):
            self._complete.set()

    async def connect(self, peers: Sequence[PeerEntry]) -> None:
        """Dial and await every lane; `peers` in order of rank.

        Raises InvalidDocument (not the plan's devices), Unauthenticated, Unreachable naming the device.
        """
        records = tuple(verified(peer, self._identity.owner_public_key, Role.AGENT) for peer in peers)
        if tuple(record.node_id for record in records) != self._plan.devices:
            raise InvalidDocument("the peers are not the devices of the plan, in its order")
        self.names = tuple(peer.name for peer in peers)
        self._records = records
        self._look()
        try:
            async with asyncio.timeout(2 * CONNECT_S), asyncio.TaskGroup() as group:
                for rank in self._dialled:
                    group.create_task(self._dial(rank, peers[rank]))
                group.create_task(self._wait_complete())
        except TimeoutError:
            missing = [rank for rank in (*self._dialled, *self._awaited) if rank not in self.lanes]
            reasons = "".join(f" ({self._reasons[rank]})" for rank in missing if rank in self._reasons)
            raise Unreachable(
                f"no lane with {', '.join(self.names[rank] for rank in missing)} within {2 * CONNECT_S:.0f} s{reasons};"
                " check that the devices can reach each other's worker ports (firewall, --bind)"
            ) from None
        except ExceptionGroup as group_error:
            raise _first(group_error) from group_error

    async def _wait_complete(self) -> None:
        await self._complete.wait()
        if self._failure is not None:
            raise self._failure

    async def _dial(self, rank: int, peer: PeerEntry) -> None:
        if not peer.address:
            raise Unreachable(f"{peer.name} has no address that can be dialled")
        while True:
            try:
                lane = await dial_lane(
                    peer.address,
                    self._identity,
                    self._records[rank],
                    deployment=self._deployment,
                    epoch=self._epoch,
                    own_rank=self._rank,
                    peer_rank=rank,
                    sockets=self._sockets,
                )
            except Unavailable as error:  # not told of us yet, or does not listen yet; the timeout ends this
                self._reasons[rank] = error.message
                await asyncio.sleep(_RETRY_S)
                continue
            self.deliver(lane)
            return

    async def close(self) -> None:
        """Close every lane."""
        self._sockets.close()
        await asyncio.gather(*(lane.close() for lane in self.lanes.values()))


def _first(group: ExceptionGroup[Exception]) -> Exception:
    errors = group.exceptions
    return next((one for one in errors if isinstance(one, GanglionError)), errors[0])
