"""A repository's checkpoint onto this machine: pinned to a commit, checked against the disk, several files at once."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ganglion.partitioner.sources.cache import Cache, Snapshot
from ganglion.partitioner.sources.choice import Choice, choose, shards, split_parts
from ganglion.partitioner.sources.hub import Hub, HubFile, Listing, decode_index
from ganglion.partitioner.sources.reference import Repository
from ganglion.partitioner.sources.transfer import StoppedError, transfer
from ganglion.wire.errors import Exhausted, InvalidDocument, Unavailable

PARALLEL: Final = 4
SPARE_BYTES: Final = 64 << 20  # left free on the disk
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Progress = Callable[[str, int, int], None]
"""(file, bytes here, bytes in all), from several threads."""


@dataclass(frozen=True)
class Download:
    """What `pull` did: bytes in all files and in the weights among them, and those that came now."""

    snapshot: Snapshot
    total_bytes: int
    weights_bytes: int
    received_bytes: int


def pull(
    hub: Hub,
    repository: Repository,
    *,
    progress: Progress = lambda file, done, total: None,
    found: Callable[[str, int], None] = lambda commit, total_bytes: None,
    stop: threading.Event | None = None,
    weights: bool = True,
) -> Download:
    """Bring the newest commit of a revision into the cache and say where it lies; what is there is not fetched again.

    found: told the commit and the bytes of all files as soon as they are known. weights False: only configuration and
    tokenizer. Offline, the cache answers. Raises the errors of `Hub`, `choose` and `transfer`; Exhausted (disk),
    Conflict (another process downloads the same file); StoppedError after `stop` was set.
    """
    cache = Cache(hub.cache)
    if hub.offline:
        here = cache.find(repository)
        if here is None:
            raise Unavailable(
                f"{repository} is not in the cache {hub.cache}, and HF_HUB_OFFLINE is set: unset it, or download it"
                f" once with: ganglion pull {repository}"
            )
        size = folder_bytes(here.path)
        found(here.commit, size)
        return Download(here, size, weights_bytes(here.path), 0)
    listing = hub.listing(repository)
    choice = choose(listing.files, repository.variant, str(repository))
    work = _Work(hub, cache, repository, listing, progress, stop or threading.Event())
    work.fetch(choice.small)
    stored = (*choice.weights, *work.shards(choice))
    stored_bytes = sum(listing.files[name].size for name in stored)
    total = stored_bytes + sum(listing.files[name].size for name in choice.small)
    found(listing.commit, total)
    if weights:
        work.fetch((*choice.small, *stored))
    cache.remember(repository, listing.commit)
    folder = cache.snapshot_folder(repository, listing.commit)
    place = folder / choice.gguf if choice.gguf else folder
    return Download(Snapshot(repository, listing.commit, place), total, stored_bytes, work.received_bytes)


def folder_bytes(path: Path) -> int:
    """Bytes of the files below `path`, or of a GGUF file in all its parts."""
    return sum(file.stat().st_size for file in _files(path))


def weights_bytes(path: Path) -> int:
    """Bytes of the weights below `path`, or of a GGUF file in all its parts."""
    return sum(file.stat().st_size for file in _files(path) if file.suffix in (".safetensors", ".gguf"))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    return [path.parent / name for name in split_parts(path.name, [each.name for each in path.parent.iterdir()])]


@dataclass
class _Work:
    hub: Hub
    cache: Cache
    repository: Repository
    listing: Listing
    progress: Progress
    stop: threading.Event
    received_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def shards(self, choice: Choice) -> tuple[str, ...]:
        if choice.index is None:
            return ()
        index = self.cache.within(self.cache.blob(self.repository, self.listing.files[choice.index]))
        weight_map = decode_index(index.read_bytes(), f"{self.repository}: {choice.index}")
        return shards(weight_map, self.listing.files, str(self.repository))

    def fetch(self, names: Sequence[str]) -> None:
        """Have every one of the files, `PARALLEL` at once. The first error ends all; what came is kept."""
        files = [self.listing.files[name] for name in names]
        missing = [file for file in files if not self.cache.has(self.repository, file)]
        self._check_disk(missing)
        self.cache.folder(self.repository).joinpath("blobs").mkdir(parents=True, exist_ok=True)
        # Equal contents under several names are one blob and come once.
        tasks = list({file.digest: file for file in missing}.values())
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
            running = [pool.submit(self._one, file) for file in tasks]
            try:
                done, _ = wait(running, return_when=FIRST_EXCEPTION)
                failed = next((task for task in done if task.exception() is not None), None)
            except BaseException:
                self._end(running)
                raise
            if failed is not None:
                self._end(running)
                failed.result()
        for file in files:
            self.cache.link(self.repository, self.listing.commit, file)

    def _end(self, running: Sequence[Future[None]]) -> None:
        self.stop.set()
        for task in running:
            task.cancel()

    def _one(self, file: HubFile) -> None:
        if self.stop.is_set():
            raise StoppedError
        what = f"{self.repository.id} {file.path}"
        blob = self.cache.blob(self.repository, file)
        partial = blob.with_name(f"{blob.name}.incomplete")
        with self.cache.lock(self.repository, file):
            if self.cache.has(self.repository, file):  # another process was quicker
                return
            held = partial.stat().st_size if partial.exists() else 0
            url = self.hub.file_url(self.repository, self.listing.commit, file.path)
            try:
                transfer(
                    self.hub,
                    url,
                    file,
                    partial,
                    what=what,
                    stop=self.stop,
                    advance=lambda here: self.progress(file.path, here, file.size),
                )
                partial.replace(blob)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise InvalidDocument(f"{partial}: a link, a file is expected; remove it") from error
                if error.errno not in _FULL:
                    raise
                raise Exhausted(
                    f"{what}: the disk of {self.cache.path} is full ({os.strerror(error.errno or 0)}); free some space,"
                    " or put the cache on another disk with HF_HOME; the same command goes on"
                ) from error
        with self._lock:
            self.received_bytes += max(0, file.size - held)

    def _check_disk(self, missing: Sequence[HubFile]) -> None:
        needed = sum(file.size for file in missing)
        for file in missing:
            partial = self.cache.blob(self.repository, file).with_suffix(".incomplete")
            if partial.exists():
                needed -= min(file.size, partial.stat().st_size)
        there = self.cache.path
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if missing and needed + SPARE_BYTES > free:
            raise Exhausted(
                f"{self.repository} needs {needed} bytes more and the disk of {self.cache.path} has {free} free: free"
                " some space, or put the cache on another disk with HF_HOME"
            )
