"""Local drafters of a lead: they propose the tokens of the next window, for all sessions that decode at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from ganglion.agent.speculation.branching import Branch
from ganglion.agent.speculation.engine import Ask, DraftEngine
from ganglion.agent.speculation.window import PassCost
from ganglion.wire.sampling.parameters import Sampling


@dataclass(frozen=True, slots=True)
class Propose:
    """At most `most` tokens are wanted to follow `ids`, all of a session's tokens up to now, `prompt` of them given.

    beside: how many second guesses are wanted too, of a drafter that has some.
    """

    session: int
    ids: Sequence[int]
    most: int
    sampling: Sampling
    prompt: int | None = None
    beside: int = 0


class Drafter(Protocol):
    """What a lead drafts with; one thread uses it."""

    name: str

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        """Tokens for each ask, at most its `most`, none where there is no guess; each session at most once."""
        ...

    def close(self, session: int) -> None:
        """The session is over, or put back: what is kept of it is dropped. One that was never seen is no error."""
        ...

    def token_s(self, batch: int) -> float:
        """Seconds that one more token for each of `batch` sessions takes, as measured up to now."""
        ...


@runtime_checkable
class Branching(Protocol):
    """A drafter that knows where it was least certain."""

    def beside(self, session: int) -> Sequence[Branch]:
        """Second guesses beside the tokens that were proposed last, where it was least certain first."""
        ...


class ModelDrafter:
    """Drafts with a model, one slot a session; as many passes as the longest window, all sessions in each.

    A session keeps its slot until it is closed; beyond `DraftEngine.slots` sessions nothing is proposed.
    """

    def __init__(self, engine: DraftEngine, first_s: float = 0.002, row_s: float = 0.0002) -> None:
        """first_s, row_s: what a pass of one row and each further one take, until that is measured."""
        self.name = engine.name
        self._engine = engine
        self._slots: dict[int, int] = {}
        self._free = list(reversed(range(engine.slots)))
        self._cost = PassCost(first_s, row_s)
        self._beside: dict[int, list[Branch]] = {}

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        """Tokens as the drafter draws them; the one that would end an answer is the last."""
        found = [list[int]() for _ in asks]
        texts = [list(ask.ids) for ask in asks]
        seconds = [list[tuple[float, Branch]]() for _ in asks]
        going = [number for number, ask in enumerate(asks) if ask.most > 0 and self._slot(ask.session) is not None]
        while going:
            step = [
                Ask(
                    self._slots[asks[one].session],
                    texts[one],
                    asks[one].sampling,
                    top=2 if asks[one].beside else 1,
                    prompt=asks[one].prompt,
                )
                for one in going
            ]
            before = time.perf_counter()
            guesses = self._engine.step(step)
            if self._engine.ran_rows:
                self._cost.measured(self._engine.ran_rows, time.perf_counter() - before)
            left = []
            for one, guess in zip(going, guesses, strict=True):
                if not guess.tokens:
                    continue
                token = guess.tokens[0]
                if len(guess.tokens) > 1:
                    second = Branch(len(found[one]), guess.tokens[1:])
                    seconds[one].append((guess.scores[0] - guess.scores[1], second))
                found[one].append(token)
                texts[one].append(token)
                if len(found[one]) < asks[one].most and token not in self._engine.eos_ids:
                    left.append(one)
            going = left
        for ask, closest in zip(asks, seconds, strict=True):
            closest.sort(key=lambda pair: pair[0])
            self._beside[ask.session] = [branch for _, branch in closest[: ask.beside]]
        return found

    def beside(self, session: int) -> Sequence[Branch]:
        """Where the second guess was closest to the first, as many as were asked for."""
        return self._beside.get(session, ())

    def close(self, session: int) -> None:
        """Free the session's slot."""
        self._beside.pop(session, None)
        slot = self._slots.pop(session, None)
        if slot is not None:
            self._engine.forget(slot)
            self._free.append(slot)

    def token_s(self, batch: int) -> float:
        """Seconds of a pass of `batch` rows."""
        return self._cost.seconds(batch)

    def _slot(self, session: int) -> int | None:
        if session not in self._slots and self._free:
            self._slots[session] = self._free.pop()
        return self._slots.get(session)


_LONGEST: Final = 3


class NGram:
    """Prompt lookup: what followed the last occurrence of the longest suffix of 3 to 1 tokens. No model.

    A session's ids only grow, and what is new of them is indexed when it is asked again.
    """

    name = "ngram"

    def __init__(self) -> None:
        self._sessions: dict[int, _Index] = {}

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        """Tokens copied from prompt and answer; a copy that reaches the end goes on with itself."""
        found = []
        for ask in asks:
            index = self._sessions.get(ask.session)
            if index is None or not index.goes_with(ask.ids):
                index = self._sessions[ask.session] = _Index()
            index.grow(ask.ids)
            found.append(index.follow(ask.ids, ask.most))
        return found

    def close(self, session: int) -> None:
        """Drop the session's index."""
        self._sessions.pop(session, None)

    def token_s(self, batch: int) -> float:
        """Nothing that is worth counting: a look-up takes microseconds."""
        del batch
        return 0.0


class _Index:
    """Where runs of 1 to 3 tokens have last ended, not counting the end of the text itself.

    Invariant: `_after` has every run that ends before position `_known`, by the position of what followed it.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        self._known = 0
        self._last = -1

    def goes_with(self, ids: Sequence[int]) -> bool:
        """Whether `ids` can be what was indexed, and more."""
        return len(ids) >= self._known and (not self._known or ids[self._known - 1] == self._last)

    def grow(self, ids: Sequence[int]) -> None:
        for end in range(max(1, self._known), len(ids)):
            for length in range(1, min(_LONGEST, end) + 1):
                self._after[tuple(ids[end - length : end])] = end
        self._known = len(ids)
        self._last = ids[-1] if ids else -1

    def follow(self, ids: Sequence[int], most: int) -> list[int]:
        for length in range(min(_LONGEST, len(ids)), 0, -1):
            start = self._after.get(tuple(ids[len(ids) - length :]))
            if start is not None:
                found: list[int] = []
                for at in range(start, start + most):
                    found.append(ids[at] if at < len(ids) else found[at - len(ids)])
                return found
        return []
