"""OpenAI's old way, by text: `echo` and `logprobs` say of every token of a prompt which would have been likeliest.

Prompts are text, so the server's tokens may be others than ours: its echo is compared with the ids, token by token.
Tokens come back as text as well; where a text is that of several tokens (parts of a character, special ones) the
likeliest one is not known by it, and what cannot be known is left out.

llama-cpp-python has habits of its own. A token that begins a text is missing from the lists. Where a prompt begins with
none, each row says what follows its token, not what the token was drawn from: token i stands with row i of the logits.
A character of several tokens is drawn whole, however few tokens were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ganglion.agent.speculation.http.checking import Ask, Choice, Differs, field, number, only_choice
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.wire.errors import ProtocolViolation

PATH: Final = "/completions"
CHARACTER_BYTES: Final = 4
_TIE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Habits:
    """How a server lists what it echoes. bos_id: what it begins a text with, and leaves out of its lists, if anything.

    begins: it puts that before a text itself. shifted: without it, row i says what follows token i.
    """

    bos_id: int | None = None
    begins: bool = False
    shifted: bool = False


@dataclass(frozen=True, slots=True)
class Echo:
    """A dialect (`checking.Dialect`)."""

    model: str
    texts: TokenTexts
    habits: Habits
    window_tokens: int
    context: int
    title: str = "echo and logprobs, by text"
    top: int = 0

    @property
    def vocab(self) -> int:
        """Ids are below it."""
        return self.texts.vocab

    def usable(self, ids: Sequence[int], window: Sequence[int]) -> int:
        """As the protocol says: as far as it is whole characters, and without the token that the lists leave out."""
        most = min(len(window), self.window_tokens)
        if self.habits.bos_id in window[:most]:
            most = list(window[:most]).index(self.habits.bos_id or 0)
        while most and self.texts.text(window[:most]) is None:
            most -= 1
        return most

    def ask(self, ids: Sequence[int], window: Sequence[int], *, top: int, more: int = 1) -> Ask:
        """As the protocol says."""
        return self.asking(self._shown([*ids, *window]), more)

    def asking(self, text: str, more: int = 1) -> Ask:
        """The request about a text as it is."""
        document = {
            "model": self.model,
            "prompt": text,
            "max_tokens": more,
            "temperature": 0,
            "logprobs": 2,
            "echo": True,
            "repeat_penalty": 1.0,  # llama-cpp-python's own default is 1.1
        }
        return Ask(PATH, document)

    def read(
        self, reply: Any, ids: Sequence[int], window: Sequence[int], *, top: int, tail: Sequence[int] = ()
    ) -> list[Choice]:
        """As the protocol says; empty where it cannot be known which token the first choice is.

        tail: what the server is known to draw after `ids`, told apart where texts are not.
        """
        echoed = _Echoed.of(reply, self._shown([*ids, *window]))
        ours = [*ids, *window]
        listed = [at for at, token in enumerate(ours) if token != self.habits.bos_id]
        end = self._agreed(echoed, ours, listed, len(ids))
        shift = 1 if self.habits.shifted and ours[0] != self.habits.bos_id else 0
        places = [*listed, *range(len(ours), len(ours) + echoed.drawn)]
        rows = {place + shift: row for place, row in zip(places, echoed.rows, strict=False)}
        known = [*window, *tail]
        stop = end + 1 if end < len(ours) else len(ours) + echoed.drawn
        found: list[Choice] = []
        for at in range(len(ids), stop):
            likely = known[at - len(ids)] if at - len(ids) < len(known) else None
            choice = self._choice(rows.get(at), likely, exact=not shift and at < len(ours))
            if choice is None:
                break
            found.append(choice)
        return found if end < len(ours) else self._with_drawn(found, echoed, len(window))

    def _shown(self, ids: Sequence[int]) -> str:
        """The text of a prompt, without what the server puts before it. Raises Differs where there is none."""
        habits = self.habits
        if habits.begins and ids[0] != habits.bos_id:
            raise Differs(0, "the beginning of a text", self.texts.label(ids[0]))
        text = self.texts.text(ids[1:] if habits.begins else ids)
        if text is None:
            raise Differs(len(ids), "no text", "a part of a character", passing=True)
        return text

    def _agreed(self, echoed: _Echoed, ours: Sequence[int], listed: Sequence[int], committed: int) -> int:
        """How many of our tokens the server has too; raises Differs where it is not even `committed`."""
        for label, at in zip(echoed.labels, listed, strict=False):
            if not self.texts.shows(ours[at], label, first=at == listed[0]):
                if at < committed:
                    raise Differs(at, label, self.texts.label(ours[at]))
                return at
        if echoed.prompt_tokens != len(ours):
            raise Differs(0, f"a text of {echoed.prompt_tokens} tokens", f"one of {len(ours)}")
        if len(echoed.labels) < len(listed):
            raise ProtocolViolation(f"the server echoed {len(echoed.labels)} of {len(listed)} tokens")
        return len(ours)

    def _choice(self, row: Any, likely: int | None, *, exact: bool) -> Choice | None:
        """The likeliest token of a row; None where its text does not say which. likely: what it probably is.

        exact: the value beside the text of `likely` is its own log-probability.
        """
        if not isinstance(row, dict):
            return None
        ranked = sorted(((number(value, "logprob"), label) for label, value in row.items()), reverse=True)
        if not ranked:
            return None
        logprob, label = ranked[0]
        margin = logprob - ranked[1][0] if len(ranked) > 1 else math.inf
        # A row names tokens by their texts, and of two with one text the last one counts: it may hide a likelier one,
        # which then has to fit into what is left of the probability.
        hides = any(self.texts.only(other) is None for _, other in ranked)
        left = 1.0 - sum(math.exp(value) for value, _ in ranked)
        if hides and math.exp(logprob) <= left + _TIE:
            return None
        level = [self.texts.only(other) for value, other in ranked if value == logprob]
        if None not in level:
            return Choice(min(token for token in level if token is not None), logprob, margin)
        told = exact and likely is not None and len(level) == 1 and self.texts.shows(likely, label, first=False)
        return Choice(likely, logprob, margin) if told else None

    def _with_drawn(self, found: list[Choice], echoed: _Echoed, window: int) -> list[Choice]:
        """Choices up to the end of the window, made whole by what the server says that it drew after it."""
        if len(found) < window:
            return found
        known = found[window:]
        if not echoed.drawn:
            if not echoed.ended:
                raise ProtocolViolation("the server drew no token after the prompt")
            return [*found[:window], Choice(None)]
        if len(known) < echoed.drawn <= CHARACTER_BYTES:
            ids = self.texts.spelled(echoed.text, echoed.drawn)
            known = known if ids is None else [Choice(token) for token in ids]
        elif len(known) == echoed.drawn and all(one.margin > _TIE for one in known):
            spelled = "".join(self.texts.label(one.token) for one in known if one.token is not None)
            if echoed.text.lstrip() != spelled.lstrip():
                raise ProtocolViolation(
                    f"the server drew {echoed.text[:40]!r} where its log-probabilities say {spelled[:40]!r}: it adds a"
                    " penalty or a sampler of its own, or its rows are of other tokens"
                )
        if len(known) == echoed.drawn and echoed.ended:
            known = [*known, Choice(None)]
        return found[:window] + known


@dataclass(frozen=True, slots=True)
class _Echoed:
    """A reply: tokens as text with the likeliest tokens of their rows, then what was drawn."""

    labels: list[Any]
    rows: list[Any]
    prompt_tokens: int
    drawn: int
    text: str  # of what was drawn
    ended: bool

    @classmethod
    def of(cls, reply: Any, shown: str) -> _Echoed:
        choice = only_choice(reply)
        logprobs = field(choice, "logprobs", dict)
        labels, rows = field(logprobs, "tokens", list), field(logprobs, "top_logprobs", list)
        if len(labels) != len(rows) or not all(isinstance(label, str) for label in labels):
            raise ProtocolViolation(f"the server listed {len(labels)} tokens and {len(rows)} rows of top_logprobs")
        usage = field(reply, "usage", dict)
        prompt, drawn = field(usage, "prompt_tokens", int), field(usage, "completion_tokens", int)
        text = field(choice, "text", str)
        if not text.startswith(shown):
            raise ProtocolViolation("the server's answer does not begin with the prompt, as `echo` has it")
        return cls(labels, rows, prompt, drawn, text[len(shown) :], choice.get("finish_reason") == "stop")
