"""OpenAI's response objects for chats and completions, whole and in chunks."""

from __future__ import annotations

import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from ganglion.gateway.callparser import Arguments, CallParser, Content, Event, Started
from ganglion.gateway.generation import Ended
from ganglion.gateway.tokenizing import ModelTokenizer
from ganglion.gateway.transcript import Delta, Placed
from ganglion.proto.lane_pb2 import Speculation, Timings

Json = dict[str, Any]


def fingerprint(numeric_class: str) -> str | None:
    """`system_fingerprint`: the digest of what the tokens depend on; None where that is not known."""
    if not numeric_class:  # an HTTP verifier's
        return None
    return "fp_" + hashlib.sha256(numeric_class.encode()).hexdigest()[:16]


def usage(ends: Sequence[Ended]) -> Json:
    """Tokens in and out of every choice together; the prompt counts once, as cached what no choice ran again."""
    prompt = max((end.prompt_tokens for end in ends), default=0)
    completion = sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": min((end.cached_tokens for end in ends), default=0)},
    }


def timings(ends: Sequence[Ended]) -> Json:
    """The lead's account by the names of `Timings`, seconds and bytes, of every choice together."""
    found = [end.timings for end in ends if end.timings is not None]
    return {each.name: sum(getattr(one, each.name) for one in found) for each in Timings.DESCRIPTOR.fields}


def marks(ends: Sequence[Ended]) -> Json:
    """`ganglion`: what a device drew alone, how was drafted, which edge experts answered; {} where nothing was."""
    local = sum(end.local_tokens for end in ends)
    found = speculation(ends)
    experts = next((dict(end.experts) for end in ends if end.experts), None)
    if not local and not found and experts is None:
        return {}
    account: Json = {"local_tokens": local, **({"speculation": found} if found else {})}
    return {"ganglion": account if experts is None else account | {"experts": experts}}


def speculation(ends: Sequence[Ended]) -> Json:
    """How was drafted, by the names of `Speculation`, of every choice together; {} where nothing was."""
    found = [end.speculation for end in ends if end.speculation is not None]
    if not found:
        return {}
    whole: Json = {
        each.name: sum(getattr(one, each.name) for one in found)
        for each in Speculation.DESCRIPTOR.fields
        if each.name not in {"accepted_counts", "mode"}
    }
    columns = zip_longest(*(one.accepted_counts for one in found), fillvalue=0)
    modes = list(dict.fromkeys(one.mode for one in found if one.mode))
    return whole | {"accepted_counts": [sum(column) for column in columns], "mode": ", ".join(modes)}


@dataclass
class Answer:
    """One choice as far as it has come."""

    parts: list[str] = field(default_factory=list)
    tokens: list[Placed] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    end: Ended | None = None

    def add(self, delta: Delta) -> None:
        """Take more of it."""
        self.parts.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.ids.extend(delta.ids)

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.parts)

    @property
    def reason(self) -> str:
        """Why it ended."""
        return self.end.reason if self.end is not None else ""


@dataclass
class Writer(ABC):
    """What both kinds of answers share. `logprobs`: -1 none, else how many alternatives.

    `tokenizer`: None of several models, whose tokens are not one another's: without log-probabilities then.
    `token_ids`: of the answer are wanted; `timings`: the lead's account is wanted beside the usage. `local_class`: the
    numeric class of what a device draws alone.
    """

    model: str
    tokenizer: ModelTokenizer | None
    logprobs: int
    include_usage: bool = False
    token_ids: bool = False
    timings: bool = False
    prefix: str = ""
    whole: str = ""
    chunk: str = ""
    fingerprint: str | None = None
    local_class: str = ""
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

    def _chunk(self, index: int, choice: Json, more: Json | None = None) -> Json:
        chunk = self._base(self.chunk) | {"choices": [{"index": index, **choice}]} | (more or {})
        return chunk | {"usage": None} if self.include_usage else chunk

    def usage_chunk(self, ends: Sequence[Ended]) -> Json:
        """The last chunk of a stream whose client asked for it."""
        return self._base(self.chunk) | {"choices": [], "usage": usage(ends), **self._account(ends)}

    @abstractmethod
    def first(self, count: int) -> Iterable[Json]:
        """Chunks before the text of any of `count` choices."""

    @abstractmethod
    def delta(self, index: int, delta: Delta) -> Iterable[Json]:
        """Chunks with more of a choice."""

    @abstractmethod
    def last(self, index: int, end: Ended) -> Iterable[Json]:
        """Chunks with what was held of a choice, and its finish reason."""

    def complete(self, answers: Sequence[Answer]) -> Json:
        """The whole response."""
        choices = [{"index": index, **self._choice(answer)} for index, answer in enumerate(answers)]
        ends = [answer.end for answer in answers if answer.end is not None]
        self.drawn(ends)
        return self._base(self.whole) | {"choices": choices, "usage": usage(ends), **self._account(ends)}

    def drawn(self, ends: Sequence[Ended]) -> None:
        """The fingerprint is of the device's own model where that drew every token."""
        if self.local_class and ends and all(0 < end.completion_tokens == end.local_tokens for end in ends):
            self.fingerprint = fingerprint(self.local_class)

    def _account(self, ends: Sequence[Ended]) -> Json:
        account = marks(ends)
        if self.timings:
            account["timings"] = timings(ends) | ({"speculation": found} if (found := speculation(ends)) else {})
        return account

    @abstractmethod
    def _choice(self, answer: Answer) -> Json:
        """One choice of the whole response."""


@dataclass
class ChatWriter(Writer):
    """chat.completion and chat.completion.chunk; `parser` makes what finds calls of tools in an answer's text."""

    prefix: str = "chatcmpl"
    whole: str = "chat.completion"
    chunk: str = "chat.completion.chunk"
    parser: Callable[[], CallParser] | None = None
    _parsers: dict[int, CallParser] = field(default_factory=dict)

    def first(self, count: int) -> Iterable[Json]:
        """The role comes before any text."""
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(count)]

    def delta(self, index: int, delta: Delta) -> Iterable[Json]:
        """Text, and calls: first the id and the name, then pieces of the arguments."""
        events: Sequence[Event] = [Content(delta.text)]
        if self.parser is not None:
            if index not in self._parsers:
                self._parsers[index] = self.parser()
            events = self._parsers[index].push(delta.text)
        fields = [_fields(event) for event in events]
        logprobs, more = self._logprobs(delta.tokens), _local(delta)
        if not fields and logprobs is not None:
            fields = [{}]  # the text is held, its tokens are not
        for at, field_ in enumerate(fields):
            yield self._delta(index, field_, logprobs if at == 0 else None, more=more)

    def last(self, index: int, end: Ended) -> Iterable[Json]:
        """What the parser held, then the finish reason."""
        parser = self._parsers.get(index)
        for event in parser.finish() if parser is not None else ():
            yield self._delta(index, _fields(event))
        reason = _reason(end.reason, 0 if parser is None else parser.calls)
        yield self._delta(index, {}, reason=reason, more=marks([end]))

    def _choice(self, answer: Answer) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        calls: list[Json] = []
        if self.parser is not None:
            parser = self.parser()
            events = [*parser.push(answer.text), *parser.finish()]
            content = "".join(event.text for event in events if isinstance(event, Content))
            calls = [_call(event, events) for event in events if isinstance(event, Started)]
            message["content"] = content if content.strip() or not calls else None
            if calls:
                message["tool_calls"] = calls
        return {
            "message": message,
            "logprobs": self._logprobs(answer.tokens),
            "finish_reason": _reason(answer.reason, len(calls)),
        }

    def _delta(
        self,
        index: int,
        delta: Json,
        logprobs: Json | None = None,
        reason: str | None = None,
        more: Json | None = None,
    ) -> Json:
        return self._chunk(index, {"delta": delta, "logprobs": logprobs, "finish_reason": reason}, more)

    def _logprobs(self, tokens: Sequence[Placed]) -> Json | None:
        if self.logprobs < 0 or self.tokenizer is None:
            return None
        spell = self.tokenizer.token_bytes
        return {"content": [self._entry(placed, spell) for placed in tokens], "refusal": None}

    def _entry(self, placed: Placed, spell: Callable[[int], bytes]) -> Json:
        drawn = placed.drawn
        top = [_token(spell(other.token), other.logprob) for other in drawn.top[: self.logprobs]]
        return {**_token(spell(drawn.token), drawn.logprob), "top_logprobs": top}


def _token(content: bytes, logprob: float | None) -> Json:
    return {"token": content.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(content)}


def _local(delta: Delta) -> Json:
    return {"ganglion": {"local": True}} if delta.local else {}


def _fields(event: Event) -> Json:
    """An event as a chunk's delta."""
    match event:
        case Content(text):
            return {"content": text}
        case Started(index, identifier, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": identifier, "type": "function", "function": function}]}
        case Arguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _call(started: Started, events: Sequence[Event]) -> Json:
    pieces = (event.text for event in events if isinstance(event, Arguments) and event.index == started.index)
    function = {"name": started.name, "arguments": "".join(pieces)}
    return {"id": started.id, "type": "function", "function": function}


def _reason(reason: str, calls: int) -> str:
    return "tool_calls" if calls and reason == "stop" else reason


@dataclass
class CompletionWriter(Writer):
    """text_completion; a chunk has the same object name. `text_offset` counts from the beginning of the answer.

    `echo`: the prompt's text, which comes before every choice.
    """

    prefix: str = "cmpl"
    whole: str = "text_completion"
    chunk: str = "text_completion"
    echo: str = ""

    def first(self, count: int) -> Iterable[Json]:
        """The prompt, when it is echoed."""
        return [self._text(index, self.echo) for index in range(count)] if self.echo else []

    def delta(self, index: int, delta: Delta) -> Iterable[Json]:
        """A chunk with text."""
        return [self._text(index, delta.text, self._logprobs(delta.tokens), ids=delta.ids, more=_local(delta))]

    def last(self, index: int, end: Ended) -> Iterable[Json]:
        """The chunk with the finish reason."""
        return [self._text(index, "", reason=end.reason, more=marks([end]))]

    def _choice(self, answer: Answer) -> Json:
        logprobs = self._logprobs(answer.tokens)
        choice = {"text": self.echo + answer.text, "logprobs": logprobs, "finish_reason": answer.reason}
        return choice | self._ids(answer.ids)

    def _ids(self, ids: Sequence[int]) -> Json:
        return {"token_ids": list(ids)} if self.token_ids else {}

    def _text(
        self,
        index: int,
        text: str,
        logprobs: Json | None = None,
        *,
        reason: str | None = None,
        ids: Sequence[int] = (),
        more: Json | None = None,
    ) -> Json:
        choice = {"text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk(index, choice | self._ids(ids), more)

    def _logprobs(self, tokens: Sequence[Placed]) -> Json | None:
        if self.logprobs < 0 or self.tokenizer is None:
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
