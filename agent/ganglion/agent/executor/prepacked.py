"""Opens graphs from prepacked parts of the store, where kernels find their weights ready and mapped; makes what lacks.

A plain load copies the weights into anonymous memory as its kernels want them. A part holds that copy as a file: it
is opened at once, shared between workers, given up under pressure, and read faster where the file system caches in
large pages. ONNX Runtime packs again at every load and takes the file's copy only where it finds the same bytes, so
a part of other kernels costs memory, never a wrong number.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ganglion.agent.executor.graph_file import check_file
from ganglion.agent.probe.machine import kernel_family
from ganglion.agent.store import PieceStore
from ganglion.wire.errors import Exhausted
from ganglion.wire.nouns import PieceRef, Segment
from ganglion.wire.shares import Groups, share_pieces, slot_marks

log = logging.getLogger(__name__)

PART_GRAPH: Final = "graph.onnx"
FORMAT: Final = "1"  # of parts: changes whenever an older one must not be opened any more
LEAST_BYTES: Final = 4 << 20  # of weights; less is packed sooner than looked up
GROWTH: Final = 3.0  # a part's bytes over its weights', at most: 2.1 to 2.2 where it was measured
SPARE_BYTES: Final = 1 << 30  # of disk that parts leave free

Start = Callable[[Path, Path | None], Any]  # (graph file, where to save it prepacked or None) -> session


@dataclass(frozen=True, slots=True)
class Sources:
    """What a graph's part is made from: the graph, groups `share` of `segment`, weights of `size_bytes` in all."""

    graph: PieceRef
    segment: Segment
    share: Groups
    size_bytes: int

    @property
    def pieces(self) -> tuple[str, ...]:
        """Digests of the store's pieces that go into it."""
        slots = [share_pieces(slot, self.share) for slot in self.segment.slots]
        return (self.graph.digest, *(piece.digest for pieces in slots for piece in pieces))

    def key(self, family: str, made: str = "") -> str:
        """Digest over everything that a part's bytes depend on, kernel family and how it is `made` included."""
        marks = [FORMAT + made, family, self.graph.digest]
        for slot in self.segment.slots:
            marks.append(f"{slot.name}\0{slot.join}\0{slot.rows}\0{slot.stored}")
            marks += [piece.digest for piece in share_pieces(slot, self.share)]
            if slot.join == "marks":
                marks.append(slot_marks(slot, self.share).hex())
        return hashlib.sha256("\n".join(marks).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Made:
    scratch: Path
    key: str
    pieces: tuple[str, ...]


class Prepacked:
    """The prepacked parts that one process loads from `store`. `open` is safe from several threads."""

    def __init__(self, store: PieceStore, *, least_bytes: int = LEAST_BYTES) -> None:
        self._store = store
        self._least_bytes = least_bytes
        self._family = kernel_family()
        self._lock = threading.Lock()
        self._made: list[_Made] = []
        self._locks: list[int] = []
        self._full = False

    def open(self, sources: Sources, write: Callable[[], Path], start: Start) -> Any:
        """A session of the part of `sources`, made where it is not there.

        `write` gives the graph's file with its weights beside it, scanned; it is asked only where no part is there.
        Raises what `write` and `start` raise.
        """
        if sources.size_bytes < self._least_bytes:
            return start(write(), None)
        key = sources.key(self._family)
        session = self._opened(key, start)
        if session is None:
            source = write()
            session = self._made_now(key, sources, source, start)
            session = start(source, None) if session is None else session
        return session

    def place(self, sources: Sources, made: str, make: Callable[[Path], None]) -> Path:
        """The folder of a part that `make` writes, in the way that `made` names; it lasts until `close` or longer.

        Raises Exhausted without the room for it, and what `make` raises.
        """
        key = sources.key(self._family, made)
        found = self._store.prepacked.open(key)
        if found is not None:
            with self._lock:
                self._locks.append(found[1])
            return found[0]
        self._store.reserve(int(sources.size_bytes * (1 + GROWTH)), spare_bytes=SPARE_BYTES)
        with self._store.prepacked.scratch(key) as scratch:
            make(scratch)
        with self._lock:
            self._made.append(_Made(scratch, key, sources.pieces))
        return scratch

    def discard(self, sources: Sources, made: str) -> None:
        """Forget a part that turned out not to be whole."""
        self._store.prepacked.remove(sources.key(self._family, made))

    def keep(self) -> None:
        """Sync what `open` made and make it visible, which takes as long as the disk does. For a thread beside."""
        while True:
            with self._lock:
                if not self._made:
                    return
                made = self._made.pop(0)
            try:
                lock = self._store.prepacked.keep(made.scratch, made.key, made.pieces)
            except OSError as error:
                self._give_up(str(error))
                continue
            if lock is not None:
                with self._lock:
                    self._locks.append(lock)

    def close(self) -> None:
        """Forget what was made and not kept, and let others evict what was opened; sessions stay valid."""
        with self._lock:
            while self._made:
                shutil.rmtree(self._made.pop().scratch, ignore_errors=True)
            while self._locks:
                os.close(self._locks.pop())

    def _opened(self, key: str, start: Start) -> Any | None:
        found = self._store.prepacked.open(key)
        if found is None:
            return None
        place, lock = found
        try:
            for file in place.iterdir():
                check_file(file, file.lstat().st_size)
            session = start(place / PART_GRAPH, None)
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's errors have no base; whatever it is, the part goes
            os.close(lock)
            log.warning("prepacked part %s does not open and is made again: %s", key[:12], error)
            self._store.prepacked.remove(key)
            return None
        with self._lock:
            self._locks.append(lock)
        return session

    def _made_now(self, key: str, sources: Sources, source: Path, start: Start) -> Any | None:
        """The session of a part made now; None when there is no room for it, or ONNX Runtime cannot write it."""
        if self._full:
            return None
        try:
            self._store.reserve(int(sources.size_bytes * GROWTH), spare_bytes=SPARE_BYTES)
            with self._store.prepacked.scratch(key) as scratch:
                start(source, scratch / PART_GRAPH)
                session = start(scratch / PART_GRAPH, None)
        except Exhausted as error:
            self._give_up(error.message)
            return None
        except Exception as error:  # noqa: BLE001 - a graph at fault fails again, and then by its name
            self._give_up(str(error))
            return None
        with self._lock:
            self._made.append(_Made(scratch, key, sources.pieces))
        return session

    def _give_up(self, reason: str) -> None:
        with self._lock:
            said, self._full = self._full, True
        if not said:
            log.warning("weights are loaded into memory, not kept prepacked: %s", reason)
