"""What runs next: a pure core that takes open, drawn and close, and returns steps.

A session waits in the queue, is admitted, has its prompt run in chunks, and then runs one row for every token drawn.
Key-value state is lent as sessions grow: where a running one needs more than is left, the session that was admitted
last gives its state up and waits again, first in line; its tokens are run anew when there is room. Decoding rows come
first in a step; what is left goes to prompts, those first whose client was served longest ago. So a long prompt delays
nobody by more than the rows that a step takes beside decoding ones, and no client keeps others waiting. Where the class
mixes formats a step has rows of one role, and steps of both roles take turns.

A decoding session may have a window: drafted tokens that run after its last one, each of which draws. How many of them
hold is told afterwards; the rows of the others are written over by what runs next. Beside it branches may run: drafted
tokens that go on from the middle of the window otherwise than it does. A branch runs in a slot, a session of its own
that takes what it goes on from of the chain, and gives the chain its rows when it holds. Slots keep their rows from
round to round, so that little is copied; they live on memory that nobody else needs, and are given up first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ganglion.agent.roles import Role
from ganglion.wire.errors import Exhausted, Internal
from ganglion.wire.limits import SESSIONS_QUEUED, TREE_BRANCHES
from ganglion.wire.nouns import kv_capacity_tokens

FIRST_SLOT: Final = 1 << 32  # slots are numbered from here on, sessions below


@dataclass(frozen=True, slots=True)
class Entry:
    """Rows of one session: positions start..start+count-1; a token is drawn from each of the last `draws`.

    take_from: the session whose rows from `take_first` on up to `start` it takes. branch: its number among the branches
    that were asked for session `take_from`; `session` is a slot then.
    """

    session: int
    start: int
    count: int
    draws: int
    take_from: int | None = None
    take_first: int = 0
    branch: int | None = None


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

    @property
    def prompt_rows(self) -> int:
        """Rows of entries that do not decode."""
        return sum(entry.count for entry in self.entries[self.decoding :])


@dataclass(slots=True, eq=False)
class _Slot:
    """State of branches of one session. same: rows at its beginning that are those of the session's own tokens.

    room: tokens for which devices have room. start: of its entry in the last step; None: it had none.
    """

    session: int
    same: int = 0
    room: int = 0
    start: int | None = None

    @property
    def lent(self) -> int:
        return kv_capacity_tokens(self.room + 1) if self.room else 0


@dataclass(slots=True, eq=False)
class _Run:
    """Invariant: held < known between steps; the next token is drawn when held reaches known.

    Where somebody else says what follows, held is known until that is said, and the run rests.

    prompt: what it began with. window: drafted tokens that run with its next row; None: it waits for some. branches:
    those beside the window, as (drafted tokens before it, its own). won: the slot that has its rows from `won_first`.
    """

    session: int
    client: str
    prompt: int
    known: int
    held: int = 0
    admitted: int = 0  # its number among all admissions, the latest highest
    room: int = 0  # tokens for which devices have room: those that it had when it was admitted, and all that ran since
    window: int | None = 0
    branches: Sequence[tuple[int, int]] = ()
    slots: list[_Slot] = field(default_factory=list)
    won: _Slot | None = None
    won_first: int = 0

    @property
    def decodes(self) -> bool:
        return self.held >= self.prompt and self.known - self.held == 1

    @property
    def rests(self) -> bool:
        return self.decodes and self.window is None

    @property
    def lent(self) -> int:
        """Tokens of key-value state, with room for the row that an exact class writes beyond those that have run.

        Without its slots.
        """
        return self.needed(0) if self.held else 0

    def needed(self, more: int) -> int:
        """Tokens of key-value state that it is lent when `more` rows have run."""
        return kv_capacity_tokens(max(self.held + more, self.room) + 1)

    def waiting(self, role: Role) -> int:
        """Rows that wait to be run now, of this role, drafted ones aside."""
        if self.rests:
            return 0
        if role == "any":
            return max(0, self.known - self.held)
        if role == "prompt":
            return max(0, self.prompt - self.held)
        return max(0, self.known - self.held) if self.held >= self.prompt else 0


@dataclass(slots=True)
class _Draft:
    """A step in the making."""

    room: int
    entries: list[Entry] = field(default_factory=list)
    runs: list[_Run] = field(default_factory=list)
    taken: list[_Slot] = field(default_factory=list)  # from which it takes rows: they cannot be given up before it

    def add(self, run: _Run, count: int) -> None:
        entry = Entry(run.session, run.held, count, max(0, run.held + count - run.known + 1))
        if run.won is not None:
            entry = replace(entry, take_from=run.won.session, take_first=run.won_first)
            self.taken.append(run.won)
            run.won = None
        self.entries.append(entry)
        self.runs.append(run)
        run.held += count
        run.room = max(run.room, run.held)  # buffers do not shrink when drafts do not hold
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
        self._slots = FIRST_SLOT  # the number of the next one

    @property
    def active(self) -> frozenset[int]:
        """Sessions that were admitted and not closed."""
        return frozenset(self._active)

    @property
    def queued(self) -> int:
        """Sessions that wait."""
        return len(self._queue)

    def open(self, session: int, prompt_tokens: int, client: str = "", answered: int = 0) -> None:
        """Queue a session with at least one prompt token, and `answered` tokens that were drawn before.

        Raises Exhausted when the queue is full.
        """
        if len(self._active) + len(self._queue) >= self._sessions + SESSIONS_QUEUED:
            raise Exhausted(
                f"{len(self._active)} sessions run and {len(self._queue)} wait, at most {SESSIONS_QUEUED} may;"
                " try later, or deploy with more --sessions"
            )
        self._queue.append(_Run(session, client, prompt_tokens, prompt_tokens + answered))

    def held(self, session: int) -> int:
        """Tokens of an admitted session whose rows it has, those of the last step included; 0 for any other session."""
        run = self._active.get(session)
        if run is None:
            return 0
        return run.held if run.won is None else run.won_first

    def decoding(self) -> list[int]:
        """Sessions whose next row is that of the token drawn last: those that may have a window."""
        return [run.session for run in self._active.values() if run.decodes]

    def window(self, session: int, drafted: int | None, branches: Sequence[tuple[int, int]] = ()) -> None:
        """How many drafted tokens run with a decoding session's next row; None: it is left out until there are some.

        branches: what may run beside them where there is room, the first ones first: after so many of the drafted
        tokens so many others.
        """
        run = self._active[session]
        run.window, run.branches = drafted, branches

    def drawn(self, session: int, tokens: int = 1, slot: int | None = None) -> None:
        """So many tokens were drawn for a session that goes on, all but the last one as drafted: the last runs next.

        slot: of the branch, in the last step, that they went along; None: none.
        """
        run = self._active[session]
        held = run.known + tokens - 1
        won = next(one for one in run.slots if one.session == slot) if slot is not None else None
        fork = held if won is None else won.start  # where the chain and what was drawn part
        if fork is None or not run.known <= held <= (run.held if won is None else won.room):
            raise Internal(f"session {session}: {tokens} tokens were drawn at {run.held} of {run.known} tokens")
        for one in run.slots:
            if one.start is not None:
                one.same, one.start = held if one is won else min(one.start, fork), None
        run.won, run.won_first = won, fork
        run.held, run.known, run.window, run.branches = held, held + 1, 0, ()

    def chosen(self, session: int, tokens: int) -> None:
        """So many tokens follow in a session for which none is drawn; they run next, or when it is admitted again."""
        run = self._active.get(session) or next(one for one in self._queue if one.session == session)
        run.known += tokens

    def close(self, session: int) -> None:
        """A session has ended or was cancelled; closing what is closed already does nothing."""
        active = self._active.pop(session, None)
        if active is not None:
            self._closed.append(session)
            self._drop_slots(active)
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
            # Where memory is so short that the rows of a branch that held are lost, they are run anew below.
            if draft.room and run.session in self._active and self._lend(run, 1, draft) and run.decodes:
                draft.add(run, self._with_window(run, draft))
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
        decoding += self._branch(draft, decoding)
        if not draft.entries and not self._closed and not self._put_back:
            return None
        for entry in draft.entries:
            if (
                entry.draws and entry.branch is None
            ):  # to the end of the line, so that more sessions than rows take turns
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

    def _lent(self) -> int:
        """Tokens of key-value state of all sessions and slots."""
        return sum(one.lent + sum(slot.lent for slot in one.slots) for one in self._active.values())

    def _with_window(self, run: _Run, draft: _Draft) -> int:
        """Rows of a decoding run: its window as far as room and memory reach."""
        count = min(1 + (run.window or 0), draft.room)
        while count > 1 and self._lent() - run.lent + run.needed(count) > self._kv_tokens:
            if not self._give_up_slot(draft, run.won):
                count -= 1
        return count

    def _lend(self, run: _Run, count: int, draft: _Draft) -> bool:
        """Make room for `count` more rows; False when the run itself is put back for it."""
        while self._lent() - run.lent + run.needed(count) > self._kv_tokens:
            if self._give_up_slot(draft):
                continue
            free = [one for one in self._active.values() if one.held and one not in draft.runs]
            last = max((*free, run), key=lambda one: one.admitted)
            if last is run and len(free) + len(draft.runs) == 0:
                raise Internal(
                    f"key-value state: {run.needed(count)} tokens wanted for one session, {self._kv_tokens} in all"
                )
            del self._active[last.session]
            self._drop_slots(last)
            last.held = 0
            self._queue.insert(0, last)
            self._put_back.append(last.session)
            if last is run:
                return False
        return True

    def _branch(self, draft: _Draft, decoding: int) -> int:
        """Put branches after the entries that decode, in the rows and the memory that are left; how many."""
        entries: list[Entry] = []
        draft.room = self._chunk - sum(entry.count for entry in draft.entries)
        for main, run in zip(draft.entries[:decoding], draft.runs, strict=False):
            free = list(run.slots)
            for number, (at, wanted) in enumerate(run.branches):
                start, count = run.known + at, min(wanted, draft.room)
                if at >= main.count or count < 1:
                    continue
                slot = max(free, key=lambda one: min(one.same, start), default=None)
                if slot is None and len(run.slots) == TREE_BRANCHES:
                    break
                slot = slot or _Slot(self._slots)
                room = max(slot.room, start + count)
                if self._lent() - slot.lent * (slot in free) + kv_capacity_tokens(room + 1) > self._kv_tokens:
                    continue
                if slot in free:
                    free.remove(slot)
                else:
                    run.slots.append(slot)
                    self._slots += 1
                same, slot.room, slot.start = min(slot.same, start), room, start
                entries.append(Entry(slot.session, start, count, count, run.session, same, number))
                draft.room -= count
        draft.entries[decoding:decoding] = entries
        return len(entries)

    def _give_up_slot(self, draft: _Draft, spared: _Slot | None = None) -> bool:
        """Close a slot that the step does not need, those last that have rows of a branch that held; False: none."""
        slots = [
            (slot is run.won, run, slot)
            for run in self._active.values()
            for slot in run.slots
            if slot not in draft.taken and slot is not spared
        ]
        if not slots:
            return False
        _, run, slot = min(slots, key=lambda one: one[0])
        if run.won is slot:
            run.won, run.held = None, run.won_first
        run.slots.remove(slot)
        self._closed.append(slot.session)
        return True

    def _drop_slots(self, run: _Run) -> None:
        self._closed += [slot.session for slot in run.slots]
        run.slots, run.won = [], None
