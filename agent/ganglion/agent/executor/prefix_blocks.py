"""Blocks of key-value state that outlive the session that made them: this device's heads and layers of them.

The lead numbers the blocks and says which sessions leave some and which begin with some; every device does the same
copies. A block is written over when its number is given out again, so nothing is dropped on the wire.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.executor.kv import SessionState
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS as BLOCK


@dataclass(frozen=True, slots=True)
class Keep:
    """Copy a session's blocks `first`, first + 1, ... to the blocks of these numbers."""

    session: int
    first: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """Open a session with the blocks of these numbers as its first tokens, and room for `prompt_tokens`."""

    session: int
    blocks: tuple[int, ...]
    prompt_tokens: int


class PrefixBlocks:
    """At most `capacity` blocks, numbered from 0; memory is taken when a number is first used.

    A block: [2 * groups over the attention segments, BLOCK, head_dim], the keys of every segment, then the values.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: dict[int, NDArray[np.float32]] = {}

    @property
    def bytes(self) -> int:
        """Bytes that the blocks take now."""
        return sum(block.nbytes for block in self._blocks.values())

    def keep(self, state: SessionState, first: int, numbers: Sequence[int]) -> None:
        """Copy blocks of a session; raises ProtocolViolation for tokens not held and numbers beyond the capacity."""
        if first < 0 or not numbers or (first + len(numbers)) * BLOCK > state.held:
            raise ProtocolViolation(f"blocks {first}..{first + len(numbers)} of a session of {state.held} tokens")
        for at, number in enumerate(numbers, first):
            if not 0 <= number < self.capacity:
                raise ProtocolViolation(f"block {number}; the plan has {self.capacity}")
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = _empty(state)
            for rows, buffer in _places(state):
                block[rows] = buffer[0, :, at * BLOCK : (at + 1) * BLOCK]

    def copy_to(self, state: SessionState, numbers: Sequence[int]) -> None:
        """Fill a session's first tokens, which it has room for; raises ProtocolViolation for a block never kept."""
        for at, number in enumerate(numbers):
            block = self._blocks.get(number)
            if block is None:
                raise ProtocolViolation(f"block {number} holds nothing; the plan has {self.capacity} blocks")
            for rows, buffer in _places(state):
                buffer[0, :, at * BLOCK : (at + 1) * BLOCK] = block[rows]
        state.held = len(numbers) * BLOCK


def _places(state: SessionState) -> list[tuple[slice, NDArray[np.float32]]]:
    """Every buffer of a session, and its rows of a block."""
    found, row = [], 0
    for buffer in (*state.keys, *state.values):
        found.append((slice(row, row + buffer.shape[1]), buffer))
        row += buffer.shape[1]
    return found


def _empty(state: SessionState) -> NDArray[np.float32]:
    buffers = (*state.keys, *state.values)
    width = buffers[0].shape[3] if buffers else 0
    return np.empty((sum(buffer.shape[1] for buffer in buffers), BLOCK, width), np.float32)
