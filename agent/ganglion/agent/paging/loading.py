"""Opens the layers whose experts are paged, as a shard is loaded: a skeleton by kind of graph, a part each."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ganglion.agent.executor.prepacked import Prepacked, Sources
from ganglion.agent.paging.parts import PagedExperts, Skeleton, Start, make_part, make_skeleton
from ganglion.wire.errors import Corrupt

MADE: Final = "experts-1"  # how parts of this making are told apart; changes whenever older ones must not be opened


class PagedLoading:
    """Makes and opens parts below `folder`, and in `prepacked` where they outlast the process. From any thread.

    One layer at a time: what packing takes is then one layer's, whatever the number of threads.
    """

    def __init__(self, folder: Path, prepacked: Prepacked | None) -> None:
        self._folder = folder / "experts"
        self._prepacked = prepacked
        self._lock = threading.Lock()
        self._skeletons: dict[str, Skeleton] = {}
        self._opened: dict[str, PagedExperts] = {}

    def open(
        self,
        name: str,
        sources: Sources,
        graph: bytes | memoryview,
        experts: int,
        write: Callable[[], Path],
        *,
        start: Start,
    ) -> PagedExperts:
        """The layer `name` of `experts` experts; `write` gives its graph's file with its weights beside it.

        start: begins a session; the graph was scanned by whoever hands it on.
        Raises Unsupported where it cannot be paged, Exhausted without disk for it, and what `write` raises.
        """
        with self._lock:
            skeleton = self._skeletons.get(sources.graph.digest)
            if skeleton is None:
                place = self._folder / sources.graph.digest[:16]
                skeleton = make_skeleton(graph, sources.size_bytes, experts, place, start)
                self._skeletons[sources.graph.digest] = skeleton
            made = skeleton

            def make(into: Path) -> None:
                make_part(write(), made, into, start)

            if self._prepacked is None:
                into = self._folder / name
                into.mkdir(mode=0o700, parents=True)
                make(into)
                paged = PagedExperts(into, skeleton, start, name)
            else:
                try:
                    paged = PagedExperts(self._prepacked.place(sources, MADE, make), skeleton, start, name)
                except Corrupt:
                    self._prepacked.discard(sources, MADE)
                    paged = PagedExperts(self._prepacked.place(sources, MADE, make), skeleton, start, name)
            self._opened[name] = paged
            return paged

    def paged(self, name: str) -> PagedExperts | None:
        """The layer `name`, if its experts are paged."""
        return self._opened.get(name)

    def close(self, *, failed: bool) -> None:
        """Leave nothing on disk: what is open stays open. failed: nor what is open."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if failed:
            for one in self._opened.values():
                one.close()
