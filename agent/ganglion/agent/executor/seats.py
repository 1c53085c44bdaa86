"""Whose state a device holds, and what a lead may ask of it: the same for every executor, whatever state is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from ganglion.agent.executor.kv import Take
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.roles import Role
from ganglion.wire.errors import Exhausted, ProtocolViolation
from ganglion.wire.limits import TREE_BRANCHES
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS, Plan


class State(Protocol):
    """What is kept of a session. Invariant: positions below `held` are valid."""

    held: int


S = TypeVar("S", bound=State)
T_contra = TypeVar("T_contra", bound=State, contravariant=True)


class Ledger(Protocol[S]):
    """Opens, grows and drops state; methods as `KeyValueLedger` describes them."""

    def __len__(self) -> int: ...
    def get(self, session: int) -> S | None: ...  # noqa: D102
    def open(self, session: int) -> S: ...  # noqa: D102
    def reserve(self, state: S, tokens: int) -> bool: ...  # noqa: D102
    def copy(self, source: S, target: S, start: int, stop: int) -> None: ...  # noqa: D102
    def close(self, session: int) -> None: ...  # noqa: D102


class Blocks(Protocol[T_contra]):
    """Keeps blocks of state for later sessions; methods as `PrefixBlocks` describes them."""

    def keep(self, state: T_contra, first: int, numbers: Sequence[int]) -> None: ...  # noqa: D102
    def copy_to(self, state: T_contra, numbers: Sequence[int]) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Rows(Generic[S]):
    """Rows start..start+count-1 of a session: `state` its keys and values, `first` its first row of the step.

    source: whose rows `taken_first`..start-1 it takes in each layer before it attends.
    """

    session: int
    state: S
    start: int
    count: int
    first: int
    source: S | None = None
    taken_first: int = 0


R = TypeVar("R", bound=Rows[Any])


def halved(entries: Sequence[R], middle: int) -> tuple[tuple[R, ...], tuple[R, ...]]:
    """The rows of entries before the step's row `middle`, and those from it on, counted from there.

    Invariant: a session's earlier rows are in the first, which has run a segment before the second does.
    """
    sooner, later = list[R](), list[R]()
    for one in entries:
        count = min(one.count, max(0, middle - one.first))
        if count:
            sooner.append(replace(one, count=count))
        if count < one.count:
            first = one.first + count - middle
            rest = replace(one, start=one.start + count, count=one.count - count, first=first)
            later.append(replace(rest, source=None) if count else rest)
    return tuple(sooner), tuple(later)


class Seats(Generic[S]):
    """The sessions of one device, and the slots of their branches, within what the plan allows.

    pads: graphs write one row beyond an odd number of rows. moved: called with a session whose buffers are others now.
    """

    def __init__(
        self, ledger: Ledger[S], blocks: Blocks[S], plan: Plan, *, pads: bool, moved: Callable[[int], None]
    ) -> None:
        self._ledger = ledger
        self._blocks = blocks
        self._plan = plan
        self._pads = pads
        self._moved = moved
        self._slots: set[int] = set()  # open sessions that began with rows of another

    @property
    def sessions(self) -> int:
        """Sessions that hold state now, slots of their branches aside."""
        return len(self._ledger) - len(self._slots)

    def close(self, session: int) -> None:
        """Drop a session's state."""
        self._ledger.close(session)
        self._slots.discard(session)
        self._moved(session)

    def prepare(self, keeps: Sequence[Keep], closed: Sequence[int], begins: Sequence[Begin]) -> None:
        """What a step does to sessions before its rows: blocks are kept, sessions closed, others begun from blocks.

        Raises ProtocolViolation for what no lead of this plan says, Exhausted without room.
        """
        for keep in keeps:
            state = self._ledger.get(keep.session)
            if state is None:
                raise ProtocolViolation(f"session {keep.session} is to leave blocks and is not open")
            self._blocks.keep(state, keep.first, keep.blocks)
        for session in closed:
            self.close(session)
        for begin in begins:
            tokens, prompt = len(begin.blocks) * PREFIX_BLOCK_TOKENS, begin.prompt_tokens
            if self._ledger.get(begin.session) is not None or not 0 < tokens < prompt < self._plan.context:
                raise ProtocolViolation(f"session {begin.session} begins with {tokens} tokens of a prompt of {prompt}")
            state = self._open(begin.session)
            self._ledger.reserve(state, prompt)
            self._blocks.copy_to(state, begin.blocks)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """Give `target`, opened if need be, the positions start..stop of `source`; it then holds `stop` tokens.

        Raises ProtocolViolation for positions that either does not hold up to, Exhausted without room.
        """
        given, taker = self._ledger.get(source), self._ledger.get(target)
        held = taker.held if taker is not None else 0
        if given is None or source == target or not 0 <= start <= min(held, stop) or stop > given.held:
            raise ProtocolViolation(
                f"positions {start}..{stop} of session {source}, which holds {given.held if given else 0} tokens, to"
                f" session {target}, which holds {held}"
            )
        if taker is None:
            taker = self._open(target)
        taker.held = start
        self._reserve(target, taker, stop)
        self._ledger.copy(given, taker, start, stop)

    def place(
        self,
        entries: Sequence[tuple[int, int, int]],
        takes: Mapping[int, Take],
        make: Callable[[int, S, int, int, int, S | None, int], R],
    ) -> tuple[R, ...]:
        """The rows of a step for entries (session, start, count), as `make` makes them of the fields of `Rows`.

        Sessions of start 0, and those that take rows, are opened. A start below what is held takes the later rows back.
        Raises ProtocolViolation for entries that no scheduler of this plan announces, Exhausted without room.
        """
        rows = sum(count for _, _, count in entries)
        if not 0 < rows <= self._plan.chunk or len({session for session, _, _ in entries}) != len(entries):
            raise ProtocolViolation(f"a step of {rows} rows in {len(entries)} entries; at most {self._plan.chunk} rows")
        placed, first = list[R](), 0
        for session, start, count in entries:
            take = takes.get(session)
            source = self._source(session, start, take) if take is not None else None
            state = self._place(session, start, count, source)
            placed.append(make(session, state, start, count, first, source, take.first if take else 0))
            first += count
        return tuple(placed)

    def _open(self, session: int) -> S:
        if self.sessions >= self._plan.sessions:
            raise Exhausted(f"{self.sessions} sessions are open, the plan allows {self._plan.sessions}")
        return self._ledger.open(session)

    def _open_slot(self, session: int) -> S:
        most = TREE_BRANCHES * self._plan.sessions
        if len(self._slots) >= most:
            raise Exhausted(f"{len(self._slots)} branches are open, {most} may be of {self._plan.sessions} sessions")
        state = self._ledger.open(session)
        self._slots.add(session)
        return state

    def _source(self, session: int, start: int, take: Take) -> S:
        """Whom a session takes rows from; entries are placed in the order in which they attend."""
        source, taker = self._ledger.get(take.source), self._ledger.get(session)
        held = taker.held if taker is not None else 0
        if source is None or source is taker or not 0 <= take.first <= min(held, start) or start > source.held:
            raise ProtocolViolation(
                f"session {session}, which holds {held} tokens, takes {take.first}..{start} of session {take.source},"
                f" which holds {source.held if source else 0}"
            )
        return source

    def _place(self, session: int, start: int, count: int, source: S | None) -> S:
        state = self._ledger.get(session)
        if state is None:
            if start != 0 and source is None:
                raise ProtocolViolation(f"session {session} begins at token {start}")
            state = self._open(session) if source is None else self._open_slot(session)
        end = start + count + (count % 2 if self._pads else 0)
        if count < 1 or (start > state.held and source is None) or end > self._plan.context:
            raise ProtocolViolation(
                f"session {session}: rows {start}..{start + count} on {state.held} held tokens, context"
                f" {self._plan.context}"
            )
        # With what it held, all of it: an entry before this one may take rows that this one gives up.
        self._reserve(session, state, end)
        state.held = start + count
        return state

    def _reserve(self, session: int, state: S, tokens: int) -> None:
        if self._ledger.reserve(state, tokens):
            self._moved(session)


def check_role(role: Role, roles: Mapping[Role, object]) -> None:
    """Raise ProtocolViolation for a step of a role that the class has not."""
    if role not in roles:
        raise ProtocolViolation(f"a step of role {role}; those of this class are {', '.join(roles)}")
