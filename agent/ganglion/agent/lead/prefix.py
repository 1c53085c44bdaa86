"""Which key-value state is kept for later sessions: a pure core at the lead; what it says, every device does.

State is kept in blocks of BLOCK tokens, on every device its own share of them. A block is named by a digest over the
digest of the block before it and its own tokens; the first follows on a root, which differs from tenant to tenant, so
that nobody's prompt meets another's blocks. A position's keys and values depend on the tokens up to it alone, so in
exact classes a session that begins with kept blocks draws the tokens that it would have drawn anyway.

Invariants: a block's parent is kept as long as the block is (by last use a parent comes after its children, and what
was used least recently goes first); a number names at most one block, and there are never more than `capacity`. A
step's keeps are copied before its begins, and begins are copies too: so a number may be given anew with the next step.

BLOCK is 32: on average half a block of what could be found is run again, 1.6 % of a prompt of 1000 tokens, and the copy
of a block is still long against the call that makes it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS as BLOCK


def root_of(*salt: bytes) -> bytes:
    """What chains of blocks begin with; equal for equal sequences of `salt` only."""
    lengths = b"".join(len(part).to_bytes(8, "little") for part in salt)
    return hashlib.sha256(len(salt).to_bytes(8, "little") + lengths + b"".join(salt)).digest()


class Chain:
    """The digests of a session's blocks, from the first on, as far as they were asked for.

    prompt: where the class mixes formats by role, how many tokens the session began with: a block is named by how many
    of its tokens are of the prompt too. None: the roles are alike.
    """

    def __init__(self, root: bytes, prompt: int | None = None) -> None:
        self._root = root
        self._prompt = prompt
        self._keys: list[bytes] = []

    def keys(self, tokens: Sequence[int], blocks: int) -> list[bytes]:
        """Of the first `blocks` blocks of `tokens`, which begin as they did at every call before."""
        for at in range(len(self._keys), blocks):
            parent = self._keys[-1] if self._keys else self._root
            part = np.array(tokens[at * BLOCK : (at + 1) * BLOCK], "<u4").tobytes()
            if self._prompt is not None:
                part += min(max(self._prompt - at * BLOCK, 0), BLOCK).to_bytes(1, "little")
            self._keys.append(hashlib.sha256(parent + part).digest())
        return self._keys[:blocks]


class PrefixIndex:
    """Which blocks are kept under which numbers, at most `capacity`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._numbers: OrderedDict[bytes, int] = OrderedDict()  # by last use, the longest ago first
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The numbers of the leading blocks that are kept, which now are used last."""
        found: list[int] = []
        for key in keys:
            number = self._numbers.get(key)
            if number is None:
                break
            found.append(number)
        self._use(keys[: len(found)])
        return found

    def keep(self, keys: Sequence[bytes]) -> tuple[int, list[int]]:
        """Take in a chain, as much as there is room for: the first block that is new, and the numbers from it on."""
        keys = keys[: self.capacity]
        kept = len(self.find(keys))
        missing = keys[kept:]
        # The chain was just used, so what is used least recently is never of it: both fit.
        numbers = [self._free.pop() if self._free else self._numbers.popitem(last=False)[1] for _ in missing]
        self._numbers.update(zip(missing, numbers, strict=True))
        self._use(keys)
        return kept, numbers

    def clear(self) -> None:
        """Forget every block."""
        self._free.extend(self._numbers.values())
        self._numbers.clear()

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._numbers.move_to_end(key)


class PrefixCache:
    """The index with the sessions that use it, and what the next step has to say of them."""

    def __init__(self, tokens: int, *, by_role: bool = False) -> None:
        """`tokens`: that are kept at most, a multiple of BLOCK; 0: nothing is ever kept or found.

        by_role: keys and values also depend on whether a token is of the prompt.
        """
        self._by_role = by_role
        self._index = PrefixIndex(tokens // BLOCK)
        self._chains: dict[int, Chain] = {}
        self._seen: dict[int, int] = {}  # blocks of a session that were found or kept
        self._keeps: list[Keep] = []
        self._begins: list[Begin] = []

    def open(self, session: int, root: bytes, prompt: int) -> None:
        """A session of `prompt` tokens whose blocks are those of `root` and of no other."""
        if self._index.capacity:
            self._chains[session] = Chain(root, prompt if self._by_role else None)
            self._seen[session] = 0

    def begin(self, session: int, tokens: Sequence[int]) -> int:
        """A session is admitted: how many of its tokens it begins with. Never all: the last one is to be run."""
        if session not in self._chains:
            return 0
        blocks = min((len(tokens) - 1) // BLOCK, self._index.capacity)
        found = self._index.find(self._chains[session].keys(tokens, blocks))
        if found:
            self._begins.append(Begin(session, tuple(found), len(tokens)))
        self._seen[session] = len(found)
        return len(found) * BLOCK

    def ran(self, session: int, tokens: Sequence[int], held: int) -> None:
        """The first `held` of a session's tokens were run, or will be before the next step: their whole blocks stay."""
        blocks = min(held // BLOCK, self._index.capacity)
        if session not in self._chains or blocks <= self._seen[session]:
            return
        self._seen[session] = blocks
        first, numbers = self._index.keep(self._chains[session].keys(tokens, blocks))
        if numbers:
            self._keeps.append(Keep(session, first, tuple(numbers)))

    def close(self, session: int) -> None:
        """A session is over; what it said until now to keep is kept."""
        self._chains.pop(session, None)
        self._seen.pop(session, None)

    def distrust(self, session: int) -> None:
        """A session's numbers are not finite: it leaves nothing, and what is kept may be why, so nothing is found."""
        self.close(session)
        self._index.clear()

    def take(self) -> tuple[tuple[Keep, ...], tuple[Begin, ...]]:
        """What the next step says, in this order: what is kept of the steps before it, and who begins with what."""
        taken = tuple(self._keeps), tuple(self._begins)
        self._keeps, self._begins = [], []
        return taken
