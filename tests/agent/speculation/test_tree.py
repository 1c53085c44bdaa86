"""The device's tree against a dumb one, and as the mirror of the verifier's trie under every order of messages."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.speculation.corrections import Corrections
from ganglion.agent.speculation.guessing import NO_GUESS, Guess
from ganglion.agent.speculation.queue import DraftQueue
from ganglion.agent.speculation.tree import DraftTree, Node
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.prefixes import Prefix

PROMPT = (5, 1, 4)
VOCAB = 6
DEEP = 12


def made(credit: int = 32, stop_ids: frozenset[int] = frozenset()) -> DraftTree:
    return DraftTree(PROMPT, credit, corrections=Corrections(), stop_ids=stop_ids)


def guess(*tokens: int) -> Guess:
    return Guess(tokens, tuple(float(-rank) for rank in range(len(tokens))))


def grow(tree: DraftTree, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        for node in tree.frontier(DEEP, 0.001, lambda count: 1.0 + 0.1 * count, 3):
            tokens = rng.sample(range(VOCAB), rng.randrange(5))
            tree.expand(node, guess(*tokens) if tokens else NO_GUESS)


def sent(tree: DraftTree) -> set[tuple[int, ...]]:
    return {tuple(tree.path_of(node)) for node in tree.tip.below() if node.sent}


def content(queue: DraftQueue) -> set[tuple[int, ...]]:
    found, left = set(), [((), queue._root)]
    while left:
        path, node = left.pop()
        for token, child in node.children.items():
            found.add((*path, token))
            left.append(((*path, token), child))
    return found


def outcome(tree: DraftTree, tokens: list[int], credit: int = 0, **said: int) -> lane_pb2.Outcome:
    figures = {"round": tree.rounds + 1, "drafted": len(tokens) - 1, "accepted": len(tokens) - 1} | said
    return lane_pb2.Outcome(prefix=tree.tip.prefix.through(tokens).name, credits=credit, **figures)


# Small cases.


def test_a_chain_is_sent_within_credits_and_survives_an_outcome():
    tree = made(credit=3)
    for token in (1, 2, 3, 4):
        tree.expand(tree.chain_end(DEEP), guess(token, 0))
    (branch,) = tree.take_chain(5)
    assert (branch.parent, list(branch.tokens)) == (Prefix.of(PROMPT).name, [1, 2, 3])
    assert (tree.credits, tree.queued, tree.flying) == (0, 3, True)
    assert not tree.take_chain(5)
    tree.outcome(outcome(tree, [1, 2], 2), [1, 2])
    assert (tree.tokens, tree.credits, tree.queued) == ([*PROMPT, 1, 2], 2, 1)
    assert [node.token for node in tree.chain()] == [3, 4]
    (branch,) = tree.take_chain(5)
    assert (branch.parent, list(branch.tokens)) == (Prefix.of(PROMPT).through([1, 2, 3]).name, [4])
    tree.outcome(outcome(tree, [3, 0], 2), [3, 0])
    assert not tree.chain()
    assert not tree.flying
    assert tree.tip.guess is None


def test_a_correction_is_sent_with_what_follows_it_and_after_the_main_chain():
    tree = made()
    tree.expand(tree.tip, guess(1, 2, 3))
    first, second, third = tree.tip.children
    tree.expand(second, guess(4))
    tree.expand(second.children[0], guess(5))
    branches = tree.take_branches(0.0, DEEP)
    assert [(one.parent, list(one.tokens)) for one in branches] == [
        (tree.tip.prefix.name, [1]),
        (tree.tip.prefix.name, [2, 4, 5]),
    ]
    assert not third.sent
    tree.expand(first, guess(3))
    assert [list(one.tokens) for one in tree.take_branches(0.0, DEEP)] == [[3]]
    tree.outcome(outcome(tree, [2], 2, drafted=1, accepted=0), [2])
    assert [node.token for node in tree.chain()] == [4, 5]
    assert tree.flying


def test_nothing_is_drafted_after_a_stop_id_or_too_deep():
    tree = made(stop_ids=frozenset({1}))
    tree.expand(tree.tip, guess(1, 2))
    assert tree.chain_end(DEEP) is None
    assert tree.frontier(DEEP, 0.0, lambda count: 1.0, 9) == [tree.tip.children[1]]
    assert tree.frontier(1, 0.0, lambda count: 1.0, 9) == []


@pytest.mark.parametrize(
    ("said", "tokens", "match"),
    [
        ({"round": 2}, [1], "outcome 2 where 1 is due"),
        ({"drafted": 1, "accepted": 2}, [1, 2], "2 accepted"),
        ({"drafted": 1, "accepted": 0, "own": 2}, [1], "2 own"),
        ({"drafted": 3, "accepted": 1}, [1, 2, 3], "3 tokens of a pass that accepted 1"),
        ({"credits": 3}, [1], "3 credits given back of 2"),
        ({"prefix": b"12345678"}, [1], "another text"),
    ],
)
def test_what_no_verifier_may_say_is_a_violation_and_changes_nothing(said, tokens, match):
    tree = made()
    tree.expand(tree.tip, guess(1))
    tree.expand(tree.tip.children[0], guess(2))
    tree.take_chain(2)
    message = outcome(tree, tokens)
    for name, value in said.items():
        setattr(message, name, value)
    with pytest.raises(ProtocolViolation, match=match):
        tree.outcome(message, tokens)
    assert (tree.rounds, tree.tokens, tree.queued) == (0, list(PROMPT), 2)


def test_ranks_are_learned_by_margin():
    corrections = Corrections()
    sure, unsure = Guess((1, 2, 3), (9.0, 1.0, 0.0)), Guess((1, 2, 3), (1.0, 0.9, 0.0))
    for number in range(300):
        corrections.saw(sure, 1)
        corrections.saw(unsure, (1, 2, 2, 9)[number % 4])
    assert corrections.likely(sure)[0] > 0.95
    first, second, third = corrections.likely(unsure)
    assert 0.2 < first < 0.35
    assert 0.4 < second < 0.6
    assert third < 0.05
    assert 0.5 < corrections.accept < 0.75
    assert sum(corrections.ranks) <= 1.0


# Against a dumb tree.


def _paths(tree: DraftTree) -> dict[tuple[int, ...], Node]:
    return {tuple(tree.path_of(node)): node for node in (tree.tip, *tree.tip.below())}


@settings(deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 9), st.integers(0, 40))
def test_the_likeliest_nodes_are_drafted_and_sent(rng, steps, credit):
    tree = made(credit)
    grow(tree, rng, steps)
    nodes = _paths(tree)
    for path, node in nodes.items():
        chance = 1.0
        for depth in range(len(path)):
            above = nodes[path[:depth]]
            chance *= tree.corrections.likely(above.guess)[above.guess.tokens.index(path[depth])]
        assert node.path == pytest.approx(chance)
        assert node.depth == len(path)
    best = tree.frontier(DEEP, 0.001, lambda count: 1e-9 + count**0, 4)
    waiting = sorted((node.path for node in nodes.values() if node.guess is None), reverse=True)
    assert [node.path for node in best] == [path for path in waiting[:4] if path >= 0.001]
    branches = tree.take_branches(0.0, DEEP)
    names = {tree.tip.prefix.name: ()}
    order = []
    for branch in branches:
        path = names[branch.parent]  # whose parent was there before it
        for token in branch.tokens:
            path = (*path, token)
            order.append(path)
            names[nodes[path].prefix.name] = path
    assert len(order) == len(set(order)) <= credit
    assert set(order) == sent(tree)
    for path in order:
        first = nodes[path[:-1]].children[0]
        assert nodes[path] is first or order.index(tuple(tree.path_of(first))) < order.index(path)
    if len(order) < credit:  # nothing that is worth it was left out
        left = [node for node in nodes.values() if node.parent and not node.sent]
        assert all(not node.above.sent or (node is not node.above.children[0] and not node.children) for node in left)
    if branches:
        assert branches[0].tokens[0] == tree.tip.children[0].token


# The mirror and the original.


@settings(deadline=None, max_examples=150)
@given(st.randoms(use_true_random=False), st.integers(1, 40), st.integers(20, 120))
def test_the_mirror_agrees_with_the_verifiers_trie_after_any_interleaving(rng, credit, steps):
    """Messages and outcomes each arrive in order, at any time; nothing is a violation and no credit is lost."""
    tree, queue = made(credit), DraftQueue(Prefix.of(PROMPT), credits=credit, vocab=VOCAB)
    there: deque[lane_pb2.Drafts] = deque()
    back: deque[tuple[lane_pb2.Outcome, list[int]]] = deque()

    def send() -> None:
        if rng.random() < 0.5:
            branches = tree.take_chain(rng.randrange(1, 5))
        else:
            branches = tree.take_branches(rng.choice((0.0, 0.02, 0.2)), rng.randrange(1, DEEP))
        if branches:
            there.append(lane_pb2.Drafts(round=tree.rounds, branches=branches))

    def verify() -> None:
        window = queue.window(rng.randrange(1, 5))
        accepted = rng.randrange(len(window) + 1)
        tokens = [*window[:accepted], rng.randrange(VOCAB)]
        if accepted < len(window) and tokens[-1] == window[accepted]:
            tokens[-1] = (tokens[-1] + 1) % VOCAB
        said = queue.commit(tokens)
        told = lane_pb2.Outcome(
            round=said.round,
            prefix=said.prefix,
            drafted=len(window),
            accepted=accepted,
            credits=said.credits,
            queued=said.queued,
        )
        back.append((told, tokens))

    def arrive() -> None:
        if there:
            queue.add(there.popleft())

    def hear() -> None:
        if back:
            told, tokens = back.popleft()
            tree.outcome(told, tokens)
            assert told.queued <= tree.queued

    for _ in range(steps):
        rng.choice((lambda: grow(tree, rng, 1), send, send, verify, arrive, arrive, hear, hear))()
        assert 0 <= tree.credits <= credit
        assert tree.queued <= credit - tree.credits
    while there or back:
        arrive()
        hear()
    assert (tree.tip.prefix.name, tree.rounds) == (queue.tip.name, queue.round)
    assert sent(tree) == content(queue)
    chain = [node.token for node in tree.chain() if node.sent]
    assert queue.window(64) == chain
    verify()
    hear()
    assert tree.credits + queue.queued == credit  # all that is not in the trie has come back


def test_the_interleavings_are_not_trivial():
    """Of the same schedule: late branches that attach, late ones that do not, and hits all occur."""
    seen: set[str] = set()
    for seed in range(60):
        rng = random.Random(seed)
        tree, queue = made(24), DraftQueue(Prefix.of(PROMPT), credits=24, vocab=VOCAB)
        grow(tree, rng, 6)
        late = lane_pb2.Drafts(round=0, branches=tree.take_branches(0.0, DEEP))
        tokens = [node.token for node in tree.chain()[:2]] if seed % 2 else [rng.randrange(VOCAB)]
        if not tokens or not late.branches:
            continue
        queue.commit(tokens)
        stale = queue.stale_tokens
        queue.add(late)
        seen.add("attached" if queue.queued else "dropped")
        assert queue.stale_tokens > stale
    assert seen == {"attached", "dropped"}
