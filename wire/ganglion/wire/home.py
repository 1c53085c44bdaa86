"""Homes: the folder of one node, its secrets and its lock."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ganglion.wire.errors import Conflict, PermissionDenied

FOLDER_MODE = 0o700
SECRET_MODE = 0o600


def root() -> Path:
    """The folder of all homes: `$GANGLION_HOME`, else `$XDG_DATA_HOME/ganglion`, else `~/.local/share/ganglion`."""
    if own := os.environ.get("GANGLION_HOME"):
        return Path(own)
    if data := os.environ.get("XDG_DATA_HOME"):
        return Path(data) / "ganglion"
    return Path.home() / ".local" / "share" / "ganglion"


def make_private_folder(path: Path) -> Path:
    """Make `path` with mode 0700, or check that it is no looser; raises PermissionDenied naming the chmod."""
    path.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    _refuse_looser(path, FOLDER_MODE)
    return path


def write_secret(path: Path, content: bytes) -> None:
    """Replace `path` by `content` with mode 0600: whole or not at all, also after a crash."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, SECRET_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_secret(path: Path) -> bytes:
    """The content of a file that nobody else may read; raises PermissionDenied naming the chmod, FileNotFoundError."""
    _refuse_looser(path, SECRET_MODE)
    return path.read_bytes()


def _refuse_looser(path: Path, mode: int) -> None:
    found = stat.S_IMODE(path.stat().st_mode)
    if found & ~mode & 0o077:
        raise PermissionDenied(f"{path} is open to others (mode {found:04o}); run: chmod {mode:o} {path}")


class Home:
    """The folder of one node: made when missing, refused when others can read it."""

    def __init__(self, path: Path) -> None:
        self.path = make_private_folder(Path(path))

    @property
    def identity(self) -> Path:
        """Keys, certificate and signed record."""
        return make_private_folder(self.path / "identity")

    @property
    def store(self) -> Path:
        """Pieces."""
        return make_private_folder(self.path / "store")

    @property
    def run(self) -> Path:
        """What lives only while a process runs."""
        return make_private_folder(self.path / "run")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this home for one process; raises Conflict naming the process that has it."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise Conflict(
                    f"{self.path} is in use by process {holder}; stop it, or choose another folder with --home"
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)
