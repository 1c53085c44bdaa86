"""What a dialect is: how a server is asked what it would draw after a prompt and after each drafted token. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ganglion.wire.errors import ProtocolViolation, Unsupported


@dataclass(frozen=True, slots=True)
class Choice:
    """What the server draws at one position: the likeliest token, of equals the one with the lowest id.

    token: None where the server ends its answer here. logprob: None where it is not told. margin: from it to the next
    one's, infinite where that is not known. top: the likeliest by falling log-probability, as many as were asked for.
    """

    token: int | None
    logprob: float | None = None
    margin: float = math.inf
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """What to send: POST `path` with `document`; `root`: beside the API's folder "/v1"."""

    path: str
    document: Mapping[str, Any]
    root: bool = False


class Differs(Exception):  # noqa: N818 - a finding, no failure
    """The server makes other tokens of the text: from position `at` on it has `theirs` where the ids say `ours`.

    passing: it is so only as long as the ids end within a character.
    """

    def __init__(self, at: int, theirs: str, ours: str, *, passing: bool = False) -> None:
        super().__init__(f"token {at} is {ours!r} here and {theirs!r} at the server")
        self.at = at
        self.passing = passing
        self.theirs = theirs
        self.ours = ours


class Dialect(Protocol):
    """One way to ask. `title` names it to people. `window_tokens`: drafted tokens of one request at most.

    `context`: tokens that the server holds, 0: it does not say. `top`: likeliest tokens that it can name at most.
    `vocab`: ids are below it.
    """

    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def window_tokens(self) -> int: ...  # noqa: D102
    @property
    def context(self) -> int: ...  # noqa: D102
    @property
    def top(self) -> int: ...  # noqa: D102
    @property
    def vocab(self) -> int: ...  # noqa: D102

    def usable(self, ids: Sequence[int], window: Sequence[int]) -> int:
        """How many tokens of the window can be verified in one request, from its beginning."""
        ...

    def ask(self, ids: Sequence[int], window: Sequence[int], *, top: int, more: int = 1) -> Ask:
        """The request that verifies `window` after `ids` and goes on for `more` tokens. Raises Differs: no text."""
        ...

    def read(self, reply: Any, ids: Sequence[int], window: Sequence[int], *, top: int) -> list[Choice]:
        """The choice after `ids`, then after each token of the window, then those that it went on with.

        Fewer, perhaps none, where it cannot be known what the later ones are. Raises Differs where the tokens of `ids`
        are others at the server, ProtocolViolation for a reply that is none.
        """
        ...


def likeliest(found: Mapping[int, float], top: int) -> Choice:
    """The choice among tokens with their log-probabilities; raises ProtocolViolation where there are none."""
    ranked = sorted(found.items(), key=lambda one: (-one[1], one[0]))
    if not ranked:
        raise ProtocolViolation("the server gave no log-probabilities for a position")
    (token, logprob), *others = ranked
    return Choice(token, logprob, logprob - others[0][1] if others else math.inf, tuple(ranked[:top]))


def number(value: Any, what: str) -> float:
    """A log-probability of a reply; raises ProtocolViolation. Minus infinity is one, which some write as null."""
    if value is None:
        return -math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or value > 1e-3:
        raise ProtocolViolation(f"the server's {what} is {str(value)[:40]!r}, no log-probability")
    return float(value)


def known(token: int, vocab: int) -> int:
    """A token id of a reply; raises Unsupported for one that the vocabulary does not have."""
    if not 0 <= token < vocab:
        raise Unsupported(
            f"the server speaks of token {token} and the drafter's vocabulary has {vocab}; verify on a server of the"
            " same model",
            param="contract.vocab",
        )
    return token


def field(value: Any, name: str, kind: Any) -> Any:
    """`value[name]` of `kind`; raises ProtocolViolation."""
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        raise ProtocolViolation(
            f"the server's answer has no {name} ({getattr(kind, '__name__', kind)}): {str(found)[:80]!r}"
        )
    return found


def only_choice(reply: Any) -> Any:
    """choices[0] of an OpenAI completion; raises ProtocolViolation."""
    choices = field(reply, "choices", list)
    if not choices or not isinstance(choices[0], dict):
        raise ProtocolViolation("the server's answer has no choices")
    return choices[0]
