"""Fetching pieces from other devices: several at once, continued after a break, never visible before verified."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from ganglion.agent.store.bandwidth import Throttle
from ganglion.agent.store.pieces import PartialPiece, PieceStore
from ganglion.agent.store.spread import HolderCount, Spread, Take
from ganglion.proto import pieces_pb2, pieces_pb2_grpc
from ganglion.wire.certificates import Role
from ganglion.wire.errors import Conflict, Corrupt, GanglionError, NotFound, Unavailable
from ganglion.wire.identity import Identity
from ganglion.wire.limits import FIRST_FRAME_S
from ganglion.wire.nouns import PieceRef
from ganglion.wire.rpc import channel, to_error

log = logging.getLogger(__name__)

PARALLEL: Final = 4  # transfers at once, shared by the holders; each holder has one at least
BUSY_S: Final = 0.5  # before looking again at a piece that another fetch of this device brings

Progress = Callable[[int, int], None]
"""(bytes held, bytes in all) of what was asked for."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A device whose record was verified, and where its piece service listens."""

    node_id: str
    address: str
    name: str


class PieceFetcher:
    """Brings pieces from holders into a store; which holder brings what is `Spread`'s. Close it."""

    def __init__(
        self,
        store: PieceStore,
        identity: Identity,
        holders: Sequence[Holder],
        *,
        parallel: int = PARALLEL,
        silence_s: float = FIRST_FRAME_S,
        throttle: Throttle | None = None,
    ) -> None:
        self._store = store
        self._identity = identity
        named = {holder.node_id: holder for holder in holders if holder.address}
        named.pop(identity.node_id, None)
        shown = [holder.name for holder in named.values()]
        # Counts and messages go by name; two devices of one name are told apart by their ids.
        self._holders = {
            holder.name if shown.count(holder.name) == 1 else f"{holder.name} ({holder.node_id})": holder
            for holder in named.values()
        }
        self._parallel = parallel
        self._silence_s = silence_s
        self._throttle = throttle or Throttle()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._transfers: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self.counts: dict[str, HolderCount] = {}
        """What each holder gave in the last fetch, by its name."""

    async def close(self) -> None:
        """End transfers; what was received stays for the next attempt."""
        for made in self._channels.values():
            await made.close()
        self._channels.clear()

    async def fetch(self, pieces: Sequence[PieceRef], progress: Progress = lambda done, total: None) -> None:
        """Hold every one of `pieces`, in any order.

        Raises Exhausted (budget, disk), or what the holders of a piece that nobody gave said: Unavailable, NotFound,
        Corrupt, PermissionDenied.
        """
        missing = await asyncio.to_thread(self._missing, pieces)
        meter = _Meter(pieces, missing, progress)
        if not missing:
            return
        await asyncio.to_thread(self._reserve, missing)
        if not self._holders:
            raise Unavailable(f"{len(missing)} pieces are missing and no other device that holds them was named")
        spread = Spread(missing, self._holders)
        self.counts = spread.counts()
        each = -(-self._parallel // len(self._holders))
        lanes = [asyncio.create_task(self._lane(name, spread, meter)) for name in self._holders for _ in range(each)]
        try:
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
            self._log()

    def _missing(self, pieces: Sequence[PieceRef]) -> list[PieceRef]:
        unique = {piece.digest: piece for piece in pieces}
        return [piece for piece in unique.values() if not self._store.has(piece.digest, piece.size)]

    def _reserve(self, missing: Sequence[PieceRef]) -> None:
        self._store.reserve(sum(max(0, piece.size - self._store.received_bytes(piece.digest)) for piece in missing))

    def _log(self) -> None:
        for name, count in self.counts.items():
            log.info(
                "%s gave %d pieces, %d bytes at %.1f MB/s; lacked %d, failed %d, wrong %d, overtaken %d%s",
                name,
                count.pieces,
                count.received_bytes,
                count.bytes_per_s / 1e6,
                count.lacked,
                count.failed,
                count.lied,
                count.overtaken,
                f"; asked no more: {count.aside}" if count.aside else "",
            )

    async def _lane(self, name: str, spread: Spread, meter: _Meter) -> None:
        """Bring what `spread` gives to this holder, one piece after the other, until there is nothing more."""
        loop = asyncio.get_running_loop()
        while (move := spread.next_move(name, loop.time())) is not None:
            if not isinstance(move, Take):
                await self._news(move.until_s - loop.time())
                continue
            before = self._transfers.get(move.ref.digest)
            if move.overtakes and before is not None:
                before.cancel()
                await asyncio.wait((before,))
            transfer = asyncio.create_task(self._transfer(name, move.ref, spread, meter))
            self._transfers[move.ref.digest] = transfer
            try:
                await asyncio.wait((transfer,))
            finally:
                if not transfer.done():
                    transfer.cancel()
                    await asyncio.wait((transfer,))
                if self._transfers.get(move.ref.digest) is transfer:
                    del self._transfers[move.ref.digest]
                self._changed.set()
            if not transfer.cancelled():  # cancelled: another holder took over
                transfer.result()
            if spread.lost is not None:
                raise spread.refusal(spread.lost)

    async def _news(self, wait_s: float) -> None:
        """Wait until a transfer ended anywhere, at most `wait_s`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _transfer(self, name: str, ref: PieceRef, spread: Spread, meter: _Meter) -> None:
        """Bring one piece from one holder and tell `spread` how it went; raises what fails on this side (the disk)."""
        clock = asyncio.get_running_loop().time
        try:
            part = await self._open(ref)
        except Conflict:
            spread.postponed(name, ref, clock() + BUSY_S)
            return
        try:
            if part is not None:
                await self._bring(name, part, spread, meter)
        except _RefusedError as refused:
            reason = refused.reason
            log.info("piece %s from %s: %s", ref.digest[:12], name, reason.message)
            if isinstance(reason, NotFound):
                spread.lacked(name, ref, clock())
            elif isinstance(reason, Corrupt):
                spread.lied(name, ref, reason)
            else:
                spread.failed(name, ref, reason, clock())
        else:
            spread.brought(name, ref)
            meter.at(ref, ref.size)
        finally:
            if part is not None:
                part.close()

    async def _open(self, ref: PieceRef) -> PartialPiece | None:
        """The piece as far as it is here, None when it is here whole; raises Conflict while another fetch brings it."""

        def opened() -> PartialPiece | None:
            return None if self._store.has(ref.digest, ref.size) else self._store.partial(ref)

        opening = asyncio.create_task(asyncio.to_thread(opened))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise

    async def _bring(self, name: str, part: PartialPiece, spread: Spread, meter: _Meter) -> None:
        """Receive the rest of the piece; when bytes of others spoil it, once more from the beginning, from this one."""
        resumed = part.received_bytes > 0
        try:
            await self._receive(name, part, spread, meter)
        except Corrupt as error:
            if not resumed:
                raise _RefusedError(error) from error
            try:
                await self._receive(name, part, spread, meter)
            except Corrupt as again:
                raise _RefusedError(again) from again

    async def _receive(self, name: str, part: PartialPiece, spread: Spread, meter: _Meter) -> None:
        clock = asyncio.get_running_loop().time
        spread.began(name, part.ref, part.received_bytes)
        if part.received_bytes < part.ref.size:
            holder = self._holders[name]
            stub = pieces_pb2_grpc.PiecesStub(self._channel(holder))  # type: ignore[no-untyped-call]
            call = stub.Fetch(pieces_pb2.FetchRequest(digest=part.ref.digest, offset=part.received_bytes))
            try:
                while True:
                    async with asyncio.timeout(self._silence_s):
                        chunk = await call.read()
                    if chunk is grpc.aio.EOF:
                        break
                    await self._throttle.admit(len(chunk.data))
                    await asyncio.to_thread(part.write, chunk.data)
                    spread.moved(name, part.ref, part.received_bytes, clock())
                    meter.at(part.ref, part.received_bytes)
            except TimeoutError:
                raise _RefusedError(Unavailable(f"{holder.address} sent nothing for {self._silence_s:.0f} s")) from None
            except grpc.aio.AioRpcError as error:
                raise _RefusedError(to_error(error, holder.address)) from error
            finally:
                call.cancel()
        await asyncio.to_thread(part.finish)

    def _channel(self, holder: Holder) -> grpc.aio.Channel:
        made = self._channels.get(holder.node_id)
        if made is None:
            peer = (holder.node_id, Role.AGENT)
            made = self._channels[holder.node_id] = channel(holder.address, self._identity, peer=peer, kind="tensor")
        return made


def _close_opened(opening: asyncio.Task[PartialPiece | None]) -> None:
    if not opening.cancelled() and opening.exception() is None and (part := opening.result()) is not None:
        part.close()


class _RefusedError(Exception):
    """A holder did not give a piece; what fails on this side (a full disk) is not wrapped and ends the fetch."""

    def __init__(self, reason: GanglionError) -> None:
        super().__init__(reason.message)
        self.reason = reason


class _Meter:
    """Adds up progress over the pieces in flight."""

    def __init__(self, pieces: Sequence[PieceRef], missing: Sequence[PieceRef], progress: Progress) -> None:
        self._received = {piece.digest: piece.size for piece in pieces} | {piece.digest: 0 for piece in missing}
        self._total = sum({piece.digest: piece.size for piece in pieces}.values())
        self._done = sum(self._received.values())
        self._progress = progress
        progress(self._done, self._total)

    def at(self, piece: PieceRef, received_bytes: int) -> None:
        self._done += received_bytes - self._received[piece.digest]
        self._received[piece.digest] = received_bytes
        self._progress(self._done, self._total)
