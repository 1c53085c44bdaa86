"""Which models lie here, whole or in part: looked up when the shelf of manifests changed, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
from ganglion.wire.errors import GanglionError

log = logging.getLogger(__name__)

LOOK_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Held:
    """Digests of manifests: those with every piece here, and those with some."""

    whole: tuple[str, ...]
    partial: tuple[str, ...]


class HeldModels:
    """Calls `say(held)` when it changed; `held` is None until it was first looked up."""

    def __init__(self, store: PieceStore, shelf: ManifestShelf, say: Callable[[Held], None]) -> None:
        self._store, self._shelf, self._say = store, shelf, say
        self._looking = asyncio.Lock()
        self.held: Held | None = None

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
            if held != self.held:
                self.held = held
                self._say(held)

    def _find(self) -> Held:
        whole, partial = [], []
        for name in self._shelf.digests():
            try:
                pieces = all_pieces(self._shelf.get(name))
            except GanglionError as error:
                log.warning("a manifest is left aside: %s", error.message)
                continue
            here = sum(self._store.has(piece.digest, piece.size) for piece in pieces)
            if here == len(pieces):
                whole.append(name)
            elif here:
                partial.append(name)
        return Held(tuple(whole), tuple(partial))
