"""Key-value state on the device, of each session and attention segment [groups, capacity, head_dim]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ganglion.wire.errors import Exhausted, ProtocolViolation
from ganglion.wire.nouns import KV_GRAIN_TOKENS, kv_capacity_tokens
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS as BLOCK


@dataclass(slots=True)
class TorchState:
    """What the device keeps of a session. Invariant: positions below `held` are valid."""

    keys: list[Tensor]
    values: list[Tensor]
    capacity: int
    held: int = 0


class TorchLedger:
    """Opens, grows and drops state within `kv_tokens`, and keeps blocks of it for later sessions."""

    def __init__(
        self,
        groups: Sequence[int],
        head_dim: int,
        *,
        kv_tokens: int,
        blocks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """`groups`: of this device in each attention segment. `blocks`: numbered from 0, kept at most."""
        self._shapes = [(count, head_dim) for count in groups]
        self._token_bytes = 2 * head_dim * sum(groups) * torch.empty(0, dtype=dtype).element_size()
        self._kv_tokens, self._capacity = kv_tokens, blocks
        self._device, self._dtype = device, dtype
        self._states: dict[int, TorchState] = {}
        self._blocks: dict[int, list[Tensor]] = {}
        self._tokens = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes that sessions hold."""
        return self._tokens * self._token_bytes

    def __len__(self) -> int:
        return len(self._states)

    def get(self, session: int) -> TorchState | None:
        """The state of a session, or None."""
        return self._states.get(session)

    def open(self, session: int) -> TorchState:
        """New state of the smallest capacity; raises Exhausted."""
        self._charge(KV_GRAIN_TOKENS)
        state = TorchState(self._buffers(KV_GRAIN_TOKENS), self._buffers(KV_GRAIN_TOKENS), KV_GRAIN_TOKENS)
        self._states[session] = state
        return state

    def reserve(self, state: TorchState, tokens: int) -> bool:
        """Make room for `tokens`; True when the buffers changed. Raises Exhausted."""
        if tokens <= state.capacity:
            return False
        capacity = kv_capacity_tokens(tokens)
        self._charge(capacity - state.capacity)
        for buffers in (state.keys, state.values):
            for index, new in enumerate(self._buffers(capacity)):
                new[:, : state.held] = buffers[index][:, : state.held]
                buffers[index] = new
        state.capacity = capacity
        return True

    @staticmethod
    def copy(source: TorchState, target: TorchState, start: int, stop: int) -> None:
        """Copy the positions start..stop, which `source` holds and `target` has room for; it then holds `stop`."""
        for given, taken in zip((*source.keys, *source.values), (*target.keys, *target.values), strict=True):
            taken[:, start:stop] = given[:, start:stop]
        target.held = stop

    def close(self, session: int) -> None:
        """Drop a session's state; what is not held is no error."""
        state = self._states.pop(session, None)
        if state is not None:
            self._tokens -= state.capacity

    def keep(self, state: TorchState, first: int, numbers: Sequence[int]) -> None:
        """Copy blocks of a session; raises ProtocolViolation for tokens not held and numbers beyond the capacity."""
        if first < 0 or not numbers or (first + len(numbers)) * BLOCK > state.held:
            raise ProtocolViolation(f"blocks {first}..{first + len(numbers)} of a session of {state.held} tokens")
        for at, number in enumerate(numbers, first):
            if not 0 <= number < self._capacity:
                raise ProtocolViolation(f"block {number}; the plan has {self._capacity}")
            places = slice(at * BLOCK, (at + 1) * BLOCK)
            self._blocks[number] = [one[:, places].clone() for one in (*state.keys, *state.values)]

    def copy_to(self, state: TorchState, numbers: Sequence[int]) -> None:
        """Fill a session's first tokens, which it has room for; raises ProtocolViolation for a block never kept."""
        for at, number in enumerate(numbers):
            block = self._blocks.get(number)
            if block is None:
                raise ProtocolViolation(f"block {number} holds nothing; the plan has {self._capacity} blocks")
            for buffer, part in zip((*state.keys, *state.values), block, strict=True):
                buffer[:, at * BLOCK : (at + 1) * BLOCK] = part
        state.held = len(numbers) * BLOCK

    def _buffers(self, tokens: int) -> list[Tensor]:
        # Zeros, not empty: masked positions are multiplied by zero, and zero times NaN is NaN.
        return [
            torch.zeros((groups, tokens, width), dtype=self._dtype, device=self._device)
            for groups, width in self._shapes
        ]

    def _charge(self, tokens: int) -> None:
        if self._tokens + tokens > self._kv_tokens:
            raise Exhausted(
                f"key-value state: {tokens} tokens wanted, {self._kv_tokens - self._tokens} of {self._kv_tokens} are"
                " free; deploy with fewer sessions or a shorter context"
            )
        self._tokens += tokens
