"""Which models lie here whole: looked up when the shelf of manifests or the store changed, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
from ganglion.wire.errors import GanglionError

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0


class HeldModels:
    """Calls `say(digests)` when they changed; `digests` is None until they were first looked up."""

    def __init__(self, store: PieceStore, shelf: ManifestShelf, say: Callable[[tuple[str, ...]], None]) -> None:
        self._store, self._shelf, self._say = store, shelf, say
        self._looking = asyncio.Lock()
        self.digests: tuple[str, ...] | None = None

    async def watch(self) -> None:
        """Look whenever a manifest came or went (another process may cut a model into this store), for ever."""
        seen = -1
        while True:
            changed = self._shelf.changed()
            if changed != seen:
                seen = changed
                await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Look now."""
        async with self._looking:
            held = await asyncio.to_thread(self._find)
            if held != self.digests:
                self.digests = held
                self._say(held)

    def _find(self) -> tuple[str, ...]:
        found = []
        for name in self._shelf.digests():
            try:
                pieces = all_pieces(self._shelf.get(name))
            except GanglionError as error:
                log.warning("a manifest is left aside: %s", error.message)
                continue
            if all(self._store.has(piece.digest, piece.size) for piece in pieces):
                found.append(name)
        return tuple(found)
