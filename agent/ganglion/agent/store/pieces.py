"""Pieces on disk: `<store>/pieces/<first two digits>/<digest>`, visible only when whole and verified.

A piece is written beside its place and renamed, so a reader never sees half of one, and several processes may write
the same store. Nothing is synced to the disk: a crash can leave a truncated piece, which `has` refuses by its size and
`verify` by its digest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import secrets
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from ganglion.agent.store.prepacked import PrepackedParts
from ganglion.wire.errors import Conflict, Corrupt, Exhausted, InvalidRequest, NotFound
from ganglion.wire.nouns import PieceRef

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HASH_BYTES: Final = 8 << 20

Buffer = bytes | bytearray | memoryview | mmap.mmap


class PieceStore:
    """Pieces under `path`, and parts made from them, together at most `budget_bytes` (0: as much as the disk has).

    Safe from several threads.
    """

    def __init__(self, path: Path, budget_bytes: int = 0) -> None:
        self.path = Path(path)
        self.budget_bytes = budget_bytes
        self._pieces = self.path / "pieces"
        self._pieces.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._counted: int | None = None
        self._coming: set[str] = set()  # what a PartialPiece of this process is open for
        self.prepacked = PrepackedParts(self.path / "prepacked")

    def put(self, buffer: Buffer) -> PieceRef:
        """Keep `buffer` and name it; the same bytes again cost a hash. Raises Exhausted (budget, disk)."""
        view = memoryview(buffer).cast("B")
        ref = PieceRef(hashlib.sha256(view).hexdigest(), view.nbytes)
        if self.has(ref.digest, ref.size):
            return ref
        self.reserve(ref.size)
        place = self._place(ref.digest)
        scratch = place.with_name(f".put-{os.getpid()}-{secrets.token_hex(4)}")
        with self._disk_errors(ref.size):
            place.parent.mkdir(mode=0o700, exist_ok=True)
            try:
                with scratch.open("xb") as file:
                    file.write(view)
                scratch.replace(place)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise
        self._count(ref.size)
        return ref

    def has(self, digest: str, size: int | None = None) -> bool:
        """Whether the piece is held (and is `size` bytes long, when given)."""
        try:
            found = self._place(digest).stat().st_size
        except FileNotFoundError:
            return False
        return size is None or found == size

    def open(self, digest: str) -> memoryview:
        """The piece, mapped read-only; the mapping lives as long as the view. Raises NotFound."""
        try:
            with self._place(digest).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))
        except FileNotFoundError:
            raise NotFound(f"piece {digest[:12]} is not held in {self.path}") from None

    def path_of(self, digest: str) -> Path:
        """The file of a held piece, for readers that map by name (graphs). Raises NotFound."""
        place = self._place(digest)
        if not place.is_file():
            raise NotFound(f"piece {digest[:12]} is not held in {self.path}")
        return place

    def verify(self, digest: str) -> None:
        """Read the piece again; when it is not what its name says it is removed. Raises Corrupt, NotFound."""
        view = self.open(digest)
        try:
            found = _hash(view)
        finally:
            view.release()
        if found != digest:
            self.remove(digest)
            raise Corrupt(
                f"piece {digest[:12]} in {self.path} read back as {found[:12]}; it was removed, fetch it again"
            )

    def remove(self, digest: str) -> bool:
        """Forget the piece and what was fetched of it; whether it was held. Open mappings stay valid."""
        place = self._place(digest)
        _partial_path(place).unlink(missing_ok=True)
        try:
            size = place.stat().st_size
            place.unlink()
        except FileNotFoundError:
            return False
        self._count(-size)
        return True

    def digests(self) -> Iterator[str]:
        """Every held piece, in no order."""
        for folder in self._pieces.iterdir():
            if folder.is_dir():
                yield from (entry.name for entry in os.scandir(folder) if _DIGEST.fullmatch(entry.name))

    def sweep(self) -> None:
        """Remove what processes that were killed had half written."""
        self.prepacked.sweep()
        for scratch in self._pieces.glob("*/.put-*"):
            with contextlib.suppress(ValueError, FileNotFoundError):
                if not psutil.pid_exists(int(scratch.name.split("-")[1])):
                    scratch.unlink()

    def used_bytes(self) -> int:
        """Bytes of all pieces and of what was fetched in part, as the disk shows them now."""
        used = 0
        for folder in self._pieces.iterdir():
            if not folder.is_dir():
                continue
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed by another process meanwhile
                    used += entry.stat().st_size
        return used

    def received_bytes(self, digest: str) -> int:
        """How much of a piece that is not here whole came in earlier transfers."""
        try:
            return _partial_path(self._place(digest)).stat().st_size
        except FileNotFoundError:
            return 0

    def reserve(self, size_bytes: int, *, spare_bytes: int = 0) -> None:
        """Check that `size_bytes` more fit budget and disk, which keeps `spare_bytes`; parts that nobody uses give way.

        Raises Exhausted naming the figure and the knob.
        """
        free = shutil.disk_usage(self.path).free
        if size_bytes + spare_bytes > free and self.prepacked.shrink(size_bytes + spare_bytes - free):
            free = shutil.disk_usage(self.path).free
        if size_bytes + spare_bytes > free:
            raise Exhausted(
                f"{size_bytes + spare_bytes} bytes more are needed in {self.path}, its disk has {free} free: free some"
                " space, or put the home on another disk with --home"
            )
        if not self.budget_bytes:
            return
        with self._lock:
            short = self._short(size_bytes)
            if short > 0 and self.prepacked.shrink(short):
                short = self._short(size_bytes)
            if short > 0:
                raise Exhausted(
                    f"the store {self.path} holds {self.budget_bytes + short - size_bytes} bytes and {size_bytes} more"
                    f" are needed, its budget is {self.budget_bytes}: raise the store budget, or remove a model"
                )

    def _short(self, size_bytes: int) -> int:
        """Bytes by which `size_bytes` more would exceed the budget; pieces are counted anew before they do."""
        parts = self.prepacked.used_bytes()
        if self._counted is None or self._counted + parts + size_bytes > self.budget_bytes:
            self._counted = self.used_bytes()  # another process may have written or removed
        return self._counted + parts + size_bytes - self.budget_bytes

    def partial(self, ref: PieceRef) -> PartialPiece:
        """The piece on its way here, continued where an earlier transfer stopped. Close it, or use `with`.

        Raises Conflict while another transfer of this process brings the same piece.
        """
        place = self._place(ref.digest)
        with self._lock:
            if ref.digest in self._coming:
                raise Conflict(f"piece {ref.digest[:12]} is being fetched already")
            self._coming.add(ref.digest)
        try:
            with self._disk_errors(ref.size):
                place.parent.mkdir(mode=0o700, exist_ok=True)
                return PartialPiece(self, ref, place)
        except BaseException:
            self._left(ref.digest)
            raise

    def _left(self, digest: str) -> None:
        with self._lock:
            self._coming.discard(digest)

    def _place(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest(f"digest {digest[:80]!r}: expected 64 lower-case hexadecimal digits", param="digest")
        return self._pieces / digest[:2] / digest

    def _count(self, change: int) -> None:
        with self._lock:
            if self._counted is not None:
                self._counted += change

    @contextlib.contextmanager
    def _disk_errors(self, size_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            free = shutil.disk_usage(self.path).free
            raise Exhausted(
                f"the disk of {self.path} takes no {size_bytes} bytes more ({os.strerror(error.errno or 0)}, {free}"
                " free): free some space, or put the home on another disk with --home"
            ) from error


class PartialPiece:
    """A transfer in progress: `<digest>.part`. A cancelled transfer may close it while a thread still writes."""

    def __init__(self, store: PieceStore, ref: PieceRef, place: Path) -> None:
        self.ref = ref
        self._store = store
        self._place = place
        self._file = _partial_path(place).open("a+b", buffering=0)
        self._hash = hashlib.sha256()
        self._busy = threading.RLock()
        self.received_bytes = 0
        self._file.seek(0)
        while block := self._file.read(_HASH_BYTES):
            self._hash.update(block)
            self.received_bytes += len(block)
        if self.received_bytes > ref.size:
            self.restart()

    def __enter__(self) -> PartialPiece:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Append `data`; raises Corrupt beyond the size the manifest names, Exhausted when the disk is full."""
        if self.received_bytes + len(data) > self.ref.size:
            self.restart()
            raise Corrupt(f"piece {self.ref.digest[:12]}: more than the {self.ref.size} bytes that the manifest names")
        rest = memoryview(data)
        with self._busy, self._store._disk_errors(self.ref.size):
            self._check_open()
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(self.received_bytes)
                raise
            self._hash.update(data)
            self.received_bytes += len(data)

    def restart(self) -> None:
        """Throw away what was received."""
        self._file.truncate(0)
        self._file.seek(0)
        self._hash = hashlib.sha256()
        self.received_bytes = 0

    def finish(self) -> None:
        """Make the piece visible. Raises Corrupt, and forgets what was received, when it is not what it should be."""
        with self._busy:
            self._check_open()
            found = self._hash.hexdigest()
            if self.received_bytes != self.ref.size or found != self.ref.digest:
                came = f"{self.received_bytes} bytes of digest {found[:12]}"
                self.restart()
                raise Corrupt(f"piece {self.ref.digest[:12]}: {came} came, expected {self.ref.size} bytes")
            self._file.close()
            _partial_path(self._place).replace(self._place)
            self._store._left(self.ref.digest)
            self._store._count(self.ref.size)

    def close(self) -> None:
        """Keep what was received for the next attempt; an empty file is removed."""
        with self._busy:
            if not self._file.closed:
                self._file.close()
                if self.received_bytes == 0:
                    _partial_path(self._place).unlink(missing_ok=True)
                self._store._left(self.ref.digest)

    def _check_open(self) -> None:
        # A thread may be late: by now another transfer may own the file.
        if self._file.closed:
            raise ValueError(f"piece {self.ref.digest[:12]}: its transfer was closed")


def _partial_path(place: Path) -> Path:
    return place.with_name(f"{place.name}.part")


def _hash(view: memoryview) -> str:
    found = hashlib.sha256()
    for start in range(0, view.nbytes, _HASH_BYTES):
        found.update(view[start : start + _HASH_BYTES])
    return found.hexdigest()
