"""What a client gets of the tokens that a lead sends: text cut at stop strings, and log-probabilities beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ganglion.gateway.detokenizing import Detokenizer
from ganglion.gateway.stopping import StopMatcher


@dataclass(frozen=True)
class Alternative:
    """One token with its log-probability (natural, of the raw distribution)."""

    token: int
    logprob: float


@dataclass(frozen=True)
class Drawn:
    """One token as the lead sent it; `logprob` is None when none were asked for; `top` by falling log-probability."""

    token: int
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Placed:
    """A token and where its text begins, in characters of the answer."""

    drawn: Drawn
    offset: int


@dataclass(frozen=True)
class Delta:
    """Text and tokens that are now certain; `ids`: of what was drawn, whether or not its text is certain yet.

    local: drawn by a device's own model while the one that was asked was away.
    """

    text: str
    tokens: tuple[Placed, ...]
    ids: tuple[int, ...] = ()
    local: bool = False


class Transcript:
    """Pure core of one answer: drawn tokens in, certain text out.

    `shown`: special tokens, which decoding leaves out, whose text is wanted all the same.
    Invariant: a token is given out with the delta in which its text begins, and never when its text begins at or
    after the cut.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        stop_ids: Sequence[int],
        shown: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops)
        self._stop_ids = frozenset(stop_ids)
        self._shown = shown or {}
        self._decoded = 0  # characters out of the detokenizer
        self._given = 0  # characters given out
        self._waiting: list[Placed] = []
        self.tokens = 0  # drawn, stop ids included

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed: no more tokens are wanted."""
        return self._matcher.stopped

    def push(self, drawn: Drawn) -> Delta:
        """Take one token; what comes after a completed stop string is ignored."""
        if self.stopped:
            return Delta("", ())
        self.tokens += 1
        if drawn.token in self._stop_ids:
            return Delta("", ())
        text = self._shown.get(drawn.token)
        if text is not None:  # what was unfinished before it stays so
            before = self._release(self._detokenizer.finish())
            if self.stopped:
                return before
            self._waiting.append(Placed(drawn, self._decoded))
            after = self._release(text)
            return Delta(before.text + after.text, before.tokens + after.tokens)
        self._waiting.append(Placed(drawn, self._decoded))
        return self._release(self._detokenizer.push(drawn.token))

    def finish(self) -> Delta:
        """No more tokens: give out everything that was held."""
        if self.stopped:
            return Delta("", ())
        delta = self._release(self._detokenizer.finish())
        if self.stopped:
            return delta
        rest = self._matcher.finish()
        self._given += len(rest)
        waiting, self._waiting = self._waiting, []
        return Delta(delta.text + rest, delta.tokens + tuple(waiting))

    def _release(self, text: str) -> Delta:
        self._decoded += len(text)
        certain = self._matcher.push(text)
        self._given += len(certain)
        ready = 0
        while ready < len(self._waiting) and self._waiting[ready].offset < self._given:
            ready += 1
        tokens, self._waiting = tuple(self._waiting[:ready]), self._waiting[ready:]
        return Delta(certain, tokens)
