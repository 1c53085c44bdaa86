"""What decoding sessions verify with their next row: drafts that a device sent, or guesses of the lead's own drafter.

A pure core but for the drafter's compute: the driver tells it what passes took and takes windows from it. One whose
client drafts has a queue of its drafts; what is done when that is empty is the client's word (`Miss`). Windows are as
long as is predicted to give most tokens a second, from what was accepted and what passes of so many rows took. The same
prediction says which other drafts run beside a window, as branches of it (speculation/branching.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ganglion.agent.lead.scheduler import Entry
from ganglion.agent.lead.session import Session
from ganglion.agent.speculation.branching import Branch, BranchCost, Siblings, Tree, best_tree, forced_tree
from ganglion.agent.speculation.drafters import Branching, Drafter, Propose
from ganglion.agent.speculation.queue import DraftQueue
from ganglion.agent.speculation.window import PassCost, Windows
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.limits import DRAFT_CREDITS, TREE_BRANCHES
from ganglion.wire.prefixes import Prefix

log = logging.getLogger(__name__)

FIRST_ROW_S: Final = 0.02  # of a pass, until that is measured
NEXT_ROW_S: Final = 0.0005
_NOTHING: Final[tuple[int, ...]] = ()


@dataclass(slots=True)
class _Drafting:
    """A session that has windows. given: tokens at the beginning of `window` that its client drafted.

    chosen: after how many tokens, and from which of the client's, `window` was made. candidates: what its client
    drafted otherwise. branches: what is to run beside the window; ran: what did in the last step, by number.
    """

    session: Session
    queue: DraftQueue | None
    miss: lane_pb2.Miss
    most: int
    window: tuple[int, ...] | None = _NOTHING
    given: int = 0
    chosen: tuple[int, tuple[int, ...], tuple[Branch, ...]] | None = None
    candidates: tuple[Branch, ...] = ()
    branches: tuple[Branch, ...] = ()
    ran: dict[int, Branch] = field(default_factory=dict)
    ended_s: float | None = None  # the last pass
    began_s: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether it is left out until its client has drafted something."""
        return self.queue is not None and self.miss == lane_pb2.MISS_WAIT

    def limit(self, most: int) -> int:
        """Tokens of a window at most, so that it never goes beyond what the session may hold."""
        session = self.session
        return max(0, min(most, self.most, session.request.limit_tokens - len(session.ids) - 1))


@dataclass(slots=True)
class _Wanted:
    """What one session verifies next, in the making."""

    drafting: _Drafting
    queued: tuple[int, ...]
    candidates: tuple[Branch, ...] = ()
    width: int = 0
    branches: tuple[Branch, ...] = ()
    beside: int = 0  # second guesses of the lead's own drafter that are to run too
    guessed: Sequence[int] = field(default=_NOTHING)

    @property
    def key(self) -> tuple[int, tuple[int, ...], tuple[Branch, ...]]:
        return len(self.drafting.session.ids), self.queued, self.candidates

    @property
    def branch_rows(self) -> int:
        return sum(len(branch.tokens) for branch in self.branches)


class Speculating:
    """The sessions of one lead that have windows. `drafter`: its own; `window_tokens`: of one session at most.

    violations: sessions that were cut off, by reason. tree_rows: of branches beside each window; None: as many as pay.
    """

    def __init__(
        self,
        drafter: Drafter | None,
        *,
        window_tokens: int,
        clock: Callable[[], float],
        tree_rows: int | None = None,
    ) -> None:
        self.tree_rows = tree_rows
        self._siblings = Siblings()
        self._branch_cost = BranchCost()
        self._drafter = drafter
        self._most = window_tokens
        self._clock = clock
        self._windows = Windows(PassCost(FIRST_ROW_S, NEXT_ROW_S))
        self._by_session: dict[int, _Drafting] = {}
        self.violations: Counter[str] = Counter()

    @property
    def active(self) -> bool:
        """Whether any session has windows."""
        return bool(self._by_session)

    @property
    def listens(self) -> bool:
        """Whether any client drafts."""
        return any(drafting.queue is not None for drafting in self._by_session.values())

    def open(self, session: Session) -> lane_pb2.Terms | None:
        """A session begins; what its client is told when it drafts."""
        contract = session.request.contract
        if contract is None:
            if self._drafter is not None:
                session.speculated.mode = self._drafter.name
                self._by_session[session.number] = _Drafting(session, None, lane_pb2.MISS_DRAFT, self._most)
            return None
        tip = Prefix.of(session.ids)
        queue = DraftQueue(tip, credits=DRAFT_CREDITS, vocab=contract.vocab)
        most = min(self._most, contract.window_tokens or self._most)
        miss = contract.miss or lane_pb2.MISS_WAIT
        self._by_session[session.number] = _Drafting(session, queue, miss, most)
        drafter = self._drafter.name if self._drafter is not None else ""
        return lane_pb2.Terms(window_tokens=most, credits=DRAFT_CREDITS, drafter=drafter, prefix=tip.name)

    def drafts(self, number: int, drafts: lane_pb2.Drafts) -> None:
        """A device's drafts; raises ProtocolViolation, which is counted by its reason (`param`)."""
        drafting = self._by_session[number]
        try:
            if drafts.miss not in lane_pb2.Miss.values():
                raise ProtocolViolation(f"drafts ask for miss {drafts.miss}, which is none", param="miss")
            if not drafts.miss and not drafts.branches:
                raise ProtocolViolation("drafts without a branch", param="empty")
            if drafting.queue is not None:
                drafting.queue.add(drafts)
        except ProtocolViolation as error:
            reason = error.param or "other"
            self.violations[reason] += 1
            log.warning(
                "session %d is cut off (%s, %d times by now): %s",
                number,
                reason,
                self.violations[reason],
                error.message,
            )
            raise
        drafting.miss = drafts.miss or drafting.miss

    def close(self, number: int) -> None:
        """A session is over."""
        if self._by_session.pop(number, None) is not None:
            self._windows.close(number)
            if self._drafter is not None:
                self._drafter.close(number)

    def drafted(self, entry: Entry) -> Sequence[int]:
        """The drafted tokens that an entry of this step runs: the first of a session's window, or of a branch of it."""
        if entry.branch is not None and entry.take_from is not None:
            drafting = self._by_session[entry.take_from]
            branch = drafting.branches[entry.branch]
            drafting.ran[entry.branch] = replace(branch, tokens=branch.tokens[: entry.count])
            return branch.tokens[: entry.count]
        found = self._by_session.get(entry.session)
        if found is None or not found.window:
            return _NOTHING
        found.window = found.window[: entry.draws - 1]
        return found.window

    def choose(self, ready: Iterable[Session]) -> dict[int, tuple[Sequence[int] | None, Sequence[Branch]]]:
        """Windows of decoding sessions and what runs beside them; None: it waits for its device."""
        now = self._clock()
        wanted = []
        for session in ready:
            drafting = self._by_session.get(session.number)
            if drafting is not None:
                wanted.append(self._queued(drafting))
        # Those that had no turn since keep what they have: guessing takes time.
        anew = [one for one in wanted if one.drafting.chosen != one.key]
        for one in anew:
            self._measure_out(one, others=len(wanted) - 1)
        self._guess([one for one in anew if one.width > len(one.queued)])
        for one in anew:
            drafting = one.drafting
            drafting.began_s, drafting.chosen, drafting.candidates = now, one.key, one.candidates or one.branches
            drafting.window = self._cut(drafting.session, (*one.queued[: one.width], *one.guessed))
            drafting.given = min(len(drafting.window), len(one.queued))
            drafting.branches = self._cut_branches(drafting.session, one.branches)
            if not one.queued and drafting.waits and drafting.limit(self._most):
                drafting.window = drafting.chosen = None
        return {one.drafting.session.number: (one.drafting.window, one.drafting.branches) for one in wanted}

    def _queued(self, drafting: _Drafting) -> _Wanted:
        """What a session's client has drafted: what is verified first, and what else."""
        queue, most = drafting.queue, drafting.limit(self._most)
        if queue is None:
            return _Wanted(drafting, _NOTHING)
        queued = tuple(queue.window(most))
        steered = drafting.session.steering is not None  # each path would have adjustments of its own
        return _Wanted(drafting, queued, () if steered else tuple(queue.branches(queued, most)))

    def _measure_out(self, one: _Wanted, others: int) -> None:
        """How long a window is worth it: drafts that were sent cost nothing more, the drafter's own take their time."""
        drafting, number = one.drafting, one.drafting.session.number
        if one.queued:
            one.width = self._windows.choose(number, other_rows=others, draft_token_s=0.0, most=len(one.queued))
            self._plant(one, others)
        guesses = drafting.miss == lane_pb2.MISS_DRAFT and self._drafter is not None
        if guesses and self._drafter is not None and one.width == len(one.queued):
            most, token_s = drafting.limit(self._most) - one.branch_rows, self._drafter.token_s(others + 1)
            width = self._windows.choose(number, other_rows=others, draft_token_s=token_s, most=most)
            one.width = max(one.width, width)
            if not one.queued:
                self._plant_own(one, others)

    def _plant_own(self, one: _Wanted, others: int) -> None:
        """How many second guesses of the lead's own drafter run beside its first ones."""
        session, most = one.drafting.session, one.drafting.limit(self._most)
        if not isinstance(self._drafter, Branching) or session.steering is not None or not one.width:
            return
        if self.tree_rows is not None:
            one.beside = min(self.tree_rows, TREE_BRANCHES, most - 1)
        else:
            anywhere = [Branch(at, (0,)) for at in range(one.width)]
            one.beside = len(self._pays(session.number, one.width, anywhere, others, most).branches)
        one.width = min(one.width, most - one.beside)

    def _pays(self, number: int, window: int, candidates: Sequence[Branch], others: int, most: int) -> Tree:
        cost = self._windows.cost
        return best_tree(
            window,
            candidates,
            self._windows.acceptance.chances(number, most),
            self._siblings.chance,
            cost.seconds,
            branch_s=self._branch_cost.seconds(cost.seconds(1)),
            other_rows=others,
            most=most,
        )

    def _plant(self, one: _Wanted, others: int) -> None:
        """What runs beside what the client drafted, or instead of the last of them."""
        number, most = one.drafting.session.number, one.drafting.limit(self._most)
        if not one.candidates or not most or self.tree_rows == 0:
            return
        if self.tree_rows is None:
            tree = self._pays(number, len(one.queued), one.candidates, others, most)
        else:
            chances, sibling = self._windows.acceptance.chances(number, most), self._siblings.chance
            tree = forced_tree(one.width, one.candidates, chances, sibling, branch_rows=self.tree_rows, most=most)
        if tree.branches:
            one.width, one.branches = tree.window, tree.branches

    def _guess(self, wanted: Sequence[_Wanted]) -> None:
        if self._drafter is None or not wanted:
            return
        asks = [
            Propose(
                one.drafting.session.number,
                [*one.drafting.session.ids, *one.queued],
                one.width - len(one.queued),
                one.drafting.session.request.sampling,
                one.drafting.session.request.asked_tokens,
                one.beside,
            )
            for one in wanted
        ]
        for one, guessed in zip(wanted, self._drafter.propose(asks), strict=True):
            one.guessed = guessed
            if one.beside and isinstance(self._drafter, Branching):
                one.branches = tuple(self._drafter.beside(one.drafting.session.number))

    def _cut(self, session: Session, window: tuple[int, ...]) -> tuple[int, ...]:
        """Without what nothing can follow: a stop id, and what a grammar does not let be drawn."""
        request = session.request
        length = next((at for at, token in enumerate(window) if token in request.stop_ids), len(window))
        window = window[:length]
        return tuple(session.steering.cut(window)) if session.steering is not None else window

    def _cut_branches(self, session: Session, branches: Sequence[Branch]) -> tuple[Branch, ...]:
        cut = [replace(branch, tokens=self._cut(session, branch.tokens)) for branch in branches]
        return tuple(branch for branch in cut if branch.tokens)

    def passed(
        self,
        session: Session,
        window: Sequence[int],
        tokens: Sequence[int],
        took_s: float,
        branch: int | None = None,
    ) -> None:
        """A pass over `window` gave a session `tokens`: those accepted and the next, which a stop leaves out.

        branch: the number of the one that they went along.
        """
        drafting = self._by_session.get(session.number)
        if drafting is None:
            return
        path, on_window = tuple(window), len(window)
        if branch is not None:
            taken = drafting.ran[branch]
            path, on_window = (*window[: taken.at], *taken.tokens), taken.at
        accepted = 0
        while accepted < min(len(path), len(tokens)) and tokens[accepted] == path[accepted]:
            accepted += 1
        held = min(accepted, on_window)
        self._windows.acceptance.observed(session.number, len(window), held)
        for other in drafting.candidates:
            if other.at == held < min(len(window), len(tokens)):
                self._siblings.observed(other.rank, right=tokens[held] == other.tokens[0])
        beside = sum(len(one.tokens) for one in drafting.ran.values())
        drafted = len(window) + beside
        outcome, now = None, self._clock()
        if drafting.queue is not None:
            done = drafting.queue.commit(tokens)
            idle_s = drafting.began_s - drafting.ended_s if drafting.ended_s is not None else 0.0
            outcome = lane_pb2.Outcome(
                round=done.round,
                prefix=done.prefix,
                drafted=drafted,
                accepted=accepted,
                credits=done.credits,
                own=max(0, len(window) - drafting.given),
                queued=done.queued,
                verify_s=took_s,
                idle_s=idle_s,
                branched=branch is not None,
                beside=beside,
            )
        session.passed(drafted, accepted, hit=drafting.given > 0, outcome=outcome)
        drafting.ended_s, drafting.window, drafting.given, drafting.chosen = now, _NOTHING, 0, None
        drafting.candidates = drafting.branches = ()
        drafting.ran = {}

    def measured(self, rows: int, branches: int, took_s: float) -> None:
        """A step of so many decoding rows, with so many branches, took `took_s`."""
        cost = self._windows.cost
        if branches:
            self._branch_cost.measured(branches, took_s, cost.seconds(rows), cost.seconds(1))
        else:
            cost.measured(rows, took_s)
