"""What a broken-off cut had done: one line for each finished job, believed only while its pieces are there.

`<sink>/cutting/<cut>-<state>.jsonl`. A line is written after the pieces that it names; a torn last line is dropped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

import numpy as np

from ganglion.partitioner.sink import PieceSink, Shelf
from ganglion.wire.nouns import PieceRef

FOLDER: Final = "cutting"
Pieces = tuple[tuple[str, PieceRef], ...]
"""Slot names and pieces of one job, in order."""


class Journal:
    """The journal of one cut, in a folder, or none (then nothing is remembered). For one thread.

    `cut` says what is cut and how it is named there, `state` what its pieces depend on: a journal of the same cut in
    another state is of no use any more and is removed. Closed it stays for the next attempt; `finish` removes it.
    """

    def __init__(self, folder: Path | None, cut: str, state: str, has: Callable[[str, int], bool]) -> None:
        self._has = has
        self._known: dict[str, Pieces] = {}
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._path = folder / f"{cut}-{state}.jsonl"
            for other in folder.glob(f"{cut}-*.jsonl"):
                if other != self._path:
                    other.unlink(missing_ok=True)
            self._known = dict(_entries(self._path))
            self._file = self._path.open("ab", buffering=0)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def find(self, job: str) -> Pieces | None:
        """What `job` gave, if every piece of it is there."""
        known = self._known.get(job)
        return known if known is not None and all(self._has(ref.digest, ref.size) for _, ref in known) else None

    def add(self, job: str, pieces: Pieces) -> None:
        """`job` is done: its pieces are in the sink."""
        if self._file is not None:
            entry = [job, [[slot, ref.digest, ref.size] for slot, ref in pieces]]
            self._file.write(json.dumps(entry, separators=(",", ":")).encode() + b"\n")

    def finish(self) -> None:
        """The manifest is made: nothing is to be resumed."""
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another cut has a journal there
                self._path.parent.rmdir()

    def close(self) -> None:
        """Keep what is written."""
        if self._file is not None:
            self._file.close()


def open_journal(sink: PieceSink, source: Path, mark: bytes) -> Journal:
    """The journal in `sink` of cutting `source` as it lies there now; `mark` tells ways of cutting apart.

    Every file's name, size and time of change count, since a checkpoint's digest is over headers only; so do the
    versions of numpy and of the code of this package.
    """
    if not isinstance(sink, Shelf):
        return Journal(None, "", "", lambda digest, size: False)
    folder = source if source.is_dir() else source.parent
    stats = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    files = [f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode() for name, stat in stats]
    cut = _digest(str(source.resolve()).encode(), mark)
    state = _digest(code_digest().encode(), np.__version__.encode(), *files)
    return Journal(sink.path / FOLDER, cut, state, sink.has)


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(4, "little") + part)
    return found.hexdigest()[:32]


def _entries(path: Path) -> Iterator[tuple[str, Pieces]]:
    """The lines of a journal; what does not parse is as if it were not there, a torn last line is cut off."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)  # what is added next must not be glued to it
    for line in content[:whole].splitlines():
        with contextlib.suppress(ValueError, TypeError):
            job, pieces = json.loads(line)
            yield str(job), tuple((str(slot), PieceRef(str(name), int(size))) for slot, name, size in pieces)


@functools.cache
def code_digest() -> str:
    """A digest of the source of this package: what other code has cut is not taken over."""
    here = Path(__file__).parent
    found = hashlib.sha256()
    for file in sorted(here.rglob("*.py")):
        found.update(f"{file.relative_to(here)}\0".encode() + file.read_bytes())
    return found.hexdigest()
