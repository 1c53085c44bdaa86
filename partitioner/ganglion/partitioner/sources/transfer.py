"""One file of a repository into one file here: in ranges, continued after a break, never longer than it should be."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Final

import httpx

from ganglion.partitioner.sources.hub import Hub, HubFile, bodies
from ganglion.wire.errors import Corrupt, ProtocolViolation, Unavailable, Unreachable

TRIES: Final = 5  # without a new byte
RANGE_BYTES: Final = 16 << 30  # of one request: content networks serve no more than 50 GB at once
_HASH_BYTES: Final = 8 << 20
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

Advance = Callable[[int], None]
"""Bytes of the file that are here now."""


class StoppedError(Exception):
    """The transfer was asked to end; what came is kept."""


def transfer(
    hub: Hub, url: str, file: HubFile, partial: Path, *, what: str, stop: threading.Event, advance: Advance
) -> None:
    """Bring `file` to the path `partial`, going on from what lies there; its digest is checked, the path stays.

    Raises Unreachable or Unavailable (what came is kept, and named), ProtocolViolation (more bytes or other ranges than
    asked for), Corrupt (another digest; what came is removed), OSError of the disk.
    """
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "rb+", buffering=0) as opened:
        received = _Received(opened, file)
        resumed = received.count > 0
        while True:
            _fill(hub, url, received, what=what, stop=stop, advance=advance)
            if received.is_whole():
                return
            received.restart()
            if not resumed:
                partial.unlink(missing_ok=True)
                raise Corrupt(f"{what}: {file.size} bytes came whose digest is not {file.digest[:12]}; try again")
            resumed = False  # bytes of an earlier transfer may have spoiled it: once more from the beginning


class _Received:
    """The bytes here so far, and their digest."""

    def __init__(self, opened: FileIO, file: HubFile) -> None:
        self.file = file
        self.count = 0
        self._opened = opened
        self._digest = self._fresh()
        while block := opened.read(_HASH_BYTES):
            self._digest.update(block)
            self.count += len(block)
        if self.count > file.size:
            self.restart()

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._opened.write(rest) :]
        self._digest.update(data)
        self.count += len(data)

    def restart(self) -> None:
        self._opened.seek(0)
        self._opened.truncate()
        self._digest = self._fresh()
        self.count = 0

    def is_whole(self) -> bool:
        return self.count == self.file.size and self._digest.hexdigest() == self.file.digest

    def _fresh(self) -> Any:
        if self.file.is_large:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)  # what git names a blob


def _fill(hub: Hub, url: str, received: _Received, *, what: str, stop: threading.Event, advance: Advance) -> None:
    tries = 0
    while received.count < received.file.size:
        before = received.count
        try:
            _range(hub, url, received, what=what, stop=stop, advance=advance)
            failed: Exception | None = None
        except httpx.TransportError as error:
            failed = error
        except Unavailable as error:  # Unreachable is one too
            if hub.offline:
                raise
            failed = error
        if received.count == received.file.size:
            return
        tries = 0 if received.count > before else tries + 1
        if tries >= TRIES:
            kept = f"{received.count} of {received.file.size} bytes are here, the same command goes on from there"
            raise Unreachable(f"{what}: the transfer broke {TRIES} times ({failed or 'it ended early'}); {kept}")
        if tries and stop.wait(hub.pause_s * 2 ** (tries - 1)):
            raise StoppedError
    advance(received.count)


def _range(hub: Hub, url: str, received: _Received, *, what: str, stop: threading.Event, advance: Advance) -> None:
    start, stop_at = received.count, min(received.file.size, received.count + RANGE_BYTES)
    with hub.get(url, what, {"range": f"bytes={start}-{stop_at - 1}"}) as answer:
        if answer.status_code == 206:
            _check_range(answer.headers.get("content-range", ""), start, stop_at, received.file.size, what)
        else:  # the server knows no ranges: this is the file from its beginning
            if start:
                received.restart()
            stop_at = received.file.size
        for chunk in bodies(answer, stop_at - received.count, what):
            if stop.is_set():
                raise StoppedError
            received.write(chunk)
            advance(received.count)


def _check_range(told: str, start: int, stop: int, size: int, what: str) -> None:
    match = _CONTENT_RANGE.fullmatch(told)
    if match is None or (int(match[1]), match[3]) not in ((start, str(size)), (start, "*")) or int(match[2]) >= stop:
        raise ProtocolViolation(
            f"{what}: bytes {start} to {stop - 1} of {size} were asked for and {told[:60]!r} came; the repository's"
            " metadata says otherwise"
        )
