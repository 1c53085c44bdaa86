"""The drafting device's tree: what the verifier holds of its drafts, and what is drafted and not sent. A pure core.

The root is the *tip*: everything committed, as of the last outcome taken. A node is a token that may follow; the path
to it has a probability, by which it is chosen to be drafted on from and to be sent.

Invariants: the parent of a sent node is sent or the tip; the first child of a node is sent before the others, so the
verifier's window, which goes down first children, is the main chain. Sent nodes below the tip are what the verifier
holds once all messages have arrived: a branch that arrives after an outcome is followed along what was committed.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ganglion.agent.speculation.corrections import RANKS, Corrections
from ganglion.agent.speculation.guessing import Guess
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.prefixes import Prefix


@dataclass(slots=True, eq=False)
class Node:
    """A token after `parent` (the tip has none); `children` by rank of the guess that was made there."""

    token: int
    prefix: Prefix
    parent: Node | None = None
    likely: float = 1.0  # given its parent
    path: float = 1.0  # from the tip
    depth: int = 0  # tokens below the tip
    sent: bool = False
    guess: Guess | None = None  # None: nothing is drafted from here
    children: list[Node] = field(default_factory=list)

    @property
    def above(self) -> Node:
        """Its parent; the tip's is the tip."""
        return self.parent or self

    def below(self) -> Iterator[Node]:
        """Every node below it, parents first."""
        stack = self.children[::-1]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))


class DraftTree:
    """Of one session. `credits`: of the verifier's Terms. `stop_ids`: nothing is drafted after them."""

    def __init__(
        self, tokens: Sequence[int], credit: int, *, corrections: Corrections, stop_ids: frozenset[int] = frozenset()
    ) -> None:
        self.tokens = list(tokens)  # committed
        self.tip = Node(-1, Prefix.of(tokens), sent=True)
        self.rounds = 0  # outcomes taken
        self.credits = credit
        self.corrections = corrections
        self._stop_ids = stop_ids
        self._lent = 0  # credits spent and not given back

    # What is known.

    def path_of(self, node: Node) -> list[int]:
        """The tokens from the tip to a node, its own last."""
        found = []
        at: Node | None = node
        while at is not None and at.parent is not None:
            found.append(at.token)
            at = at.parent
        return found[::-1]

    def chain(self) -> list[Node]:
        """The main chain: from the tip down first children, the tip itself not included."""
        found, node = [], self.tip
        while node.children:
            node = node.children[0]
            found.append(node)
        return found

    @property
    def queued(self) -> int:
        """Sent tokens below the tip: the verifier holds them, or will."""
        return sum(1 for node in self.tip.below() if node.sent)

    @property
    def flying(self) -> bool:
        """Whether the verifier has, or will have, a window for its next pass."""
        return bool(self.tip.children) and self.tip.children[0].sent

    @property
    def expanded(self) -> int:
        """Nodes that were drafted from, the tip included."""
        return (self.tip.guess is not None) + sum(1 for node in self.tip.below() if node.guess is not None)

    # What is drafted.

    def chain_end(self, deepest: int) -> Node | None:
        """Where the main chain would go on; None where it is `deepest` tokens long or cannot go on."""
        chain = self.chain()
        end = chain[-1] if chain else self.tip
        return end if self._open(end, deepest) else None

    def frontier(self, deepest: int, least: float, step_s: Callable[[int], float], width: int) -> list[Node]:
        """Where to draft next, in one step of the drafter: the likeliest, at most `width`, of probability `least` on.

        step_s: seconds of a step by the nodes in it; as many are taken as give the most probability a second.
        """
        nodes = [self.tip, *self.tip.below()]
        found = [node for node in nodes if node.path >= least and self._open(node, deepest)]
        best = heapq.nlargest(width, found, key=lambda node: node.path)
        count, rate, mass = 0, 0.0, 0.0
        for number, node in enumerate(best, 1):
            mass += node.path
            if mass / step_s(number) > rate:
                count, rate = number, mass / step_s(number)
        return best[:count]

    def _open(self, node: Node, deepest: int) -> bool:
        return node.guess is None and node.depth < deepest and node.token not in self._stop_ids

    def expand(self, node: Node, guess: Guess) -> None:
        """Take the drafter's guess at what follows a node that has none yet; candidates beyond RANKS are left out."""
        node.guess = guess
        for token, likely in zip(guess.tokens[:RANKS], self.corrections.likely(guess), strict=False):
            path = node.path * likely
            node.children.append(Node(token, node.prefix.then(token), node, likely, path, node.depth + 1))

    # What is sent.

    def take_chain(self, count: int) -> list[lane_pb2.Branch]:
        """The next `count` unsent tokens of the main chain, or as many as there are and credits allow: a branch."""
        waiting = [node for node in self.chain() if not node.sent][: min(count, self.credits)]
        return self._send(waiting)

    def take_branches(self, least: float, deepest: int) -> list[lane_pb2.Branch]:
        """Everything unsent that is worth sending, of probability `least` on, the likelier first, as credits allow.

        A correction is worth it only with what follows it: the verifier finds a correction by itself.
        """
        heap: list[tuple[float, int, Node]] = []
        order = 0

        def offer(nodes: Sequence[Node]) -> None:
            nonlocal order
            for node in nodes:
                if node.path >= least and node.depth <= deepest:
                    heapq.heappush(heap, (-node.path, order, node))
                    order += 1

        chosen: list[Node] = []
        offer(self.tip.children[:1])
        while heap and len(chosen) < self.credits:
            node = heapq.heappop(heap)[2]
            if not node.sent:
                chosen.append(node)
            if node is node.above.children[0]:  # the first one is sent before the others
                offer([other for other in node.above.children[1:] if other.children])
            offer(node.children[:1])
        return self._send(chosen)

    def _send(self, chosen: Sequence[Node]) -> list[lane_pb2.Branch]:
        """Mark nodes as sent and put them into branches, the main chain's first, one for as long a chain as may be."""
        for node in chosen:
            node.sent = True
        self.credits -= len(chosen)
        self._lent += len(chosen)
        picked = set(map(id, chosen))
        starts = [node for node in chosen if id(node.above) not in picked or node is not self._next(node.above, picked)]
        main = set(map(id, self.chain()))
        starts.sort(key=lambda node: id(node) not in main)
        branches: list[lane_pb2.Branch] = []
        for start in starts:
            tokens, at = [start.token], self._next(start, picked)
            while at is not None:
                tokens.append(at.token)
                at = self._next(at, picked)
            branches.append(lane_pb2.Branch(parent=start.above.prefix.name, tokens=tokens))
        return branches

    @staticmethod
    def _next(node: Node, picked: set[int]) -> Node | None:
        return next((child for child in node.children if id(child) in picked), None)

    # What comes back.

    def outcome(self, outcome: lane_pb2.Outcome, tokens: Sequence[int]) -> None:
        """Take a pass's outcome and its tokens: the tip moves, what goes on from there stays, the rest is dropped.

        Raises ProtocolViolation for what no verifier may say: a round out of turn, more accepted than drafted, tokens
        that are not those, another prefix, credits that were not spent.
        """
        if outcome.round != self.rounds + 1:
            raise ProtocolViolation(f"outcome {outcome.round} where {self.rounds + 1} is due")
        if outcome.accepted > outcome.drafted or outcome.own + outcome.beside > outcome.drafted:
            raise ProtocolViolation(
                f"an outcome with {outcome.accepted} accepted and {outcome.own} own of {outcome.drafted} drafted tokens"
            )
        if len(tokens) > outcome.accepted + 1:  # fewer: the answer ended within the window
            raise ProtocolViolation(f"{len(tokens)} tokens of a pass that accepted {outcome.accepted}")
        if outcome.credits > self._lent:
            raise ProtocolViolation(f"{outcome.credits} credits given back of {self._lent} that were spent")
        if self.tip.prefix.through(tokens).name != outcome.prefix:
            raise ProtocolViolation(f"outcome {outcome.round} is of another text: its prefix is not that of its tokens")
        self.rounds += 1
        self.credits += outcome.credits
        self._lent -= outcome.credits
        self._move(tokens)

    def _move(self, tokens: Sequence[int]) -> None:
        node = self.tip
        for token in tokens:
            self.tokens.append(token)
            if node.guess is not None and node.guess.tokens:
                self.corrections.saw(node.guess, token)
            found = next((child for child in node.children if child.token == token), None)
            node = found or Node(token, node.prefix.then(token))
        self.tip = node
        node.parent, node.likely, node.path, node.depth, node.sent, node.token = None, 1.0, 1.0, 0, True, -1
        self._reweigh(node)  # by what was learned meanwhile
        for below in node.below():
            self._reweigh(below)
            below.path = below.above.path * below.likely
            below.depth = below.above.depth + 1

    def _reweigh(self, node: Node) -> None:
        if node.guess is None:
            return
        for child, likely in zip(node.children, self.corrections.likely(node.guess), strict=False):
            child.likely = likely
