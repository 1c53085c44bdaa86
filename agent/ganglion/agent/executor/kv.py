"""Key-value state: one contiguous buffer per session and attention segment, in capacities of 512 * 2^n tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import Exhausted
from ganglion.wire.nouns import KV_GRAIN_TOKENS, kv_capacity_tokens


@dataclass(frozen=True, slots=True)
class Take:
    """Before its rows a session takes the rows from position `first` on to where they start from session `source`."""

    source: int
    first: int


@dataclass(slots=True)
class SessionState:
    """What a device keeps of one session.

    keys, values: per attention segment [1, groups, capacity, head_dim] float32 (no groups where this device has none).
    seqlens, total: int32 [1], inputs of the graphs, changed in place. Invariant: positions below `held` are valid.
    """

    keys: list[NDArray[np.float32]]
    values: list[NDArray[np.float32]]
    capacity: int
    held: int = 0
    seqlens: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, np.int32))
    total: NDArray[np.int32] = field(default_factory=lambda: np.zeros(1, np.int32))

    def take(self, source: SessionState, layer: int, start: int, stop: int) -> None:
        """Copy the positions start..stop of one attention segment, for which there is room."""
        for given, taken in ((source.keys, self.keys), (source.values, self.values)):
            taken[layer][:, :, start:stop] = given[layer][:, :, start:stop]


class KeyValueLedger:
    """Opens, grows and drops the state of sessions within `budget_bytes`."""

    def __init__(self, groups: list[int], head_dim: int, budget_bytes: int) -> None:
        """`groups`: head groups of this device in each attention segment."""
        self._groups = groups
        self._head_dim = head_dim
        self._budget_bytes = budget_bytes
        self._states: dict[int, SessionState] = {}
        self.kv_bytes = 0

    @staticmethod
    def bytes_per_token(groups: list[int], head_dim: int) -> int:
        """Bytes of keys and values of one token."""
        return 2 * 4 * head_dim * sum(groups)

    def __len__(self) -> int:
        return len(self._states)

    def get(self, session: int) -> SessionState | None:
        """The state of a session, or None when it was never opened or is dropped."""
        return self._states.get(session)

    def open(self, session: int) -> SessionState:
        """New state of the smallest capacity; raises Exhausted naming the figures."""
        self._charge(KV_GRAIN_TOKENS)
        # Zeros, not empty: masked positions are multiplied by zero, and zero times NaN is NaN.
        shapes = [(1, groups, KV_GRAIN_TOKENS, self._head_dim) for groups in self._groups]
        state = SessionState(
            [np.zeros(shape, np.float32) for shape in shapes],
            [np.zeros(shape, np.float32) for shape in shapes],
            KV_GRAIN_TOKENS,
        )
        self._states[session] = state
        return state

    def reserve(self, state: SessionState, tokens: int) -> bool:
        """Make room for `tokens`, by copying into larger buffers; True when the buffers changed. Raises Exhausted."""
        if tokens <= state.capacity:
            return False
        capacity = kv_capacity_tokens(tokens)
        self._charge(capacity - state.capacity)
        for buffers in (state.keys, state.values):
            for index, old in enumerate(buffers):
                new = np.zeros((1, old.shape[1], capacity, self._head_dim), np.float32)
                new[:, :, : state.held] = old[:, :, : state.held]
                buffers[index] = new
        state.capacity = capacity
        return True

    @staticmethod
    def copy(source: SessionState, target: SessionState, start: int, stop: int) -> None:
        """Copy the positions start..stop, which `source` holds and `target` has room for; it then holds `stop`."""
        for given, taken in ((source.keys, target.keys), (source.values, target.values)):
            for old, new in zip(given, taken, strict=True):
                new[:, :, start:stop] = old[:, :, start:stop]
        target.held = stop

    def close(self, session: int) -> None:
        """Drop a session's state; what is not held is no error, as a cancelled session may never have run."""
        state = self._states.pop(session, None)
        if state is not None:
            self.kv_bytes -= state.capacity * self.bytes_per_token(self._groups, self._head_dim)

    def _charge(self, tokens: int) -> None:
        wanted = tokens * self.bytes_per_token(self._groups, self._head_dim)
        if self.kv_bytes + wanted > self._budget_bytes:
            raise Exhausted(
                f"key-value state: {wanted} bytes wanted, {self._budget_bytes - self.kv_bytes} of"
                f" {self._budget_bytes} are free; deploy with fewer sessions or a shorter context"
            )
        self.kv_bytes += wanted
