"""The verifier's trie against a set of sequences, under honest senders that lag, and under hostile ones."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ganglion.agent.speculation import queue as queue_module
from ganglion.agent.speculation.branching import Branch
from ganglion.agent.speculation.queue import Committed, DraftQueue
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.prefixes import NAME_BYTES, Prefix

PROMPT = (5, 1, 4)
TIP = Prefix.of(PROMPT)
VOCAB = 8


def drafts(sent: int, *branches: tuple[Prefix | bytes, list[int]]) -> lane_pb2.Drafts:
    return lane_pb2.Drafts(
        round=sent,
        branches=[
            lane_pb2.Branch(parent=parent.name if isinstance(parent, Prefix) else parent, tokens=tokens)
            for parent, tokens in branches
        ],
    )


def made(limit: int = 16) -> DraftQueue:
    return DraftQueue(TIP, credits=limit, vocab=VOCAB)


def content(queue: DraftQueue) -> set[tuple[int, ...]]:
    """Every sequence that goes on from the tip, by walking the trie."""
    found, left = set(), [((), queue._root)]
    while left:
        path, node = left.pop()
        for token, child in node.children.items():
            found.add((*path, token))
            left.append(((*path, token), child))
    return found


# Small cases.


def test_a_chain_is_verified_and_the_rest_of_it_survives():
    queue = made()
    queue.add(drafts(0, (TIP, [1, 2, 3, 4])))
    assert (queue.window(8), queue.window(2), queue.queued) == ([1, 2, 3, 4], [1, 2], 4)
    assert queue.commit([1, 2]) == Committed(1, TIP.through([1, 2]).name, 2, 2)
    assert queue.window(8) == [3, 4]
    assert queue.commit([3, 7]) == Committed(2, TIP.through([1, 2, 3, 7]).name, 2, 0)
    assert queue.window(8) == []


def test_the_first_drafted_child_is_verified_and_a_branch_by_its_correction_survives():
    queue = made()
    queue.add(drafts(0, (TIP, [1, 2, 3]), (TIP.then(1), [6, 7]), (TIP, [4, 4])))
    assert queue.window(8) == [1, 2, 3]
    assert queue.commit([1, 6]) == Committed(1, TIP.through([1, 6]).name, 6, 1)
    assert queue.window(8) == [7]


def test_parents_may_be_branches_of_the_same_message_before_them():
    queue = made()
    queue.add(drafts(0, (TIP, [1]), (TIP.then(1), [2]), (TIP.through([1, 2]), [3])))
    assert queue.window(8) == [1, 2, 3]
    with pytest.raises(ProtocolViolation):
        made().add(drafts(0, (TIP.then(1), [2]), (TIP, [1])))


def test_what_is_there_already_costs_credits_until_the_next_outcome():
    queue = made(limit=4)
    queue.add(drafts(0, (TIP, [1, 2])))
    queue.add(drafts(0, (TIP, [1, 2])))
    assert (queue.queued, queue.repeated_tokens) == (2, 2)
    with pytest.raises(ProtocolViolation, match="0 of 4 credits"):
        queue.add(drafts(0, (TIP, [1])))
    assert queue.commit([1]).credits == 3
    queue.add(drafts(1, (TIP.through([1, 2]), [3, 3, 3])))
    assert queue.queued == 4


def test_a_late_branch_goes_on_where_the_outcomes_led_through_it():
    queue = made()
    queue.commit([1, 2])  # a pass without a draft, or with the verifier's own
    queue.add(drafts(0, (TIP, [1, 2, 3]), (TIP.then(1), [2, 4]), (TIP, [1]), (TIP, [2, 2])))
    assert (content(queue), queue.stale_tokens) == ({(3,), (4,)}, 2 + 1 + 1 + 2)
    queue.add(drafts(1, (TIP.through([1, 2, 3]), [5])))  # which a sender that took the outcome knows to be there
    assert queue.window(8) == [3, 5]
    assert queue.commit([3]).credits == 6 + 2


def test_a_late_branch_that_was_given_up_is_dropped_with_what_goes_on_from_it():
    queue = made()
    queue.add(drafts(0, (TIP, [1, 2])))
    queue.commit([3])
    queue.add(drafts(0, (TIP.then(1), [5]), (TIP.through([1, 5]), [6])))
    assert (queue.queued, queue.stale_tokens, queue.commit([1]).credits) == (0, 2, 2)


def test_a_sender_that_lags_behind_what_is_remembered_loses_drafts_and_not_its_session(monkeypatch):
    monkeypatch.setattr(queue_module, "COMMITTED_TOKENS", 2)
    queue = made()
    queue.commit([1, 1])
    queue.commit([1, 1])
    queue.add(drafts(0, (TIP, [1, 1, 1, 1, 2])))  # leads through the tip, which is not known any more
    assert (queue.queued, queue.stale_tokens) == (0, 5)
    queue.add(drafts(2, (TIP.through([1, 1, 1, 1, 2]), [3])))
    assert (queue.queued, queue.stale_tokens) == (0, 6)
    queue.add(drafts(2, (queue.tip, [2, 3])))
    assert queue.window(8) == [2, 3]


def test_a_repeated_message_of_an_old_round_excuses_no_wrong_prefix():
    queue = made()
    queue.add(drafts(0, (TIP, [1, 2])))
    queue.commit([3])
    queue.add(drafts(1, (queue.tip, [1])))
    queue.add(drafts(0, (TIP, [1, 2])))
    with pytest.raises(ProtocolViolation, match="no prefix of round 1"):
        queue.add(drafts(1, (TIP.then(7), [1])))


def test_outcomes_beyond_what_was_drafted():
    queue = made()
    queue.add(drafts(0, (TIP, [1])))
    assert queue.commit([1, 2, 3]) == Committed(1, TIP.through([1, 2, 3]).name, 1, 0)
    queue.add(drafts(0, (TIP.then(1), [2, 3, 4])))
    assert queue.window(8) == [4]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("round", drafts(2, (TIP.then(1), [1]))),
        ("empty", drafts(1, (TIP.then(1), []))),
        ("empty", drafts(1, (TIP.then(1), [1]), (TIP.then(1), []))),
        ("vocabulary", drafts(1, (TIP.then(1), [VOCAB]))),
        ("vocabulary", drafts(0, (TIP.then(2), [2**32 - 1]))),
        ("credits", drafts(1, (TIP.then(1), [0] * 17))),
        ("credits", drafts(1, *[(TIP.then(1), [])] * 17)),
        ("credits", drafts(1, (TIP.then(1), [0] * 9), (TIP.then(1), [0] * 8))),
        ("prefix", drafts(1, (TIP.then(2), [1]))),
        ("prefix", drafts(1, (TIP, [1]))),
        ("prefix", drafts(1, (b"", [1]))),
        ("prefix", drafts(0, (TIP.name + b"0", [1]))),
    ],
)
def test_what_the_contract_forbids_is_named(reason, message):
    queue = made()
    queue.commit([1])
    with pytest.raises(ProtocolViolation) as caught:
        queue.add(message)
    assert caught.value.param == reason


def test_two_prefixes_of_one_name_are_no_defect(monkeypatch):
    same = Prefix.of([0])
    monkeypatch.setattr(Prefix, "then", lambda self, token: same)
    queue = made()
    with pytest.raises(ProtocolViolation, match="both named"):
        queue.add(drafts(0, (TIP, [1, 2])))
    for _ in range(3):
        queue.commit([1, 2])
    queue._forget(len(queue._order))


def test_a_long_chain_comes_and_goes():
    queue = made(limit=50_000)
    queue.add(drafts(0, (TIP, [1] * 50_000)))
    assert queue.commit([2]).credits == 50_000
    assert queue.queued == 0


def test_it_knows_neither_clock_nor_socket():
    imported = {
        name
        for node in ast.walk(ast.parse(Path(queue_module.__file__).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported.isdisjoint({"time", "asyncio", "threading", "socket", "grpc"})


# An honest sender at the other end of a slow link, and the dumb reference: every sequence that ever arrived.


class Honest(RuleBasedStateMachine):
    """What is in flight one way and the other is in order; how late it is, the machine chooses."""

    @initialize(limit=st.integers(1, 24), past=st.sampled_from([1, 2, 5, 4096]))
    def begin(self, limit, past):
        self.queue = DraftQueue(TIP, credits=limit, vocab=VOCAB)
        self.past = past
        self.committed: tuple[int, ...] = ()
        self.arrived: list[tuple[int, ...]] = []  # sequences from the prompt on, as they came
        self.upward: list[list[tuple[tuple[int, ...], list[int], int]]] = []
        self.downward: list[tuple[tuple[int, ...], Committed]] = []
        # The sender's.
        self.credits = limit
        self.round = 0
        self.at: tuple[int, ...] = ()
        self.sent: set[tuple[int, ...]] = set()

    @rule(data=st.data())
    def send(self, data):
        message = []
        while self.credits and len(message) < 3 and data.draw(st.booleans()):
            parents = sorted({self.at, *(one for one in self.sent if one[: len(self.at)] == self.at)})
            parent = data.draw(st.sampled_from(parents))
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=min(4, self.credits)))
            self.credits -= len(tokens)
            self.sent |= {(*parent, *tokens[: count + 1]) for count in range(len(tokens))}
            message.append((parent, tokens, self.round))
        self.upward.append(message)

    @precondition(lambda self: self.upward)
    @rule()
    def arrive(self):
        message = self.upward.pop(0)
        sent = message[0][2] if message else 0
        with patch.object(queue_module, "COMMITTED_TOKENS", self.past):
            self.queue.add(drafts(sent, *((TIP.through(parent), tokens) for parent, tokens, _ in message)))
        for parent, tokens, _ in message:
            self.arrived += [(*parent, *tokens[: count + 1]) for count in range(len(tokens))]

    @rule(accepted=st.integers(0, 4), most=st.integers(0, 4), own=st.lists(st.integers(0, 1), max_size=2))
    def verify(self, accepted, most, own):
        tokens = [*self.queue.window(most)[:accepted], *own] or [0]
        with patch.object(queue_module, "COMMITTED_TOKENS", self.past):
            committed = self.queue.commit(tokens)
        self.committed += tuple(tokens)
        self.downward.append((tuple(tokens), committed))

    @precondition(lambda self: self.downward)
    @rule()
    def take(self):
        tokens, committed = self.downward.pop(0)
        self.at += tokens
        self.round += 1
        self.credits += committed.credits
        assert (committed.round, committed.prefix) == (self.round, TIP.through(self.at).name)

    @invariant()
    def holds_what_goes_on_from_the_tip(self):
        if not hasattr(self, "queue"):
            return
        length = len(self.committed)
        on = [one[length:] for one in self.arrived if one[:length] == self.committed and len(one) > length]
        found = content(self.queue)
        assert (self.queue.round, self.queue.tip.name) == (
            self.round + len(self.downward),
            TIP.through(self.committed).name,
        )
        assert self.queue.queued == len(found)
        assert len(self.queue._past) <= min(self.past, len(self.committed))
        assert len(self.queue._tips) <= len(self.queue._past) + 1
        if self.past == 4096:
            assert found == set(on)
            window: tuple[int, ...] = ()
            while True:
                following = next((one for one in on if one[:-1] == window), None)
                if following is None:
                    break
                window = following
            assert tuple(self.queue.window(99)) == window
        else:  # what is forgotten costs drafts, never the session
            assert found <= set(on)

    @invariant()
    def no_credit_is_lost(self):
        if hasattr(self, "queue"):
            flying = sum(len(tokens) for message in self.upward for _, tokens, _ in message)
            given = sum(committed.credits for _, committed in self.downward)
            held = self.queue.queued + self.queue._freed
            assert self.credits + flying + given + held == self.queue._credits


TestHonest = Honest.TestCase
TestHonest.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# A hostile one.

NAMES = st.sampled_from(
    [TIP.through(path).name for path in ((), (0,), (1,), (0, 0), (0, 1), (1, 1), (0, 0, 0))]
) | st.binary(max_size=NAME_BYTES + 1)
BRANCH = st.builds(
    lambda parent, tokens: lane_pb2.Branch(parent=parent, tokens=tokens),
    NAMES,
    st.lists(st.integers(0, 2) | st.integers(0, 2**32 - 1), max_size=6),
)
MESSAGE = st.builds(
    lambda sent, branches: lane_pb2.Drafts(round=sent, branches=branches),
    st.integers(0, 3) | st.integers(0, 2**32 - 1),
    st.lists(BRANCH, max_size=4),
)


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 12), st.lists(MESSAGE | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), max_size=30))
def test_hostile_messages_meet_violations_and_nothing_else(limit, events):
    with patch.object(queue_module, "COMMITTED_TOKENS", 6):
        queue = DraftQueue(TIP, credits=limit, vocab=VOCAB)
        committed: tuple[int, ...] = ()
        for event in events:
            if isinstance(event, list):
                committed += tuple(event)
                told = queue.commit(event)
                assert (told.prefix, told.queued) == (TIP.through(committed).name, queue.queued)
            else:
                with contextlib.suppress(ProtocolViolation):
                    queue.add(event)
            assert len(content(queue)) == queue.queued == len(queue._nodes) - 1
            assert 0 <= queue.queued + queue._freed <= limit
            assert len(queue._past) <= len(queue._order) <= 6
            assert len(queue._tips) <= 7


def test_branches_are_what_was_drafted_beside_a_window():
    tip = Prefix.of([7])
    queue = DraftQueue(tip, credits=64, vocab=100)
    later = tip.through([1, 2])
    drafted = [(tip, [1, 2, 3, 4]), (later, [5, 6]), (tip, [8, 9]), (later, [10]), (tip.then(8), [11]), (tip, [12])]
    messages = [lane_pb2.Branch(parent=parent.name, tokens=tokens) for parent, tokens in drafted]
    queue.add(lane_pb2.Drafts(branches=messages))
    window = queue.window(8)
    assert window == [1, 2, 3, 4]
    found = [Branch(0, (8, 9), 1), Branch(0, (12,), 2), Branch(2, (5, 6), 1), Branch(2, (10,), 2)]
    assert queue.branches(window, 8) == found
    assert queue.branches(window, 3) == [*found[:2], Branch(2, (5,), 1), Branch(2, (10,), 2)]
    assert queue.branches(window[:2], 8) == found  # what goes on from its end too
    assert queue.branches(window[:1], 8) == found[:2]
    assert queue.branches([1, 50, 51], 8) == found[:2]  # the verifier's own tokens end it
    assert queue.branches(window, 0) == []
    queue.commit([1, 2, 5])
    assert queue.window(8) == [6]
    assert queue.branches([6], 8) == []
