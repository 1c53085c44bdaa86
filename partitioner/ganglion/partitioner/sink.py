"""Where pieces go: an interface of one method, one that can be asked too, and a folder of files named by SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Protocol, runtime_checkable

from ganglion.wire.nouns import PieceRef


class PieceSink(Protocol):
    """Takes the bytes of a piece and names it; putting the same bytes twice stores them once. Safe from threads."""

    def put(self, buffer: bytes | memoryview, /) -> PieceRef:
        """Store `buffer` (contiguous) and return its SHA-256 and size."""
        ...


@runtime_checkable
class Shelf(Protocol):
    """A sink that keeps: it knows what it has, and `path` is a folder of its own where a cut may leave its journal."""

    path: Path

    def put(self, buffer: bytes | memoryview, /) -> PieceRef:
        """Store `buffer` (contiguous) and return its SHA-256 and size."""
        ...

    def has(self, digest: str, size: int, /) -> bool:
        """Whether the piece is there with this size."""
        ...


class DirectorySink:
    """Pieces as files `<path>/<first two hexadecimal digits>/<digest>`: the layout of an agent's store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def put(self, buffer: bytes | memoryview, /) -> PieceRef:
        """Store `buffer` under its digest, by an atomic rename; raises OSError when the disk is full."""
        view = memoryview(buffer).cast("B")
        digest = hashlib.sha256(view).hexdigest()
        target = self.file(digest)
        if not self.has(digest, view.nbytes):
            target.parent.mkdir(exist_ok=True)
            handle, partial = tempfile.mkstemp(prefix=".", dir=target.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(view)
                Path(partial).replace(target)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    Path(partial).unlink()
                raise
        return PieceRef(digest, view.nbytes)

    def has(self, digest: str, size: int) -> bool:
        """Whether the piece is there with this size."""
        try:
            return self.file(digest).stat().st_size == size
        except FileNotFoundError:
            return False

    def file(self, digest: str) -> Path:
        """The file of a piece, whether it is there or not."""
        return self.path / digest[:2] / digest
