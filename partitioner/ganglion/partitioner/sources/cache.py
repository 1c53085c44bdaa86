"""The Hugging Face cache, in huggingface_hub's own layout: what lies there whole, and where new files go.

    <cache>/models--org--name/blobs/<digest>             the bytes; `<digest>.incomplete` while they come
    <cache>/models--org--name/snapshots/<commit>/<file>  links to blobs
    <cache>/models--org--name/refs/<revision>            the commit of a branch or tag when it was last asked for
    <cache>/blobs/                                       blobs that repositories share (huggingface_hub 2.4 and later)

What is downloaded here is found by transformers and the `hf` command, and the other way round.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ganglion.partitioner.checkpoint import INDEX, INDEX_BYTES, SINGLE
from ganglion.partitioner.sources.choice import CONFIG, shards, variant_parts
from ganglion.partitioner.sources.hub import HubFile, decode_index
from ganglion.partitioner.sources.reference import Repository, is_commit
from ganglion.wire.errors import Conflict, GanglionError, InvalidDocument

REF_BYTES: Final = 64


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint in the cache: `path` is its folder, or its GGUF file."""

    repository: Repository
    commit: str
    path: Path


@dataclass(frozen=True)
class _Present:
    size: int


class Cache:
    """The cache in the folder `path`, made when something is put there."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, repository: Repository) -> Path:
        """Where a repository's files are."""
        return self.path / f"models--{repository.organization}--{repository.name}"

    def snapshot_folder(self, repository: Repository, commit: str) -> Path:
        """Where the files of a commit are."""
        return self.folder(repository) / "snapshots" / commit

    def blob(self, repository: Repository, file: HubFile) -> Path:
        """Where the bytes of a file are."""
        return self.folder(repository) / "blobs" / file.digest

    def commit_of(self, repository: Repository) -> str | None:
        """The commit that the wanted revision was when it was last asked for; None when it never was."""
        revision = repository.wanted_revision
        if is_commit(revision):
            return revision
        try:
            with self._ref(repository, revision).open("rb") as file:
                found = file.read(REF_BYTES).decode("ascii", "replace").strip()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        return found if is_commit(found) else None

    def remember(self, repository: Repository, commit: str) -> None:
        """Note what the wanted revision is now."""
        if repository.wanted_revision != commit:
            place = self._ref(repository, repository.wanted_revision)
            place.parent.mkdir(parents=True, exist_ok=True)
            scratch = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
            scratch.write_text(commit, encoding="ascii")
            scratch.replace(place)

    def find(self, repository: Repository) -> Snapshot | None:
        """The whole checkpoint that lies here, else None; raises InvalidDocument for a link that leads out."""
        commit = self.commit_of(repository)
        if commit is None:
            return None
        folder = self.snapshot_folder(repository, commit)
        if not folder.is_dir():
            return None
        path = self._checkpoint(folder, repository.variant)
        return Snapshot(repository, commit, path) if path else None

    def within(self, path: Path) -> Path:
        """The real file behind `path`, which must lie in its repository's folder or among the shared blobs.

        Raises InvalidDocument for a link that leads elsewhere, or what is no plain file; FileNotFoundError.
        """
        real, relative = path.resolve(strict=True), path.relative_to(self.path)
        allowed = (self.path / relative.parts[0], self.path / "blobs")
        if not any(real.is_relative_to(folder.resolve()) for folder in allowed):
            raise InvalidDocument(f"{path}: a link to {real}, outside the cache; remove it and download again")
        if not real.is_file():
            raise InvalidDocument(f"{path}: not a file; remove it and download again")
        return real

    def has(self, repository: Repository, file: HubFile) -> bool:
        """Whether the bytes of a file lie here, as far as their length says."""
        blob = self.blob(repository, file)
        if not os.path.lexists(blob):
            return False
        try:
            return self.within(blob).stat().st_size == file.size
        except FileNotFoundError:  # a link to a shared blob that is gone
            return False

    def link(self, repository: Repository, commit: str, file: HubFile) -> Path:
        """Show a blob under its name in the commit's snapshot."""
        place = self.snapshot_folder(repository, commit) / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(self.blob(repository, file), place.parent)
        if not (place.is_symlink() and place.readlink() == Path(target)):
            scratch = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
            scratch.symlink_to(target)
            scratch.replace(place)
        return place

    @contextlib.contextmanager
    def lock(self, repository: Repository, file: HubFile) -> Iterator[None]:
        """Download a file in one process at a time, huggingface_hub's own downloads included. Raises Conflict."""
        folder = self.path / ".locks" / self.folder(repository).name
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            folder / f"{file.digest}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Conflict(
                    f"another process is downloading {file.path} of {repository.id}; wait until it is done"
                ) from None
            yield
        finally:
            os.close(descriptor)

    def _ref(self, repository: Repository, revision: str) -> Path:
        return self.folder(repository) / "refs" / revision

    def _checkpoint(self, folder: Path, variant: str | None) -> Path | None:
        if variant is None and (weights := self._weights(folder)):
            return folder if all(self._present(folder / name) for name in (CONFIG, *weights)) else None
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))
        try:
            chosen = variant_parts(names, variant, str(folder)) if names else ()
        except GanglionError:  # another variant lies here, or a part is missing
            return None
        return folder / chosen[0] if chosen and all(self._present(folder / name) for name in chosen) else None

    def _weights(self, folder: Path) -> tuple[str, ...]:
        if self._present(folder / SINGLE):
            return (SINGLE,)
        if not self._present(folder / INDEX):
            return ()
        index = self.within(folder / INDEX)
        if index.stat().st_size > INDEX_BYTES:
            return ()
        names = {path.name: _Present(0) for path in folder.glob("*.safetensors")}
        with contextlib.suppress(GanglionError):  # a shard is missing, or the index is damaged: not whole
            return shards(decode_index(index.read_bytes(), str(folder / INDEX)), names, str(folder))
        return ()

    def _present(self, path: Path) -> bool:
        try:
            self.within(path)
        except FileNotFoundError:
            return False
        return True
