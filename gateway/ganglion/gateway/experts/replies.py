"""Pure: what an OpenAI-compatible server says, read with bounds. What does not parse is nonsense.

Fields that this gateway does not use are not looked at; of those that it does, types and ranges are checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

LINE_BYTES: Final = 1 << 20  # of one event
BODY_BYTES: Final = 64 << 20  # of one answer
DONE: Final = b"[DONE]"


class NonsenseError(Exception):
    """What cannot be read; the text says what was wrong with it, and holds nothing of it."""


@dataclass(frozen=True)
class Piece:
    """More of an answer: text, log-probabilities of its tokens where they are given, and why it ended if it has."""

    text: str = ""
    logprobs: tuple[float, ...] = ()
    reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Entry(msgspec.Struct, frozen=True):
    logprob: float


class _Logprobs(msgspec.Struct, frozen=True):
    content: list[_Entry] | None = None  # of a chat
    token_logprobs: list[float | None] | None = None  # of a completion


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    delta: _Message | None = None
    message: _Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Reply(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


def read_piece(content: bytes) -> Piece:
    """One event, or a whole answer that is not streamed. Raises NonsenseError."""
    try:
        content.decode("utf-8")
        reply = msgspec.json.decode(content, type=_Reply)
    except UnicodeDecodeError:
        raise NonsenseError("its answer is not UTF-8") from None
    except (msgspec.DecodeError, RecursionError):
        raise NonsenseError("its answer is not JSON of the shape that OpenAI defines") from None
    if bytes(reply.error).strip() != b"null":
        raise NonsenseError("it sent an error in place of an answer")
    usage = reply.usage or _Usage()
    counts = (_count(usage.prompt_tokens), _count(usage.completion_tokens))
    choice = next((one for one in reply.choices if one.index == 0), None)
    if choice is None:
        if reply.usage is None and reply.choices:
            raise NonsenseError("it sent another choice than the one that was asked for")
        return Piece(prompt_tokens=counts[0], completion_tokens=counts[1])
    message = choice.delta or choice.message
    text = (message.content if message is not None else choice.text) or ""
    if "\0" in text:
        raise NonsenseError("its answer holds the character NUL")
    return Piece(text, _logprobs(choice.logprobs), choice.finish_reason or "", *counts)


def _logprobs(said: _Logprobs | None) -> tuple[float, ...]:
    if said is None:
        return ()
    if said.content is not None:
        return tuple(entry.logprob for entry in said.content)
    return tuple(value for value in said.token_logprobs or () if value is not None)


def _count(value: int | None) -> int | None:
    if value is not None and not 0 <= value <= 1 << 31:
        raise NonsenseError("it counts tokens that cannot be")
    return value


class Events:
    """Splits a stream of server-sent events into their data. Invariant: at most LINE_BYTES wait."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._bytes = 0
        self.done = False

    def push(self, content: bytes) -> list[bytes]:
        """Data of the events that are now whole; after [DONE] there are none. Raises NonsenseError."""
        self._bytes += len(content)
        if self._bytes > BODY_BYTES:
            raise NonsenseError(f"its answer is longer than {BODY_BYTES} bytes")
        found: list[bytes] = []
        *lines, self._rest = (self._rest + content).split(b"\n")
        for line in lines:
            self._take(line.rstrip(b"\r"), found)
        if len(self._rest) + sum(map(len, self._data)) > LINE_BYTES:
            raise NonsenseError(f"an event of its answer is longer than {LINE_BYTES} bytes")
        return found

    def finish(self) -> list[bytes]:
        """No more comes: what a last line without its end holds."""
        found: list[bytes] = []
        self._take(self._rest.rstrip(b"\r"), found)
        self._take(b"", found)
        self._rest = b""
        return found

    def _take(self, line: bytes, found: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            data, self._data = b"\n".join(self._data), []
            if data.strip() == DONE:
                self.done = True
            elif not self.done:
                found.append(data)
