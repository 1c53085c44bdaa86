"""Prepacked parts on disk: `<store>/prepacked/<key>/` holds a graph, its weights as kernels read them, and a record.

A part can be made again at any time, so it gives way to pieces. It is written beside its place, synced and renamed:
what stands there is whole. Who uses a part holds a shared lock on its record; one that is locked is never evicted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import psutil

from ganglion.wire.errors import Corrupt
from ganglion.wire.home import make_private_folder

log = logging.getLogger(__name__)

RECORD_FILE: Final = "part.json"
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SAMPLE_BYTES: Final = 4096
_STRIDE_BYTES: Final = 4 << 20


class _Record(msgspec.Struct, frozen=True):
    sizes: dict[str, int]  # of every other file
    sample: str  # digest over blocks of them all
    pieces: tuple[str, ...]  # of the store, that it was made from


class PrepackedParts:
    """The parts below `path`. Safe from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def scratch(self, key: str) -> Iterator[Path]:
        """A folder to write the part `key` in; gone when the block raises, else to be kept or dropped."""
        folder = make_private_folder(self.path) / f".new-{os.getpid()}-{secrets.token_hex(4)}-{key[:12]}"
        folder.mkdir(mode=0o700)
        try:
            yield folder
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def keep(self, scratch: Path, key: str, pieces: tuple[str, ...]) -> int | None:
        """Make what was written in `scratch` the part `key`; returns its lock, None when another process was faster.

        Open mappings stay valid. Raises OSError, and then nothing is kept.
        """
        try:
            files = sorted(scratch.iterdir())
            for file in files:
                file.chmod(0o600)
                _sync(file)
            record = _Record({file.name: file.stat().st_size for file in files}, sample(files), pieces)
            (scratch / RECORD_FILE).write_bytes(msgspec.json.encode(record))
            _sync(scratch / RECORD_FILE)
            lock = _locked(scratch / RECORD_FILE, fcntl.LOCK_SH)
            try:
                scratch.rename(self._place(key))
            except FileExistsError:  # rename(2) may say either of a folder that is not empty
                lock = None
            except OSError as error:
                if not self._place(key).exists():
                    raise
                log.debug("part %s stands already: %s", key[:12], error)
                lock = None
            _sync(self.path)
            return lock
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def open(self, key: str) -> tuple[Path, int] | None:
        """The folder of the part `key` and a lock on it (close it), or None. One that is not whole is removed."""
        place = self._place(key)
        lock = _locked(place / RECORD_FILE, fcntl.LOCK_SH)
        if lock is None:
            return None
        try:
            _check(place, lock)
        except (Corrupt, OSError) as error:
            os.close(lock)
            log.warning("prepacked part %s is made again: %s", key[:12], error)
            self.remove(key)
            return None
        with contextlib.suppress(OSError):  # somebody found it broken meanwhile
            os.utime(place / RECORD_FILE)
        return place, lock

    def remove(self, key: str) -> int:
        """Forget a part, used or not (open mappings stay valid); the bytes that went."""
        gone = self.path / f".new-{os.getpid()}-{secrets.token_hex(4)}-gone"
        try:
            self._place(key).rename(gone)
        except OSError:
            return 0
        size = _size(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return size

    def shrink(self, size_bytes: int) -> int:
        """Remove parts that nobody uses, least recently used first, until `size_bytes` went; the bytes that went."""
        freed = 0
        for _, key in sorted(self._used()):
            if freed >= size_bytes:
                break
            freed += self._evict(key)
        return freed

    def forget(self, pieces: frozenset[str]) -> int:
        """Remove the parts made from any of these pieces that nobody uses; the bytes that went."""
        return sum(self._evict(key) for _, key in list(self._used()) if not pieces.isdisjoint(self._made_from(key)))

    def used_bytes(self) -> int:
        """Bytes of all parts, and of what is being written."""
        return sum(_size(Path(entry)) for entry in self._entries())

    def sweep(self) -> None:
        """Remove what processes that were killed had half written."""
        for entry in self._entries():
            name = entry.name.split("-")
            with contextlib.suppress(ValueError, IndexError):
                if name[0] == ".new" and not psutil.pid_exists(int(name[1])):
                    shutil.rmtree(entry, ignore_errors=True)

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            return list(os.scandir(self.path))
        except FileNotFoundError:
            return []

    def _used(self) -> Iterator[tuple[int, str]]:
        """(when it was last opened, key) of every part."""
        for entry in self._entries():
            if _KEY.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    yield (Path(entry) / RECORD_FILE).stat().st_mtime_ns, entry.name

    def _evict(self, key: str) -> int:
        lock = _locked(self._place(key) / RECORD_FILE, fcntl.LOCK_EX)
        if lock is None:
            return 0
        try:
            return self.remove(key)
        finally:
            os.close(lock)

    def _made_from(self, key: str) -> tuple[str, ...]:
        try:
            return msgspec.json.decode((self._place(key) / RECORD_FILE).read_bytes(), type=_Record).pieces
        except (OSError, msgspec.DecodeError):
            return ()

    def _place(self, key: str) -> Path:
        return self.path / key


def _locked(record: Path, how: int) -> int | None:
    """The record, opened and locked; None when it is not there, or locked by others, or was replaced meanwhile."""
    try:
        lock = os.open(record, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), record.stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _check(place: Path, lock: int) -> None:
    """Raise Corrupt unless the files are those of the record: names, sizes, one block in every 4 MiB.

    Bits that rot in between go unseen: to read everything would take longer than to make the part.
    """
    try:
        record = msgspec.json.decode(os.pread(lock, os.fstat(lock).st_size, 0), type=_Record)
    except msgspec.DecodeError as error:
        raise Corrupt(f"{place / RECORD_FILE}: {error}") from error
    files = sorted(file for file in place.iterdir() if file.name != RECORD_FILE)
    found = {file.name: file.lstat().st_size for file in files}
    if found != record.sizes:
        raise Corrupt(f"{place}: has {found}, its record says {record.sizes}")
    if sample(files) != record.sample:
        raise Corrupt(f"{place}: what it holds is not what was written")


def sample(files: list[Path]) -> str:
    """Digest of the first and last block of each file, and of one in every 4 MiB; of files up to 4 MiB of all."""
    digest = hashlib.sha256()
    for path in files:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size <= _STRIDE_BYTES:
                digest.update(os.pread(descriptor, size, 0))
                continue
            for offset in (*range(0, size, _STRIDE_BYTES), size - _SAMPLE_BYTES):
                digest.update(os.pread(descriptor, _SAMPLE_BYTES, offset))
        finally:
            os.close(descriptor)
    return digest.hexdigest()


def _size(folder: Path) -> int:
    size = 0
    with contextlib.suppress(OSError):  # renamed or removed by another process meanwhile
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                size += entry.stat().st_size
    return size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
