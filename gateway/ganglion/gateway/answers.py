"""OpenAI's response objects for chats and completions, whole and in chunks."""

from __future__ import annotations

import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ganglion.gateway.generation import Ended
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.gateway.transcript import Placed

Json = dict[str, Any]


def fingerprint(numeric_class: str) -> str:
    """`system_fingerprint`: the digest of what the tokens depend on."""
    return "fp_" + hashlib.sha256(numeric_class.encode()).hexdigest()[:16]


def usage(end: Ended) -> Json:
    """Tokens in and out."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


@dataclass
class Writer(ABC):
    """What both kinds of answers share. `logprobs`: -1 none, else how many alternatives."""

    model: str
    tokenizer: ModelTokenizer
    logprobs: int
    include_usage: bool = False
    prefix: str = ""
    whole: str = ""
    chunk: str = ""
    fingerprint: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    identifier: str = ""

    def __post_init__(self) -> None:
        self.identifier = f"{self.prefix}-{secrets.token_hex(12)}"

    def _base(self, kind: str) -> Json:
        return {
            "id": self.identifier,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choice: Json) -> Json:
        chunk = self._base(self.chunk) | {"choices": [{"index": 0, **choice}]}
        return chunk | {"usage": None} if self.include_usage else chunk

    def usage_chunk(self, end: Ended) -> Json:
        """The last chunk of a stream whose client asked for it."""
        return self._base(self.chunk) | {"choices": [], "usage": usage(end)}

    def first(self) -> list[Json]:
        """Chunks before any text."""
        return []

    @abstractmethod
    def delta(self, text: str, tokens: Sequence[Placed]) -> Json:
        """A chunk with text."""

    @abstractmethod
    def last(self, end: Ended) -> Json:
        """The chunk with the finish reason."""

    @abstractmethod
    def complete(self, text: str, tokens: Sequence[Placed], end: Ended) -> Json:
        """The whole answer."""


@dataclass
class ChatWriter(Writer):
    """chat.completion and chat.completion.chunk."""

    prefix: str = "chatcmpl"
    whole: str = "chat.completion"
    chunk: str = "chat.completion.chunk"

    def first(self) -> list[Json]:
        """The role comes before any text."""
        return [self._choice({"role": "assistant", "content": ""}, None, None)]

    def delta(self, text: str, tokens: Sequence[Placed]) -> Json:
        """A chunk with text."""
        return self._choice({"content": text}, self._logprobs(tokens), None)

    def last(self, end: Ended) -> Json:
        """The chunk with the finish reason."""
        return self._choice({}, None, end.reason)

    def complete(self, text: str, tokens: Sequence[Placed], end: Ended) -> Json:
        """The whole answer."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": end.reason,
        }
        return self._base(self.whole) | {"choices": [choice], "usage": usage(end)}

    def _choice(self, delta: Json, logprobs: Json | None, reason: str | None) -> Json:
        return self._chunk({"delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _logprobs(self, tokens: Sequence[Placed]) -> Json | None:
        if self.logprobs < 0:
            return None
        return {"content": [self._entry(placed) for placed in tokens], "refusal": None}

    def _entry(self, placed: Placed) -> Json:
        drawn = placed.drawn
        top = [self._token(other.token, other.logprob) for other in drawn.top[: self.logprobs]]
        return {**self._token(drawn.token, drawn.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> Json:
        content = self.tokenizer.token_bytes(token)
        return {
            "token": content.decode("utf-8", "replace"),
            "logprob": _finite(logprob),
            "bytes": list(content),
        }


@dataclass
class CompletionWriter(Writer):
    """text_completion; a chunk has the same object name. `text_offset` counts from the beginning of the answer."""

    prefix: str = "cmpl"
    whole: str = "text_completion"
    chunk: str = "text_completion"

    def delta(self, text: str, tokens: Sequence[Placed]) -> Json:
        """A chunk with text."""
        return self._chunk({"text": text, "logprobs": self._logprobs(tokens), "finish_reason": None})

    def last(self, end: Ended) -> Json:
        """The chunk with the finish reason."""
        return self._chunk({"text": "", "logprobs": None, "finish_reason": end.reason})

    def complete(self, text: str, tokens: Sequence[Placed], end: Ended) -> Json:
        """The whole answer."""
        choice = {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": end.reason}
        return self._base(self.whole) | {"choices": [choice], "usage": usage(end)}

    def _logprobs(self, tokens: Sequence[Placed]) -> Json | None:
        if self.logprobs < 0:
            return None
        name = self.tokenizer.token_text
        return {
            "tokens": [name(placed.drawn.token) for placed in tokens],
            "token_logprobs": [_finite(placed.drawn.logprob) for placed in tokens],
            "top_logprobs": [self._top(placed, name) for placed in tokens] if self.logprobs else None,
            "text_offset": [placed.offset for placed in tokens],
        }

    def _top(self, placed: Placed, name: Callable[[int], str]) -> dict[str, float]:
        # By rising probability, so that of two tokens with one spelling the likelier stays.
        found = {name(other.token): _finite(other.logprob) for other in reversed(placed.drawn.top[: self.logprobs])}
        found.setdefault(name(placed.drawn.token), _finite(placed.drawn.logprob))
        return found


def _finite(logprob: float | None) -> float:
    # JSON has no infinity; OpenAI writes -9999 for what is practically impossible.
    return -9999.0 if logprob is None else max(logprob, -9999.0)
