"""Fetching pieces from other devices: several at once, continued after a break, never visible before verified."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from ganglion.agent.store.pieces import PartialPiece, PieceStore
from ganglion.proto import pieces_pb2, pieces_pb2_grpc
from ganglion.wire.certificates import Role
from ganglion.wire.errors import Corrupt, GanglionError, NotFound, Unavailable
from ganglion.wire.identity import Identity
from ganglion.wire.limits import FIRST_FRAME_S
from ganglion.wire.nouns import PieceRef
from ganglion.wire.rpc import channel, to_error

log = logging.getLogger(__name__)

PARALLEL: Final = 4
ROUNDS: Final = 3  # times that every holder is asked for a piece
PAUSE_S: Final = 0.3  # between rounds, doubled each time, with jitter

Progress = Callable[[int, int], None]
"""(bytes held, bytes in all) of what was asked for."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A device whose record was verified, and where its piece service listens."""

    node_id: str
    address: str
    name: str


class PieceFetcher:
    """Brings pieces from holders into a store. Close it."""

    def __init__(
        self,
        store: PieceStore,
        identity: Identity,
        holders: Sequence[Holder],
        *,
        parallel: int = PARALLEL,
        silence_s: float = FIRST_FRAME_S,
    ) -> None:
        self._store = store
        self._identity = identity
        self._holders = [holder for holder in holders if holder.address and holder.node_id != identity.node_id]
        self._parallel = parallel
        self._silence_s = silence_s
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """End transfers; what was received stays for the next attempt."""
        for made in self._channels.values():
            await made.close()
        self._channels.clear()

    async def fetch(self, pieces: Sequence[PieceRef], progress: Progress = lambda done, total: None) -> None:
        """Hold every one of `pieces` (each once), asking each holder in turn.

        Raises Exhausted (budget, disk), or what the holders of a piece that nobody gave said: Unavailable, NotFound,
        Corrupt.
        """
        missing = await asyncio.to_thread(self._missing, pieces)
        meter = _Meter(pieces, missing, progress)
        if not missing:
            return
        await asyncio.to_thread(self._store.reserve, sum(piece.size for piece in missing))
        if not self._holders:
            raise Unavailable(f"{len(missing)} pieces are missing and no other device that holds them was named")
        queue = iter(missing)
        tasks = [asyncio.ensure_future(self._drain(queue, number, meter)) for number in range(self._parallel)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _missing(self, pieces: Sequence[PieceRef]) -> list[PieceRef]:
        return [piece for piece in pieces if not self._store.has(piece.digest, piece.size)]

    async def _drain(self, queue: Iterator[PieceRef], number: int, meter: _Meter) -> None:
        for piece in queue:
            turn = number % len(self._holders)
            await self._one(piece, self._holders[turn:] + self._holders[:turn], meter)

    async def _one(self, piece: PieceRef, order: Sequence[Holder], meter: _Meter) -> None:
        refused: dict[str, GanglionError] = {}
        part = await asyncio.to_thread(self._store.partial, piece)
        try:
            for round_number in range(ROUNDS):
                for holder in order:
                    try:
                        await self._from(holder, part, meter)
                        return
                    except _RefusedError as error:
                        log.info("piece %s from %s: %s", piece.digest[:12], holder.name, error.reason.message)
                        refused[holder.name] = error.reason
                if all(isinstance(reason, NotFound | Corrupt) for reason in refused.values()):
                    break  # asking again gives the same
                await asyncio.sleep(PAUSE_S * 2**round_number * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        finally:
            part.close()
        told = "; ".join(f"{name}: {reason.message}" for name, reason in refused.items())
        kinds = [type(reason) for reason in refused.values()]
        kind = next((kind for kind in (Unavailable, Corrupt) if any(issubclass(k, kind) for k in kinds)), kinds[-1])
        raise kind(f"piece {piece.digest[:12]} ({piece.size} bytes) came from no holder: {told}")

    async def _from(self, holder: Holder, part: PartialPiece, meter: _Meter) -> None:
        """Receive the rest of the piece; when bytes of an earlier transfer spoil it, once more from the beginning."""
        resumed = part.received_bytes > 0
        try:
            await self._receive(holder, part, meter)
        except Corrupt as error:
            if not resumed:
                raise _RefusedError(error) from error
            try:
                await self._receive(holder, part, meter)
            except Corrupt as again:
                raise _RefusedError(again) from again

    async def _receive(self, holder: Holder, part: PartialPiece, meter: _Meter) -> None:
        if part.received_bytes < part.ref.size:
            stub = pieces_pb2_grpc.PiecesStub(self._channel(holder))  # type: ignore[no-untyped-call]
            call = stub.Fetch(pieces_pb2.FetchRequest(digest=part.ref.digest, offset=part.received_bytes))
            try:
                while True:
                    async with asyncio.timeout(self._silence_s):
                        chunk = await call.read()
                    if chunk is grpc.aio.EOF:
                        break
                    await asyncio.to_thread(part.write, chunk.data)
                    meter.at(part.ref, part.received_bytes)
            except TimeoutError:
                raise _RefusedError(Unavailable(f"{holder.address} sent nothing for {self._silence_s:.0f} s")) from None
            except grpc.aio.AioRpcError as error:
                raise _RefusedError(to_error(error, holder.address)) from error
            finally:
                call.cancel()
        await asyncio.to_thread(part.finish)
        meter.at(part.ref, part.ref.size)

    def _channel(self, holder: Holder) -> grpc.aio.Channel:
        made = self._channels.get(holder.node_id)
        if made is None:
            peer = (holder.node_id, Role.AGENT)
            made = self._channels[holder.node_id] = channel(holder.address, self._identity, peer=peer, kind="tensor")
        return made


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
