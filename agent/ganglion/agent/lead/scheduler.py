"""What runs next: a pure core that takes open, drawn and close, and returns steps.

A session waits in the queue, is admitted (at most `sessions` at a time; each may hold `context` tokens of key-value
state, which is what the plan reserved), has its prompt run in chunks, and then runs one row for every token drawn.
Decoding rows come first, so a long prompt delays nobody by more than a chunk; what is left of the chunk goes to prompts
in order of arrival. Where the class mixes formats a step has rows of one role, and steps of both roles take turns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ganglion.agent.roles import Role
from ganglion.wire.errors import Exhausted, Internal
from ganglion.wire.limits import SESSIONS_QUEUED


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows of one session: positions start..start+count-1; `draws` when a token is drawn from the last one."""

    session: int
    start: int
    count: int
    draws: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model. `closed`: sessions whose key-value state is dropped before; `role`: of its rows."""

    number: int
    entries: tuple[Entry, ...]
    closed: tuple[int, ...]
    role: Role = "any"

    @property
    def rows(self) -> int:
        """Rows of all entries."""
        return sum(entry.count for entry in self.entries)


@dataclass(slots=True)
class _Run:
    """Invariant: held <= known; the next token is drawn when held reaches known. `prompt`: what it began with."""

    known: int
    prompt: int
    held: int = 0


class Scheduler:
    """Steps for the sessions of one deployment; `chunk` rows of a step at most, `sessions` admitted at a time.

    mixed: whether the class mixes formats by role.
    """

    def __init__(self, *, chunk: int, sessions: int, mixed: bool = False) -> None:
        self._role: Role = "generated" if mixed else "any"  # of the last step
        self._chunk = chunk
        self._sessions = sessions
        self._queue: deque[tuple[int, int]] = deque()
        self._active: dict[int, _Run] = {}
        self._closed: list[int] = []
        self._steps = 0

    @property
    def active(self) -> frozenset[int]:
        """Sessions that were admitted and not closed."""
        return frozenset(self._active)

    @property
    def queued(self) -> int:
        """Sessions that wait."""
        return len(self._queue)

    def open(self, session: int, prompt_tokens: int) -> None:
        """Queue a session with at least one prompt token; raises Exhausted when the queue is full."""
        if len(self._active) + len(self._queue) >= self._sessions + SESSIONS_QUEUED:
            raise Exhausted(
                f"{len(self._active)} sessions run and {len(self._queue)} wait, at most {SESSIONS_QUEUED} may;"
                " try later, or deploy with more --sessions"
            )
        self._queue.append((session, prompt_tokens))

    def drawn(self, session: int) -> None:
        """A token was drawn for a session that goes on: it is the next row to run."""
        run = self._active[session]
        if run.held != run.known:
            raise Internal(f"session {session}: a token was drawn at {run.held} of {run.known} tokens")
        run.known += 1

    def close(self, session: int) -> None:
        """A session has ended or was cancelled; closing what is closed already does nothing."""
        if self._active.pop(session, None) is not None:
            self._closed.append(session)
        else:
            self._queue = deque(waiting for waiting in self._queue if waiting[0] != session)

    def next_step(self) -> Step | None:
        """The next step, counted as done; without entries when there are only sessions to close; None when idle."""
        while self._queue and len(self._active) < self._sessions:
            session, prompt_tokens = self._queue.popleft()
            self._active[session] = _Run(prompt_tokens, prompt_tokens)
        self._role = self._next_role()
        room = self._chunk
        entries = []
        # Decoding sessions first; sorted() is stable, so both kinds stay in order of admission.
        waiting = [(session, run) for session, run in self._active.items() if self._ready(run, self._role)]
        for session, run in sorted(waiting, key=lambda pair: pair[1].known - pair[1].held > 1):
            count = min((run.prompt if self._role == "prompt" else run.known) - run.held, room)
            if count == 0:
                break
            entries.append(Entry(session, run.held, count, run.held + count == run.known))
            run.held += count
            room -= count
        if not entries and not self._closed:
            return None
        for entry in entries:
            if entry.draws:  # to the end of the line, so that more sessions than rows take turns
                self._active[entry.session] = self._active.pop(entry.session)
        self._steps += 1
        closed, self._closed = tuple(self._closed), []
        return Step(self._steps, tuple(entries), closed, self._role)

    def _next_role(self) -> Role:
        """The role that had no turn in the last step, if any rows of it wait, so that neither starves."""
        if self._role == "any":
            return "any"
        turns: tuple[Role, Role] = ("prompt", "generated") if self._role == "generated" else ("generated", "prompt")
        for role in turns:
            if any(self._ready(run, role) for run in self._active.values()):
                return role
        return self._role

    @staticmethod
    def _ready(run: _Run, role: Role) -> bool:
        """Whether rows of a session wait, the next of them of this role."""
        return run.held < run.known and (role == "any" or (run.held < run.prompt) == (role == "prompt"))
