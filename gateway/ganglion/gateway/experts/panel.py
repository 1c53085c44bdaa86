"""Pure core of one request to several experts: what happens to their answers in, what to do next out.

    best     the heaviest expert answers, as it speaks; one that fails before its first text is followed by the next
    vote     all answer, or `n` answers are spread over them; the text that most of the weight stands behind is kept
    rerank   likewise; the answer with the best score is kept (`scoring.py`)

A decision falls as soon as what is missing cannot change it, and once the latency budget is used up among the answers
that there are. An expert that fails, is silent too long or talks nonsense
is dropped with a reason, and the others answer. Time is a parameter, in seconds of any clock that only goes forward.
Invariants: exactly one Finish or Fail, nothing after it; whoever was asked has by then ended, failed or been cancelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from ganglion.gateway.experts.deadlines import Patience
from ganglion.gateway.experts.scoring import LEAST, Answered, reranked, score, voted
from ganglion.gateway.experts.table import Combining

NONSENSE: Final = "nonsense"  # beside the codes of the error tree: an answer that cannot be read
LATE: Final = "unavailable"
WIDTH: Final = 4  # answers of one request that an expert makes at once: it runs them in one batch
_LOGPROB_ROUNDING: Final = 1e-3


@dataclass(frozen=True)
class Member:
    """An expert that may be asked. weight: of the gate, over all members together 1. queue: answers ahead.

    foreign: somebody else's server, whose empty answer counts against it.
    """

    name: str
    weight: float
    quality: float
    patience: Patience
    queue: int = 0
    foreign: bool = False


@dataclass(frozen=True)
class Ask:
    """Put the request to an expert, as its attempt number `attempt`, drawn with `seed`."""

    attempt: int
    expert: str
    seed: int


@dataclass(frozen=True)
class Cancel:
    """Its answer is not needed any more."""

    attempt: int


@dataclass(frozen=True)
class Emit:
    """Text for the client."""

    attempt: int
    text: str


@dataclass(frozen=True)
class Finish:
    """The answer is that of `attempt`, and whole. reason: OpenAI's finish_reason."""

    attempt: int
    reason: str


@dataclass(frozen=True)
class Fault:
    """Why an expert was dropped: a code of the error tree or NONSENSE, and one line."""

    code: str
    why: str


@dataclass(frozen=True)
class Fail:
    """There is no answer; `faults`: of every expert that was asked, the last one last."""

    faults: tuple[Fault, ...]


Command = Ask | Cancel | Emit | Finish | Fail


class Stand(StrEnum):
    """How far an attempt has come; EMPTY: it ended without text."""

    RUNNING = "running"
    ENDED = "ended"
    EMPTY = "empty"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class Attempt:
    """One answer of one expert as far as it has come. Times in the clock of the panel; first_s: of its first token."""

    number: int
    member: Member
    asked_s: float
    stand: Stand = Stand.RUNNING
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int = 0
    parts: list[str] = field(default_factory=list)
    reason: str = ""
    late_s: float | None = None  # when it was cut short for being late
    logprob: float = 0.0
    logprobs: int = 0
    fault: Fault | None = None

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.parts)

    @property
    def mean_logprob(self) -> float | None:
        """Of its tokens; None where none were given."""
        return self.logprob / self.logprobs if self.logprobs else None

    @property
    def due_s(self) -> float:
        """When it is given up."""
        patience = self.member.patience
        return self.asked_s + (patience.first_s if self.first_s is None else patience.whole_s)

    @property
    def answered(self) -> Answered:
        """As `scoring` takes it."""
        member = self.member
        return Answered(self.number, self.text, member.weight, member.quality, self.mean_logprob)

    @property
    def score(self) -> float:
        """As `scoring` has it."""
        return score(self.member.weight, self.member.quality, self.mean_logprob)


class Panel:
    """The experts of one request.

    n: answers, with the seeds seed, seed + 1, …; None: one of each expert, all with `seed`. stream: text goes out as it
    comes (best only). due_s: when an answer is due, in the clock of the panel (vote and rerank). enough: rerank ends at
    the first answer this likely (mean log-probability); None: it does not. members: at least one.
    """

    def __init__(
        self,
        members: Sequence[Member],
        how: Combining,
        *,
        seed: int = 0,
        n: int | None = None,
        stream: bool = False,
        due_s: float = math.inf,
        enough: float | None = None,
    ) -> None:
        self._members = sorted(members, key=lambda one: (-one.weight, one.queue, one.patience.first_s, one.name))
        self._how = how
        self._seed = seed
        self._n = n if how != "best" else None
        self._stream = stream and how == "best"
        self._due_s = math.inf if how == "best" else due_s
        self._enough = enough if how == "rerank" else None
        self._spoken = False
        self.attempts: list[Attempt] = []
        self.dropped: dict[str, Fault] = {}
        self.kept: Attempt | None = None
        self.over = False

    @property
    def wake_s(self) -> float:
        """When `clock` is wanted at the latest; infinite while nothing runs."""
        due_s = self._due_s if self.answers else math.inf
        return min((min(one.due_s, due_s) for one in self._running), default=math.inf)

    @property
    def asked(self) -> list[str]:
        """Names of the experts that were asked, in order."""
        return list(dict.fromkeys(one.member.name for one in self.attempts))

    @property
    def answers(self) -> list[Attempt]:
        """Whole answers with text."""
        return [one for one in self.attempts if one.stand is Stand.ENDED]

    @property
    def _running(self) -> list[Attempt]:
        return [one for one in self.attempts if one.stand is Stand.RUNNING]

    def start(self, now_s: float) -> list[Command]:
        """Begin."""
        return self._ask(now_s)

    def said(self, attempt: int, text: str, tokens: int, logprobs: Sequence[float], now_s: float) -> list[Command]:
        """More of an answer; `tokens` that came with it, natural log-probabilities of those that have one."""
        one = self._open(attempt)
        if one is None:
            return []
        if any(not -math.inf <= value <= _LOGPROB_ROUNDING for value in logprobs):  # also true of NaN
            return self._drop(one, Fault(NONSENSE, "a log-probability of its answer is none"), now_s)
        if (tokens or text) and one.first_s is None:
            one.first_s = now_s
        one.last_s = now_s
        one.tokens += tokens
        one.logprob += math.fsum(max(value, math.log(LEAST)) for value in logprobs)
        one.logprobs += len(logprobs)
        if not text:
            return []
        one.parts.append(text)
        if not self._stream:
            return []
        self._spoken = True
        return [Emit(attempt, text)]

    def ended(self, attempt: int, reason: str, tokens: int, now_s: float) -> list[Command]:
        """An answer is whole, of so many tokens."""
        one = self._open(attempt)
        if one is None:
            return []
        one.reason, one.tokens, one.last_s = reason, tokens, now_s
        if not one.text.strip():
            one.stand = Stand.EMPTY
            one.fault = Fault(NONSENSE, "it said nothing")
            self.dropped.setdefault(one.member.name, one.fault)
        else:
            one.stand = Stand.ENDED
        return self._go_on(now_s)

    def failed(self, attempt: int, fault: Fault, now_s: float) -> list[Command]:
        """An answer will not come."""
        one = self._open(attempt)
        return [] if one is None else self._drop(one, fault, now_s, cancel=False)

    def clock(self, now_s: float) -> list[Command]:
        """Time has passed: whoever is silent too long is dropped, and an answer that is due is chosen."""
        commands: list[Command] = []
        if not self.over and self.answers and now_s >= self._due_s:
            return self._choose_now(now_s)
        for one in self._running:
            if self.over or one.stand is not Stand.RUNNING or now_s < one.due_s:
                continue
            patience = one.member.patience
            why = (
                f"no first token within {patience.first_s:.3g} s"
                if one.first_s is None
                else f"no whole answer within {patience.whole_s:.3g} s"
            )
            commands += self._drop(one, Fault(LATE, why), now_s)
        return commands

    def _open(self, attempt: int) -> Attempt | None:
        """The attempt, if anything about it still counts."""
        one = self.attempts[attempt]
        return one if not self.over and one.stand is Stand.RUNNING else None

    def _drop(self, one: Attempt, fault: Fault, now_s: float, *, cancel: bool = True) -> list[Command]:
        one.stand, one.fault = Stand.FAILED, fault
        self.dropped[one.member.name] = fault
        return [*([Cancel(one.number)] if cancel else []), *self._go_on(now_s)]

    def _go_on(self, now_s: float) -> list[Command]:
        if self._spoken and not self.answers:  # of a stream, what was said cannot be taken back
            return self._end(None)
        return self._decide() or self._ask(now_s)

    # --- whom to ask

    def _ask(self, now_s: float) -> list[Command]:
        commands: list[Command] = []
        for member in self._next():
            number = len(self.attempts)
            seed = self._seed if self._n is None else self._seed + number
            self.attempts.append(Attempt(number, member, now_s, last_s=now_s))
            commands.append(Ask(number, member.name, seed))
        return commands

    def _next(self) -> Iterator[Member]:
        """Members to ask now; read while attempts are added."""
        if self._how == "best":
            fresh = (one for one in self._members if one.name not in self.dropped)
            if not self._running and (member := next(fresh, None)) is not None:
                yield member
        elif self._n is None:
            if not self.attempts:
                yield from self._members
        else:
            while len(self.attempts) < self._n and (member := self._idlest()) is not None:
                yield member

    def _idlest(self) -> Member | None:
        busy: dict[str, int] = {}
        for one in self._running:
            busy[one.member.name] = busy.get(one.member.name, 0) + 1
        free = [one for one in self._live if busy.get(one.name, 0) < WIDTH]
        return min(free, key=lambda one: one.queue + busy.get(one.name, 0), default=None)  # the heaviest of equals

    @property
    def _live(self) -> list[Member]:
        return [one for one in self._members if one.name not in self.dropped]

    # --- what to keep

    def _decide(self) -> list[Command]:
        answers = [one.answered for one in self.answers]
        missing = self._missing()
        if self._how == "best":
            kept, decided = (answers[0], True) if answers else (None, False)
        elif self._how == "vote":
            kept, decided = voted(answers, missing)
        else:
            kept = reranked(answers)
            decided = kept is not None and self._is_best(kept, missing)
        if not decided and missing:
            return []
        return self._end(None if kept is None else self.attempts[kept.attempt])

    def _choose_now(self, now_s: float) -> list[Command]:
        """Among the answers that there are; who has not answered was late."""
        answers = [one.answered for one in self.answers]
        kept = voted(answers)[0] if self._how == "vote" else reranked(answers)
        for one in self._running:
            one.late_s = now_s
            one.fault = Fault(LATE, "its answer was not whole when one was due")
            self.dropped[one.member.name] = one.fault
        return self._end(None if kept is None else self.attempts[kept.attempt])

    def _missing(self) -> list[float]:
        """Weights of the answers that may still come, at most."""
        weights = [one.member.weight for one in self._running]
        if self._how == "best":
            return [*weights, *(one.weight for one in self._live)]
        if self._n is not None and self._live:
            weights += [self._live[0].weight] * (self._n - len(self.attempts))
        return weights

    def _is_best(self, kept: Answered, missing: Sequence[float]) -> bool:
        if self._enough is not None and kept.mean_logprob is not None and kept.mean_logprob >= self._enough:
            return True
        return score(kept.weight, kept.quality, kept.mean_logprob) > score(max(missing, default=0.0), 1.0, None)

    def _end(self, kept: Attempt | None) -> list[Command]:
        if kept is None and not self._spoken:  # an expert may have nothing to say, if all the others agree
            kept = next((one for one in self.attempts if one.stand is Stand.EMPTY), None)
        self.over, self.kept = True, kept
        commands: list[Command] = []
        for one in self._running:
            one.stand = Stand.CANCELLED
            commands.append(Cancel(one.number))
        if kept is None:
            return [*commands, Fail(tuple(self.dropped.values()))]
        if not self._stream and kept.text:
            commands.append(Emit(kept.number, kept.text))
        return [*commands, Finish(kept.number, kept.reason)]
