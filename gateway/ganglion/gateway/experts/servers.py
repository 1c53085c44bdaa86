"""Other people's servers to which this gateway may send text: their URLs and keys, in the gateway's own home.

The coordinator says which experts there are; where text goes it does not say. A server is asked only under the URL that
the owner of this home gave here, with the key that stands beside it, whatever URL the coordinator has: so that can lead
neither text to a place of its choosing nor a key to another server.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ganglion.gateway.experts.table import NAME
from ganglion.wire.errors import Corrupt, InvalidRequest, NotFound
from ganglion.wire.home import SECRET_MODE, Home, make_private_folder, read_secret, write_secret

FILE = "servers.json"
URL_CHARACTERS = 2048
KEY_CHARACTERS = 4096


@dataclass(frozen=True)
class Server:
    """One server. url: "http(s)://host[:port][/path]", before "/chat/completions". own: labelled `owner` here."""

    name: str
    url: str
    key: str | None = None
    own: bool = False


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    url: str
    key: str | None = None
    own: bool = False


def allow_server(
    home: Home, name: str, *, url: str | None = None, key: str | None = None, own: bool | None = None
) -> Server:
    """Let the gateway of `home` send text to the server `name`; what is not given stays as it was.

    Under another URL a key that was kept before is forgotten: it was for that server. Raises InvalidRequest.
    """
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name[:64]!r} is no expert's name: use 1 to 63 of a-z, 0-9, '.', '_' and '-'", param="name"
        )
    if key is not None and not (
        0 < len(key) <= KEY_CHARACTERS and key.isascii() and key.isprintable() and " " not in key
    ):
        raise InvalidRequest("the key is empty, too long, or has characters that no HTTP header carries", param="key")
    with _exclusive(home):
        kept = _load(_path(home))
        before = kept.get(name)
        if url is None and before is None:
            raise InvalidRequest(
                f"this gateway does not know {name}; say with --url where its text and key may go", param="url"
            )
        where = before.url if url is None and before is not None else canonical_url(url or "")
        same = before is not None and before.url == where
        made = _Kept(
            url=where,
            key=key if key is not None else before.key if same and before is not None else None,
            own=own if own is not None else before.own if same and before is not None else False,
        )
        _write(home, kept | {name: made})
    return Server(name, made.url, made.key, made.own)


def forget_server(home: Home, name: str) -> None:
    """No text goes to the server any more, from the next request on, and its key is gone. Raises NotFound."""
    with _exclusive(home):
        kept = _load(_path(home))
        if name not in kept:
            raise NotFound(f"this gateway knows no server {name}; there are: {', '.join(sorted(kept)) or 'none'}")
        _write(home, {other: one for other, one in kept.items() if other != name})


def list_servers(home: Home) -> tuple[Server, ...]:
    """Every server that may be asked, by name; raises Corrupt or PermissionDenied naming the file."""
    return tuple(Server(name, one.url, one.key, one.own) for name, one in sorted(_load(_path(home)).items()))


class Servers:
    """What a running gateway goes by; read again when the file changes."""

    def __init__(self, home: Home) -> None:
        self._path = _path(home)
        self._seen: tuple[int, int, int] | None = None
        self._servers: dict[str, Server] = {}

    def get(self, name: str) -> Server | None:
        """The server, if text may go to it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        seen = (found.st_mtime_ns, found.st_ino, found.st_size)
        if seen != self._seen:
            self._servers = {key: Server(key, one.url, one.key, one.own) for key, one in _load(self._path).items()}
            self._seen = seen
        return self._servers.get(name)


def canonical_url(url: str) -> str:
    """The URL without its last slash, host in small letters; raises InvalidRequest for what is no server's."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if (
        len(url) > URL_CHARACTERS
        or not (url.isascii() and url.isprintable())
        or parts.scheme not in {"http", "https"}
        or not host
        or parts.username is not None
        or parts.query
        or parts.fragment
    ):
        raise InvalidRequest(
            "a server's URL has the form http(s)://host[:port][/path], for example http://127.0.0.1:11434/v1",
            param="url",
        )
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def _path(home: Home) -> Path:
    return make_private_folder(home.path / "experts") / FILE


def _load(path: Path) -> dict[str, _Kept]:
    try:
        return msgspec.json.decode(read_secret(path), type=dict[str, _Kept])
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise Corrupt(f"{path} cannot be read: {error}") from error


def _write(home: Home, kept: dict[str, _Kept]) -> None:
    write_secret(_path(home), msgspec.json.encode(kept))


@contextlib.contextmanager
def _exclusive(home: Home) -> Iterator[None]:
    """Two commands at once must not lose an entry."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(_path(home).with_name("servers.lock"), flags, SECRET_MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
