"""What runs next: a pure core that takes open, drawn and close, and returns steps.

A session waits in the queue, is admitted, has its prompt run in chunks, and then runs one row for every token drawn.
Key-value state is lent as sessions grow: where a running one needs more than is left, the session that was admitted
last gives its state up and waits again, first in line; its tokens are run anew when there is room. Decoding rows come
first in a step; what is left goes to prompts, those first whose client was served longest ago. So a long prompt delays
nobody by more than the rows that a step takes beside decoding ones, and no client keeps others waiting. Where the class
mixes formats a step has rows of one role, and steps of both roles take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ganglion.agent.roles import Role
from ganglion.wire.errors import Exhausted, Internal
from ganglion.wire.limits import SESSIONS_QUEUED
from ganglion.wire.nouns import kv_capacity_tokens


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows of one session: positions start..start+count-1; `draws` when a token is drawn from the last one."""

    session: int
    start: int
    count: int
    draws: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model. Before it state is dropped, of sessions that are over and of those put back.

    decoding: how many of the entries run a token that was drawn; they come first. role: of all rows.
    """

    number: int
    entries: tuple[Entry, ...]
    closed: tuple[int, ...] = ()
    put_back: tuple[int, ...] = ()
    decoding: int = 0
    role: Role = "any"

    @property
    def rows(self) -> int:
        """Rows of all entries."""
        return sum(entry.count for entry in self.entries)


@dataclass(slots=True)
class _Run:
    """Invariant: held, room <= known; the next token is drawn when held reaches known. prompt: what it began with."""

    session: int
    client: str
    prompt: int
    known: int
    held: int = 0
    admitted: int = 0  # its number among all admissions, the latest highest
    room: int = 0  # tokens that it had when it was admitted, for which devices make room at once

    @property
    def decodes(self) -> bool:
        return self.held >= self.prompt and self.known - self.held == 1

    @property
    def lent(self) -> int:
        """Tokens of key-value state, with room for the row that an exact class writes beyond those that have run."""
        return self.needed(0) if self.held else 0

    def needed(self, more: int) -> int:
        """Tokens of key-value state that it is lent when `more` rows have run."""
        return kv_capacity_tokens(max(self.held + more, self.room) + 1)

    def waiting(self, role: Role) -> int:
        """Rows that wait to be run now, of this role."""
        if role == "any":
            return self.known - self.held
        if role == "prompt":
            return max(0, self.prompt - self.held)
        return self.known - self.held if self.held >= self.prompt else 0


@dataclass(slots=True)
class _Draft:
    """A step in the making."""

    room: int
    entries: list[Entry] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)

    def add(self, run: _Run, count: int) -> None:
        self.entries.append(Entry(run.session, run.held, count, run.held + count == run.known))
        self.runs.append(run)
        run.held += count
        self.room -= count


class Scheduler:
    """Steps for the sessions of one deployment.

    chunk: rows of a step at most. sessions: admitted at a time. kv_tokens: tokens of key-value state of all sessions
    together, in capacities of `kv_capacity_tokens`; at least that of one session of a full context. mixed: whether the
    class mixes formats by role.
    """

    def __init__(
        self,
        *,
        chunk: int,
        sessions: int,
        kv_tokens: int,
        mixed: bool = False,
        begin: Callable[[int], int] = lambda session: 0,
    ) -> None:
        """`begin`: called as a session is admitted; how many of its tokens it holds then, fewer than all."""
        self._begin = begin
        self._role: Role = "generated" if mixed else "any"  # of the last step
        self._chunk = chunk
        self._sessions = sessions
        self._kv_tokens = kv_tokens
        self._queue: list[_Run] = []
        self._active: dict[int, _Run] = {}
        self._served: dict[str, int] = {}  # client -> the last step with rows of a prompt of it
        self._closed: list[int] = []
        self._put_back: list[int] = []
        self._steps = 0
        self._admissions = 0

    @property
    def active(self) -> frozenset[int]:
        """Sessions that were admitted and not closed."""
        return frozenset(self._active)

    @property
    def queued(self) -> int:
        """Sessions that wait."""
        return len(self._queue)

    def open(self, session: int, prompt_tokens: int, client: str = "") -> None:
        """Queue a session with at least one prompt token; raises Exhausted when the queue is full."""
        if len(self._active) + len(self._queue) >= self._sessions + SESSIONS_QUEUED:
            raise Exhausted(
                f"{len(self._active)} sessions run and {len(self._queue)} wait, at most {SESSIONS_QUEUED} may;"
                " try later, or deploy with more --sessions"
            )
        self._queue.append(_Run(session, client, prompt_tokens, prompt_tokens))

    def held(self, session: int) -> int:
        """Tokens of an admitted session that have run, those of the last step included; 0 for any other session."""
        run = self._active.get(session)
        return run.held if run is not None else 0

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
            return
        for run in [run for run in self._queue if run.session == session]:
            self._queue.remove(run)
            if run.admitted:  # it ran before it was put back
                self._closed.append(session)

    def next_step(self, prompt_rows: int | None = None) -> Step | None:
        """The next step, counted as done; without entries when there are only sessions to close; None when idle.

        prompt_rows: of prompts at most, in a step that decodes too or keeps others from it; None: as many as it takes.
        """
        self._admit()
        role = self._role = self._next_role()
        draft = _Draft(self._chunk)
        for run in [run for run in self._active.values() if run.decodes and run.waiting(role)]:
            if draft.room and run.session in self._active and self._lend(run, 1, draft):
                draft.add(run, 1)
        decoding = len(draft.entries)
        delayed = decoding or (role == "prompt" and any(run.waiting("generated") for run in self._active.values()))
        if delayed and prompt_rows is not None:
            draft.room = min(draft.room, prompt_rows)
        prompts = [run for run in self._active.values() if run.waiting(role) and not run.decodes]
        for run in sorted(prompts, key=lambda run: (self._served.get(run.client, 0), run.admitted)):
            count = min(run.waiting(role), draft.room)
            if count and run.session in self._active and self._lend(run, count, draft):
                draft.add(run, count)
                self._served[run.client] = self._steps + 1
        if not draft.entries and not self._closed and not self._put_back:
            return None
        for entry in draft.entries:
            if entry.draws:  # to the end of the line, so that more sessions than rows take turns
                self._active[entry.session] = self._active.pop(entry.session)
        self._steps += 1
        closed, self._closed = tuple(self._closed), []
        put_back, self._put_back = tuple(self._put_back), []
        return Step(self._steps, tuple(draft.entries), closed, put_back, decoding, role)

    def _next_role(self) -> Role:
        """The role that had no turn in the last step, if any rows of it wait, so that neither starves."""
        if self._role == "any":
            return "any"
        turns: tuple[Role, Role] = ("prompt", "generated") if self._role == "generated" else ("generated", "prompt")
        for role in turns:
            if any(run.waiting(role) for run in self._active.values()):
                return role
        return self._role

    def _admit(self) -> None:
        """Admit while there is room: of the client with the fewest sessions, in order of arrival."""
        if not self._active:
            self._served.clear()
        while self._queue and len(self._active) < self._sessions:
            running: dict[str, int] = {}
            for run in self._active.values():
                running[run.client] = running.get(run.client, 0) + 1
            chosen = min(self._queue, key=lambda run: running.get(run.client, 0))
            promised = sum(kv_capacity_tokens(run.known + 1) for run in (*self._active.values(), chosen))
            if promised > self._kv_tokens:
                return
            self._queue.remove(chosen)
            self._admissions += 1
            chosen.admitted, chosen.room = self._admissions, chosen.known
            chosen.held = self._begin(chosen.session)
            self._active[chosen.session] = chosen

    def _lend(self, run: _Run, count: int, draft: _Draft) -> bool:
        """Make room for `count` more rows; False when the run itself is put back for it."""
        wanted = run.needed(count)
        while sum(one.lent for one in self._active.values()) - run.lent + wanted > self._kv_tokens:
            free = [one for one in self._active.values() if one.held and one not in draft.runs]
            last = max((*free, run), key=lambda one: one.admitted)
            if last is run and len(free) + len(draft.runs) == 0:
                raise Internal(f"key-value state: {wanted} tokens wanted for one session, {self._kv_tokens} in all")
            del self._active[last.session]
            last.held = 0
            self._queue.insert(0, last)
            self._put_back.append(last.session)
            if last is run:
                return False
        return True
