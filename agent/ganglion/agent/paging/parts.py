"""Experts as they lie on disk: packed as kernels read them, one record after the other; and how a session is opened.

A part is `experts.bin`: for each expert a record of its pages, each padded to the longest, then what stays in memory;
and `experts.json`, which says so and has a sum over each record. Opening one reads nothing but what stays: the session
is opened on a *skeleton*, the same graph packed with weights of zero (ONNX Runtime packs at every load, and compares),
its pages are taken away, and a pager maps others in their place.

What is assumed of kernels is tried out when the skeleton is made: that packed experts lie in equal strides (one that is
not zero changes its own stride only), and which initializers are not read any more (they are replaced by memory that
shows whether it was read). Measured on ONNX Runtime 1.31.1, x86 with AVX512-VNNI: QMoE reads packed weights, with their
scales inside, and no scales beside; MoE (float32) is not packed.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganglion.agent.paging.layout import PAGE, Initializer, Layout, Span, initializers, inner_pages, layout_of
from ganglion.agent.paging.pages import Mapping, Trap, check_supported, mappings, places_of, take_away, view
from ganglion.wire.errors import Corrupt, Unsupported
from ganglion.wire.nouns import WEIGHTS_FILE

RECORDS_FILE: Final = "experts.bin"
INDEX_FILE: Final = "experts.json"
GRAPH_FILE: Final = "graph.onnx"
LEAST_BYTES: Final = 1024  # of an initializer: ONNX Runtime keeps smaller ones in the graph, where a skeleton has zeros
TRIED_ROWS: Final = (1, 2, 3, 16, 65, 256)  # that a skeleton runs with to see what kernels read

Start = Callable[[Path, Path | None], Any]  # (graph file, where to save it packed or None) -> session

_opening = threading.Lock()


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `experts.json` says: the layout, bytes of a record, and of each record the sum of its 64-bit words."""

    experts: int
    paged: tuple[Span, ...]
    fixed: tuple[Span, ...]
    unread: tuple[Span, ...]
    record_bytes: int
    sums: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        """Where experts lie in the file that ONNX Runtime maps."""
        return Layout(self.experts, self.paged, self.fixed, self.unread)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A graph of experts packed with weights of zero, and where its experts lie."""

    graph: Path
    written: tuple[Initializer, ...]
    layout: Layout


def word_sum(data: memoryview | NDArray[np.uint8]) -> int:
    """The sum of the 64-bit words of whole pages: what was torn, cut off or rotted shows."""
    return int(np.frombuffer(data, np.uint64).sum(dtype=np.uint64))


def make_skeleton(graph: bytes | memoryview, size_bytes: int, experts: int, folder: Path, start: Start) -> Skeleton:
    """Pack `graph`, of `experts` experts with `size_bytes` of weights, with zeros, below `folder`.

    Raises Unsupported where its experts cannot be paged: they are too small, or kernels lay them out otherwise.
    """
    check_supported()
    sources = initializers(graph)
    small = [one.name for one in sources if one.span[1] < LEAST_BYTES]
    if small:
        raise Unsupported(
            f"experts: {small[0]} is too small to be paged; leave --expert-memory out", param="expert_memory"
        )
    written = _packed(graph, size_bytes, {}, folder / "skeleton", start)
    if not layout_of(written, experts, ()).paged:
        raise Unsupported("experts: they are too small to be paged; leave --expert-memory out", param="expert_memory")
    place = folder / "skeleton"
    for one in written:
        if not one.packed and experts > 1 and one.dims[:1] != (experts,) and one.span[1] >= PAGE * experts:
            raise Unsupported(f"experts: {one.name} is not laid out by experts; leave --expert-memory out")
    if experts > 1:
        tried = experts // 2
        rng = np.random.default_rng(0)
        marks = {
            one.span[0] + tried * (one.span[1] // experts): rng.bytes(one.span[1] // experts)
            for one in sources
            if one.dims[:1] == (experts,)
        }
        marked = _packed(graph, size_bytes, marks, folder / "marked", start)
        if marked != written or not _apart(layout_of(written, experts, ()), place, folder / "marked", tried):
            raise Unsupported("experts: kernels of this machine do not keep them apart; leave --expert-memory out")
        shutil.rmtree(folder / "marked")
    unread = _unread(place / GRAPH_FILE, written, experts, start)
    layout = layout_of(written, experts, unread)
    if not layout.paged or not layout.record_bytes():
        raise Unsupported("experts: they are too small to be paged; leave --expert-memory out", param="expert_memory")
    return Skeleton(place / GRAPH_FILE, written, layout)


def _packed(
    graph: bytes | memoryview, size_bytes: int, marks: dict[int, bytes], place: Path, start: Start
) -> tuple[Initializer, ...]:
    """Pack weights of zero but for `marks` (bytes by offset) into `place`."""
    source = place / "source"
    source.mkdir(mode=0o700, parents=True)
    try:
        (source / GRAPH_FILE).write_bytes(graph)
        with (source / WEIGHTS_FILE).open("xb") as file:
            file.truncate(size_bytes)
            for offset, data in marks.items():
                file.seek(offset)
                file.write(data)
        start(source / GRAPH_FILE, place / GRAPH_FILE)
    finally:
        shutil.rmtree(source)
    return initializers((place / GRAPH_FILE).read_bytes())


def _apart(layout: Layout, zero: Path, marked: Path, expert: int) -> bool:
    """Whether two packed files differ in `expert`'s strides, and nowhere else where experts lie."""
    one, other = (np.memmap(place / WEIGHTS_FILE, np.uint8, "r") for place in (zero, marked))
    changed = False
    for (offset, length), (first, size) in zip(layout.paged, layout.strides(expert), strict=True):
        different = np.flatnonzero(one[offset : offset + length] != other[offset : offset + length]) + offset
        if different.size and not first <= int(different[0]) <= int(different[-1]) < first + size:
            return False
        changed |= bool(different.size)
    return changed


def _unread(graph: Path, written: tuple[Initializer, ...], experts: int, start: Start) -> tuple[str, ...]:
    """Names of the initializers that are not packed and that kernels do not read."""
    weights = graph.parent / WEIGHTS_FILE
    with _opening:
        before = mappings(weights)
        session = start(graph, None)
        mapped = mappings(weights) - before
    plain = [(one.name, one.span) for one in written if not one.packed]
    trap = Trap(sum(length + 2 * PAGE for _, (_, length) in plain) or PAGE)
    try:
        placed: list[tuple[str, int, int]] = []
        at = 0
        for name, span in plain:
            inner = inner_pages(span)
            if not inner[1] or not places_of(inner, mapped):
                continue
            trap.set(_found(inner, mapped, name)[0], inner[1], at)
            placed.append((name, at, inner[1]))
            at += inner[1]
        width = next(one.shape[-1] for one in session.get_inputs() if one.name == "rows")
        for rows in TRIED_ROWS:
            index = np.arange(rows, dtype=np.int64) % experts
            session.run(["given"], {"rows": np.ones((rows, width), np.float32), "index": index})
        return tuple(name for name, offset, size in placed if not trap.sprung(offset, size))
    finally:
        trap.close()


def make_part(source: Path, skeleton: Skeleton, place: Path, start: Start) -> None:
    """Pack the graph file `source` with the weights beside it, and write it as a part in the folder `place`.

    Raises Unsupported where it is packed otherwise than its skeleton, OSError.
    """
    packing = place / "packing"
    packing.mkdir(mode=0o700)
    try:
        start(source, packing / GRAPH_FILE)
        if initializers((packing / GRAPH_FILE).read_bytes()) != skeleton.written:
            raise Unsupported("experts: kernels pack them otherwise from layer to layer; leave --expert-memory out")
        layout, record = skeleton.layout, skeleton.layout.record_bytes()
        packed = np.memmap(packing / WEIGHTS_FILE, np.uint8, "r")
        sums = []
        with (place / RECORDS_FILE).open("xb") as file:
            for expert in range(layout.experts):
                parts = [packed[offset : offset + length] for offset, length in layout.pages(expert)]
                sums.append(sum(word_sum(part) for part in parts) & (2**64 - 1))
                file.writelines(part.data for part in parts)
                file.write(bytes(record - sum(part.size for part in parts)))
            file.writelines(packed[offset : offset + length].data for offset, length in layout.resident())
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        index = Index(layout.experts, layout.paged, layout.fixed, layout.unread, record, tuple(sums))
        (place / INDEX_FILE).write_bytes(msgspec.json.encode(index))
    finally:
        shutil.rmtree(packing)


class PagedExperts:
    """The experts of one layer: a session whose pages are not there until a pager brings them.

    Raises Corrupt where the part at `place` is not what its skeleton needs.
    """

    def __init__(self, place: Path, skeleton: Skeleton, start: Start, name: str) -> None:
        self.name = name
        try:
            self.index = msgspec.json.decode((place / INDEX_FILE).read_bytes(), type=Index)
        except msgspec.DecodeError as error:
            raise Corrupt(f"experts of {name}: {INDEX_FILE}: {error}") from error
        layout = self.layout = skeleton.layout
        if self.index.layout != layout or len(self.index.sums) != layout.experts:
            raise Corrupt(f"experts of {name}: {INDEX_FILE} describes another graph")
        weights = skeleton.graph.parent / WEIGHTS_FILE
        with _opening:
            before = mappings(weights)
            self.session = start(skeleton.graph, None)
            mapped = mappings(weights) - before
        self._pages = [
            [_found(span, mapped, name) for span in layout.pages(one) if span[1]] for one in range(layout.experts)
        ]
        self._trap = Trap(max((length for _, length in layout.unread), default=PAGE))
        self._file, self._direct = _open_direct(place / RECORDS_FILE)
        try:
            self._keep_resident(place / RECORDS_FILE, mapped)
            for spans in self._pages:
                for address, length in spans:
                    take_away(address, length)
            for span in layout.unread:
                self._trap.set(*_found(inner_pages(span), mapped, name))
        except BaseException:
            self.close()
            raise

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay in memory, in whole pages as they were copied."""
        return sum(-(-length // PAGE) * PAGE for _, length in self.layout.resident())

    def pages(self, expert: int) -> list[Span]:
        """Addresses of an expert's pages."""
        return self._pages[expert]

    def read(self, expert: int, views: list[memoryview], start: int, size: int) -> int:
        """Read bytes start..start+size of an expert's record into its `views`; how many. Raises Corrupt, OSError."""
        into, at = [], 0
        for one in views:
            first, last = max(start - at, 0), min(start + size - at, len(one))
            if first < last:
                into.append(one[first:last])
            at += len(one)
        wanted = sum(len(one) for one in into)
        offset = expert * self.index.record_bytes + start
        found = os.preadv(self._file, into, offset)
        if not self._direct:
            os.posix_fadvise(self._file, offset, wanted, os.POSIX_FADV_DONTNEED)
        if found != wanted:
            raise Corrupt(
                f"experts of {self.name}: expert {expert} in {RECORDS_FILE} ends {wanted - found} bytes early"
            )
        return found

    def check(self, expert: int, views: list[memoryview]) -> None:
        """Raise Corrupt unless these are the bytes that were written."""
        if sum(word_sum(one) for one in views) & (2**64 - 1) != self.index.sums[expert]:
            raise Corrupt(f"experts of {self.name}: expert {expert} in {RECORDS_FILE} is not what was written")

    @property
    def read_elsewhere(self) -> bool:
        """Whether kernels read what they were taken not to read."""
        return self._trap.sprung()

    def close(self) -> None:
        """Close the file; the session stays valid, its experts do not."""
        os.close(self._file)
        self._trap.close()

    def _keep_resident(self, file: Path, mapped: frozenset[Mapping]) -> None:
        """Copy what stays in memory to where kernels read it, into pages that are then this process's own."""
        at = self.layout.experts * self.index.record_bytes
        with file.open("rb") as opened:
            opened.seek(at)
            for span in self.layout.resident():
                data = opened.read(span[1])
                if len(data) != span[1]:
                    raise Corrupt(f"experts of {self.name}: {RECORDS_FILE} ends early")
                places = places_of(span, mapped)
                if not any(one == span for _, one in places):
                    raise _unmapped(self.name)
                for address, (first, size) in places:
                    view(address, size)[:] = data[first - span[0] :][:size]
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _found(span: Span, mapped: frozenset[Mapping], name: str) -> Span:
    """Where whole pages of the file are mapped, once; raises Unsupported where they are not."""
    places = places_of(span, mapped)
    if [one for _, one in places] != [span]:
        raise _unmapped(name)
    return places[0][0], span[1]


def _unmapped(name: str) -> Unsupported:
    return Unsupported(f"experts of {name}: ONNX Runtime does not map them; leave --expert-memory out")


def _open_direct(file: Path) -> tuple[int, bool]:
    """Open past the page cache, which would hold what is read a second time; where that is refused, through it."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(file, flags | os.O_DIRECT), True
    except OSError:
        return os.open(file, flags), False
