"""The log of outcomes: what was asked, what experts answered and which answer was kept, for training the gate.

It holds text, so it is written only where the owner of the gateway's home has said so (`ganglion experts log on`), not
for private requests, and it stays in that home: JSON lines in `experts/outcomes.jsonl`, mode 0600. At
PART_BYTES the file becomes `outcomes.1.jsonl` in the place of the one before, so the two hold at most twice that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from ganglion.wire.home import SECRET_MODE, Home, make_private_folder, read_secret, write_secret

PART_BYTES: Final = 32 << 20
LINE_BYTES: Final = 256 << 10  # what is longer is not kept
_FLAG: Final = "log.on"
_NOW: Final = "outcomes.jsonl"
_BEFORE: Final = "outcomes.1.jsonl"


class Answer(msgspec.Struct, frozen=True):
    """What one expert answered; score: `scoring.score`. Of several answers of one expert each is one.

    mean_logprob: of its tokens, by its own expert; None where none were given.
    """

    expert: str
    text: str
    score: float
    mean_logprob: float | None = None


class Outcome(msgspec.Struct, frozen=True, rename={"request_class": "class"}):
    """One request. time: Unix seconds. prompt: as the gate was given it. chosen: the index of the kept answer."""

    time: float
    request_class: str
    combine: str
    prompt: str
    answers: tuple[Answer, ...]
    chosen: int


def set_logging(home: Home, wanted: bool) -> None:
    """Consent, or take it back; what was written stays until `clear_outcomes`. A running gateway follows at once."""
    flag = _folder(home) / _FLAG
    if wanted:
        write_secret(flag, b"")
    else:
        flag.unlink(missing_ok=True)


def is_logging(home: Home) -> bool:
    """Whether outcomes are kept."""
    return (_folder(home) / _FLAG).exists()


def clear_outcomes(home: Home) -> int:
    """Forget every outcome; the bytes that went."""
    gone = 0
    for name in (_BEFORE, _NOW):
        path = _folder(home) / name
        if path.exists():
            gone += path.stat().st_size
            path.unlink()
    return gone


def read_outcomes(home: Home) -> Iterator[Outcome]:
    """Every outcome, oldest first; a line that a crash has torn is left out. Raises PermissionDenied."""
    decoder = msgspec.json.Decoder(Outcome)
    for name in (_BEFORE, _NOW):
        try:
            content = read_secret(_folder(home) / name)
        except FileNotFoundError:
            continue
        for line in content.splitlines():
            try:
                found = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if 0 <= found.chosen < len(found.answers):
                yield found


class OutcomeLog:
    """What a running gateway writes by."""

    def __init__(self, home: Home, part_bytes: int = PART_BYTES) -> None:
        self._home = home
        self._part_bytes = part_bytes

    def write(self, outcome: Outcome) -> bool:
        """Append an outcome, if outcomes are kept. Blocks on the disk."""
        if not is_logging(self._home):
            return False
        line = msgspec.json.encode(outcome) + b"\n"
        if len(line) > LINE_BYTES:
            return False
        path = _folder(self._home) / _NOW
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, SECRET_MODE)
        try:
            os.write(descriptor, line)
            full = os.fstat(descriptor).st_size >= self._part_bytes
        finally:
            os.close(descriptor)
        if full:
            path.replace(path.with_name(_BEFORE))
        return True


def _folder(home: Home) -> Path:
    return make_private_folder(home.path / "experts")
