"""The verifier's trie of drafted tokens: what the next passes may verify. Pure: messages and outcomes in, windows out.

The trie is rooted at the committed prefix, its *tip*. Invariant: whatever messages and outcomes came, and in whatever
order, it holds what goes on from the tip of all that was drafted. A sender that has taken the same outcomes can so work
out what is in it, and a parent that is unknown in its own round is a wrong digest, not a late one. For that a branch
that begins before the tip (its sender had not seen the last outcomes) is followed along the tokens committed since.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ganglion.agent.speculation.branching import Branch
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.prefixes import NAME_BYTES, Prefix

COMMITTED_TOKENS: Final = 4096  # that a sender may lag behind; branches from before them are dropped


class _Node:
    """A drafted token, by the prefix that ends with it. Children in the order in which they were drafted."""

    __slots__ = ("children", "prefix")

    def __init__(self, prefix: Prefix) -> None:
        self.prefix = prefix
        self.children: dict[int, _Node] = {}


def _down(node: _Node, most: int) -> list[int]:
    """What goes on from a node by what was drafted first, at most so many tokens."""
    found: list[int] = []
    while node.children and len(found) < most:
        token, node = next(iter(node.children.items()))
        found.append(token)
    return found


@dataclass(frozen=True, slots=True)
class Committed:
    """What an outcome says of the queue: its number, the new tip's name, credits given back, tokens that are left."""

    round: int
    prefix: bytes
    credits: int
    queued: int


class DraftQueue:
    """Drafted tokens of one session. Memory is bounded by `credits` and COMMITTED_TOKENS, work by the tokens that come.

    `stale_tokens`: dropped when they came: outcomes that their sender had not seen led elsewhere or past them.
    `repeated_tokens`: were in the trie already.
    """

    def __init__(self, tip: Prefix, *, credits: int, vocab: int) -> None:  # noqa: A002 - the contract's word
        """`tip`: of the prompt. `credits`: tokens sent and not given back at most. `vocab`: ids are below it."""
        self.round = 0
        self.stale_tokens = 0
        self.repeated_tokens = 0
        self._credits = credits
        self._vocab = vocab
        self._root = _Node(tip)
        self._nodes = {tip.name: self._root}  # of the trie, the tip among them
        self._freed = 0  # tokens that are not in the trie and whose credits the next outcome gives back
        self._taken = 0  # outcomes that the sender is known to have taken
        # The committed tokens since then: by the prefix before each the token and the prefix after it; and in order.
        self._past: dict[bytes, tuple[int, bytes]] = {}
        self._order: deque[bytes] = deque()
        self._forgotten = 0  # tokens committed before those
        self._tips = deque([0])  # tokens committed when a round began, of the last rounds; the last one is `round`
        self._gap = False  # a branch was dropped that might have led through the tip

    @property
    def tip(self) -> Prefix:
        """Everything committed."""
        return self._root.prefix

    @property
    def queued(self) -> int:
        """Tokens in the trie, below the tip."""
        return len(self._nodes) - 1

    def add(self, drafts: lane_pb2.Drafts) -> None:
        """Take a message; raises ProtocolViolation, after which the session must end, with the reason as its `param`.

        "round": of outcomes that have not been told. "credits": more tokens than are left. "empty": a branch without
        tokens. "vocabulary": an id outside. "prefix": a parent that is no prefix of the sender's round.
        """
        if drafts.round > self.round:
            raise ProtocolViolation(
                f"drafts of round {drafts.round}, where {self.round} outcomes have been told", param="round"
            )
        self._check(drafts.branches)
        self._taken = max(self._taken, drafts.round)
        self._forget_before(drafts.round)
        for branch in drafts.branches:
            self._attach(drafts.round, branch.parent, branch.tokens)

    def _check(self, branches: Sequence[lane_pb2.Branch]) -> None:
        # Nothing is copied before it is known to be few.
        free = self._credits - self.queued - self._freed
        count = len(branches)
        if count <= free:
            if not all(branch.tokens for branch in branches):
                raise ProtocolViolation("a drafted branch without tokens", param="empty")
            count = sum(len(branch.tokens) for branch in branches)
        if count > free:
            raise ProtocolViolation(
                f"{count} drafted tokens or more, where {free} of {self._credits} credits are left", param="credits"
            )
        for branch in branches:
            if len(branch.parent) != NAME_BYTES:
                raise ProtocolViolation(
                    f"a drafted branch whose parent has {len(branch.parent)} bytes, not {NAME_BYTES}", param="prefix"
                )
            if (highest := max(branch.tokens)) >= self._vocab:
                raise ProtocolViolation(
                    f"drafted token id {highest}, where the vocabulary has {self._vocab}", param="vocabulary"
                )

    def _attach(self, sent: int, parent: bytes, tokens: Sequence[int]) -> None:
        node, at = self._nodes.get(parent), 0
        if node is None:
            while at < len(tokens) and (step := self._past.get(parent)) is not None and step[0] == tokens[at]:
                parent, at = step[1], at + 1
            if parent != self._root.prefix.name:
                self._drop(sent, parent, len(tokens))
                return
            node = self._root
            self._free_stale(at)
        for token in tokens[at:]:
            node = self._child(node, token)

    def _child(self, node: _Node, token: int) -> _Node:
        if (child := node.children.get(token)) is not None:
            self.repeated_tokens += 1
            self._freed += 1
            return child
        child = _Node(node.prefix.then(token))
        name = child.prefix.name
        if name in self._nodes:  # 8 bytes: who tries 2^32 prefixes finds two of one name
            raise ProtocolViolation(f"two drafted prefixes are both named {name.hex()}", param="prefix")
        node.children[token] = self._nodes[name] = child
        return child

    def _drop(self, sent: int, parent: bytes, count: int) -> None:
        """A branch that does not lead through the tip, or of which that cannot be known."""
        if parent not in self._past and not self._gap:
            if sent == self.round:
                raise ProtocolViolation(
                    f"a drafted branch goes on from {parent.hex()}, which is no prefix of round {sent}", param="prefix"
                )
            self._gap = sent == self._taken and self.round - sent >= len(self._tips)
        self._free_stale(count)

    def _free_stale(self, count: int) -> None:
        self.stale_tokens += count
        self._freed += count

    def window(self, most: int) -> list[int]:
        """What the next pass verifies: down from the tip by what was drafted first, at most so many tokens."""
        return _down(self._root, most)

    def branches(self, window: Sequence[int], most: int) -> list[Branch]:
        """What was drafted otherwise than `window`, by where it goes on from it: down by what was drafted first.

        At most `most` tokens from the tip on.
        """
        found, node = list[Branch](), self._root
        for at in range(min(len(window) + 1, most)):
            going = window[at] if at < len(window) else None
            for rank, (first, child) in enumerate(node.children.items()):
                if rank and first != going:
                    found.append(Branch(at, (first, *_down(child, most - at - 1)), rank))
            following = node.children.get(going) if going is not None else None
            if following is None:
                break
            node = following
        return found

    def commit(self, tokens: Sequence[int]) -> Committed:
        """The outcome of a pass: the tip moves along `tokens` (the accepted ones and the next), drafted or not.

        At least one. What was drafted and does not go on from the new tip is dropped, and its credits are given back.
        """
        self.round += 1
        before = self.queued
        for token in tokens:
            root = self._root
            following = root.children.pop(token, None) or _Node(root.prefix.then(token))
            self._prune(root)
            self._past[root.prefix.name] = token, following.prefix.name
            self._order.append(root.prefix.name)
            self._root = self._nodes[following.prefix.name] = following
        self._tips.append(self._forgotten + len(self._order))
        self._forget(len(self._order) - COMMITTED_TOKENS)
        while self._tips[0] < self._forgotten:
            self._tips.popleft()
        freed, self._freed = self._freed + before - self.queued, 0
        return Committed(self.round, self.tip.name, freed, self.queued)

    def _prune(self, top: _Node) -> None:
        """Drop a node and what goes on from it."""
        dropped = [top]
        while dropped:
            node = dropped.pop()
            dropped += node.children.values()
            del self._nodes[node.prefix.name]

    def _forget_before(self, sent: int) -> None:
        """Its sender has taken `sent` outcomes: what it drafts from now on begins at their tip or after it."""
        while self.round - sent < len(self._tips) - 1:
            self._tips.popleft()
        self._forget(self._tips[0] - self._forgotten)

    def _forget(self, count: int) -> None:
        for _ in range(count):
            self._past.pop(self._order.popleft(), None)
            self._forgotten += 1
