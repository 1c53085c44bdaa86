"""Bringing what an assignment needs into the store: the share's pieces, and on a lead those of its drafter."""

from __future__ import annotations

import asyncio

from ganglion.agent.store import ManifestShelf, PieceStore
from ganglion.agent.store.bandwidth import Throttle
from ganglion.agent.store.fetch import PieceFetcher, Progress
from ganglion.agent.supervisor_orders import Assignment
from ganglion.wire.identity import Identity


async def fetch_assignment(
    assignment: Assignment,
    store: PieceStore,
    shelf: ManifestShelf,
    identity: Identity,
    *,
    throttle: Throttle,
    progress: Progress,
) -> None:
    """Hold all of it; `progress` counts it as one. Raises what `PieceFetcher.fetch` raises, and OSError of the store.

    Each model is on the shelf from its beginning on: what comes is kept for it, and others may be sent here for it.
    """
    parts = [(assignment.manifest, assignment.pieces, assignment.holders)]
    if assignment.drafter is not None:
        parts.append((assignment.drafter, assignment.drafter_pieces, assignment.drafter_holders))
    sizes = [sum({piece.digest: piece.size for piece in pieces}.values()) for _, pieces, _ in parts]
    for number, (manifest, pieces, holders) in enumerate(parts):
        await asyncio.to_thread(shelf.put, manifest)
        before = sum(sizes[:number])

        def counted(done_bytes: int, _: int, before: int = before) -> None:
            progress(before + done_bytes, sum(sizes))

        fetcher = PieceFetcher(store, identity, holders, throttle=throttle)
        try:
            await fetcher.fetch(pieces, counted)
        finally:
            await fetcher.close()
