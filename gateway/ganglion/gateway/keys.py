"""API keys: made once, shown once, kept as hashes. A key has 256 random bits, so a plain SHA-256 keeps it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ganglion.wire.errors import Conflict, Corrupt, InvalidRequest, NotFound
from ganglion.wire.home import SECRET_MODE, Home, read_secret, write_secret
from ganglion.wire.limits import NAME_PATTERN

KEYS_FILE = "keys.json"
PREFIX = "gk-"
SHOWN_CHARACTERS = 8
TENANT_CHARACTERS = 32


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key as it is kept: `digest` is the SHA-256 in hexadecimal, `shown` its first characters, for people."""

    name: str
    digest: str
    shown: str
    created_unix_s: int


class _Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()


def create_key(home: Home, name: str) -> str:
    """Make a key called `name` and return it: it cannot be shown again. Raises InvalidRequest or Conflict."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidRequest(f"key name {name[:64]!r}: use 1 to 63 of a-z, 0-9 and -, beginning with a letter or digit")
    key = PREFIX + secrets.token_urlsafe(32)
    with _exclusive(home):
        kept = list_keys(home)
        if any(other.name == name for other in kept):
            raise Conflict(f"there is already a key called {name}; choose another name or revoke it first")
        made = Key(name, _digest(key), key[: len(PREFIX) + SHOWN_CHARACTERS], int(time.time()))
        _write(home, (*kept, made))
    return key


def list_keys(home: Home) -> tuple[Key, ...]:
    """Every key, oldest first; raises Corrupt or PermissionDenied naming the file."""
    path = _path(home)
    try:
        return msgspec.json.decode(read_secret(path), type=_Keys).keys
    except FileNotFoundError:
        return ()
    except msgspec.DecodeError as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error


def revoke_key(home: Home, name: str) -> None:
    """Forget the key called `name`; a running gateway refuses it from its next request on. Raises NotFound."""
    with _exclusive(home):
        kept = list_keys(home)
        left = tuple(key for key in kept if key.name != name)
        if len(left) == len(kept):
            names = ", ".join(key.name for key in kept) or "none"
            raise NotFound(f"there is no key called {name}; there are: {names}")
        _write(home, left)


class KeyRing:
    """The keys that a running gateway accepts; read again when the file changes."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._seen: tuple[int, int, int] | None = None
        self._digests: tuple[str, ...] = ()

    def accepts(self, key: str) -> bool:
        """Whether `key` is in force; every kept key is compared, in constant time."""
        given = _digest(key)
        results = [hmac.compare_digest(given, digest) for digest in self._current()]
        return any(results)

    def _current(self) -> tuple[str, ...]:
        try:
            found = _path(self._home).stat()
        except FileNotFoundError:
            return ()
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if seen != self._seen:
            self._digests = tuple(key.digest for key in list_keys(self._home))
            self._seen = seen
        return self._digests


def tenant_of(key: str) -> str:
    """What a lead knows a key's holder by: of this very key, which cannot be found from it, nor used as one."""
    return hashlib.sha256(b"tenant " + key.encode("utf-8", "surrogatepass")).hexdigest()[:TENANT_CHARACTERS]


def _path(home: Home) -> Path:
    return home.path / KEYS_FILE


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _write(home: Home, keys: tuple[Key, ...]) -> None:
    write_secret(_path(home), msgspec.json.encode(_Keys(keys)))


@contextlib.contextmanager
def _exclusive(home: Home) -> Iterator[None]:
    """Two commands at once must not lose a key; the home's own lock is the running gateway's."""
    descriptor = os.open(home.path / "keys.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, SECRET_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
