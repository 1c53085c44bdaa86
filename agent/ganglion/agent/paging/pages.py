"""Memory that ONNX Runtime reads and we fill: slots of pages, mapped over its mapping of a weights file.

Measured on ONNX Runtime 1.31.1, an expert of 2.4 MB in one packed range, ms of a core (Linux 6.18, pages of 4 KiB):
  * its mapping of a file in tmpfs, filled by writes and emptied by punching holes: 2.9 to read and 1.1 to 1.9 to empty,
    for pages are found, cleared and freed each time; and the file needs a name in a mounted tmpfs (a memfd is refused).
  * a pool of pages that stays, mapped over the file's mapping where an expert is to lie: 0.22 to read with O_DIRECT,
    0.02 to map, 0.15 of page faults, 0.09 to take away. This is what stands here. Reading goes through a mapping of the
    pool that stays too (through the new one it took three times as long), so the process's resident size counts these
    pages twice; its proportional size, and a cgroup, count them once.
ONNX Runtime maps privately and never writes; it sees what is mapped in its place. What the pool holds is exactly its
size, nothing is held twice, and a page that is not there is not readable: a defect ends the process, not the numbers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ganglion.agent.paging.layout import PAGE, Span
from ganglion.wire.errors import Exhausted, Unsupported

_FIXED: Final = 0x10
_NORESERVE: Final = 0x4000
_POPULATE: Final = 0x8000


def check_supported() -> None:
    """Raise Unsupported where pages cannot be managed so."""
    if sys.platform != "linux" or mmap.PAGESIZE != PAGE:
        raise Unsupported(
            f"experts on disk need Linux with pages of {PAGE} bytes, here is {sys.platform} with {mmap.PAGESIZE}; "
            "leave --expert-memory out",
            param="expert_memory",
        )


def _library() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    return library


def _map(span: Span, protection: int, flags: int, descriptor: int, offset: int) -> None:
    address, length = span
    mapped = _library_once().mmap(address, length, protection, flags | _FIXED, descriptor, offset)
    if mapped != address:
        number = ctypes.get_errno()
        if number == errno.ENOMEM:
            raise Exhausted(f"{length} bytes of experts cannot be mapped: memory, or vm.max_map_count, is spent")
        raise OSError(number, f"mapping {length} bytes of experts: {os.strerror(number)}")


_loaded: list[Any] = []


def _library_once() -> Any:
    if not _loaded:
        _loaded.append(_library())
    return _loaded[0]


def take_away(address: int, length: int) -> None:
    """Leave no memory and no right to read there."""
    _map((address, length), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)


def view(address: int, length: int) -> memoryview:
    """The bytes there, to be written; the caller sees to it that they are mapped while it uses them."""
    return memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")


class Pool:
    """Memory without a name, in `slots` of `slot_bytes` (whole pages); allocated as it is first used."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._descriptor = os.memfd_create("experts", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, slots * slot_bytes)
        self._memory = memoryview(mmap.mmap(self._descriptor, slots * slot_bytes))

    def views(self, slot: int, lengths: Sequence[int]) -> list[memoryview]:
        """A slot's bytes in parts of these lengths, to be written before they are shown."""
        at, views = slot * self.slot_bytes, []
        for length in lengths:
            views.append(self._memory[at : at + length])
            at += length
        return views

    def show(self, slot: int, spans: Sequence[Span]) -> None:
        """Map a slot over `spans` of addresses, one after the other."""
        at = slot * self.slot_bytes
        for span in spans:
            # Pages are there already: entering them all at once spares the computation a fault for each few.
            _map(span, mmap.PROT_READ, mmap.MAP_SHARED | _POPULATE, self._descriptor, at)
            at += span[1]

    def close(self) -> None:
        """Give the memory back as soon as nothing maps it."""
        os.close(self._descriptor)


class Trap:
    """Memory that nobody should read: `sprung` says whether somebody has, for what is read comes into being."""

    def __init__(self, size: int) -> None:
        self._descriptor = os.memfd_create("unread", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, size)

    def set(self, address: int, length: int, offset: int = 0) -> None:
        """Put it at `address`."""
        _map((address, length), mmap.PROT_READ, mmap.MAP_SHARED, self._descriptor, offset)

    def sprung(self, offset: int = 0, length: int | None = None) -> bool:
        """Whether bytes offset..offset+length were read."""
        try:
            found = os.lseek(self._descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return length is None or found < offset + length

    def close(self) -> None:
        """Let it go."""
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping of a file: where it begins in memory and in the file, and its size."""

    address: int
    offset: int
    length: int


def mappings(file: Path) -> frozenset[Mapping]:
    """Where this process maps `file`."""
    found = file.stat()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    mapped = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, _, offset, where, inode, *_ = line.split(maxsplit=5)
        if where == device and int(inode) == found.st_ino:
            start, stop = (int(end, 16) for end in ends.split("-"))
            mapped.add(Mapping(start, int(offset, 16), stop - start))
    return frozenset(mapped)


def places_of(span: Span, mapped: frozenset[Mapping]) -> list[tuple[int, Span]]:
    """Every address where bytes of a span of the file are mapped, and which bytes these are.

    ONNX Runtime maps what it reads piece by piece, in whole pages: a page at a seam of two pieces is mapped twice.
    """
    offset, length = span
    found = []
    for one in mapped:
        first, last = max(offset, one.offset), min(offset + length, one.offset + one.length)
        if first < last:
            found.append((one.address + first - one.offset, (first, last - first)))
    return found
