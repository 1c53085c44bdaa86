"""An answer's text, as it comes, taken apart into content and calls of tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from ganglion.gateway.calls import CallFormat

HEAD_CHARACTERS = 256  # of the text between a marker and the arguments; what is longer is no call

_HEAD = re.compile(
    r'\s*(?P<list>\[)?\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class Content:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class Started:
    """A call of `name`, the `index`-th of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More text of the arguments of call `index`."""

    index: int
    text: str


Event = Content | Started | Arguments


class CallParser:
    """Pure core: pieces of text in, events out; what is not a call of `names` in its format comes out as content.

    Invariant: nothing is given out twice, and text is held only while it can still become a part of a call.
    """

    def __init__(self, how: CallFormat, names: Collection[str]) -> None:
        self._how = how
        self._names = frozenset(names)
        self._held = ""
        self._raw = ""  # taken since the content ended: it is content again if no call follows
        self._step: Callable[[], bool] = self._first if how.bare else self._content
        self._events: list[Event] = []
        self._depth = 0
        self._quoted = self._escaped = False
        self.calls = 0

    def push(self, text: str) -> list[Event]:
        """Take more text."""
        self._held += text
        while self._held and self._step():
            pass
        return self._taken()

    def finish(self) -> list[Event]:
        """The text has ended: what was held is content, but for the space around calls."""
        if self._step in {self._first, self._content, self._header}:
            self._give(self._raw + self._held)
        elif self._step == self._between:
            self._give(self._held.strip())
        self._held = self._raw = ""
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _give(self, text: str) -> None:
        if text:
            self._events.append(Content(text))

    # Steps: each returns whether another one can go on with what is held.

    def _first(self) -> bool:
        """The beginning of an answer that may be a call without a marker."""
        held = self._held.lstrip()
        if not held:
            return False
        self._step = self._header if held[0] == "{" else self._content
        return True

    def _content(self) -> bool:
        marker = self._how.marker
        at = self._held.find(marker)
        if at >= 0:
            self._give(self._held[:at])
            self._raw, self._held = marker, self._held[at + len(marker) :]
            self._step = self._header
            return True
        keep = next((n for n in range(len(marker) - 1, 0, -1) if self._held.endswith(marker[:n])), 0)
        self._give(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _header(self) -> bool:
        found = _HEAD.match(self._held)
        if found is None:
            return len(self._held) > HEAD_CHARACTERS and self._no_call()
        if found["name"] not in self._names:
            return self._no_call()
        self._events.append(Started(self.calls, self._how.new_id(), found["name"]))
        self.calls += 1
        self._held, self._raw = self._held[found.end() :], ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self._step = self._arguments
        return True

    def _no_call(self) -> bool:
        self._give(self._raw)
        self._raw = ""
        self._step = self._content
        return True

    def _arguments(self) -> bool:
        for at, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._events.append(Arguments(self.calls - 1, self._held[: at + 1]))
                    self._held = self._held[at + 1 :]
                    self._step = self._brace
                    return True
        self._events.append(Arguments(self.calls - 1, self._held))
        self._held = ""
        return False

    def _brace(self) -> bool:
        return self._expect("}", self._separator)

    def _separator(self) -> bool:
        if not self._how.listed:
            return self._expect(self._how.closing, self._between)
        held = self._held.lstrip()
        if held.startswith(","):
            self._held, self._step = held[1:], self._header
            return True
        return self._expect("]", self._list_end)

    def _list_end(self) -> bool:
        return self._expect(self._how.closing, self._between)

    def _between(self) -> bool:
        """After a call: another one, or the end; space between them is nobody's."""
        held, marker = self._held.lstrip(), self._how.marker
        if not held or (marker.startswith(held) and held != marker):
            return False
        self._held, self._step = held, self._content
        return True

    def _expect(self, literal: str, then: Callable[[], bool]) -> bool:
        held = self._held.lstrip()
        if held.startswith(literal):
            self._held = held[len(literal) :]
            self._step = then
            return True
        if literal.startswith(held):
            return False
        self._step = self._content
        return True
