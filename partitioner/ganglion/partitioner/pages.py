"""Dropping pages of a mapped file behind the reader: they stay in the system's cache, but not in this process."""

from __future__ import annotations

import mmap

import numpy as np


def drop_pages(view: memoryview) -> None:
    """Forget the pages of `view`, a slice of a read-only map; they are read again when touched. No-op elsewhere."""
    mapped = view.obj
    if not isinstance(mapped, mmap.mmap) or not hasattr(mapped, "madvise") or not view.nbytes:
        return
    at = _address(view) - _address(memoryview(mapped))
    start = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE  # a page at either end may be a neighbor's
    stop = (at + view.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
