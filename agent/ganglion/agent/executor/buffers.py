"""Buffers that a step's rows pass through, and the bindings of graphs to them.

A segment reads residual and delta of one parity and writes those of the other, so nothing is copied between segments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ganglion.agent.executor.loader import LoadedSegment

Delta = NDArray[np.float64 | np.float32]
BOUND_ROWS = 16  # bindings are kept for so many rows; above, binding anew is small against the run


def as_value(array: NDArray[Any]) -> Any:
    """An OrtValue that shares `array`'s memory; the caller keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class Rows:
    """Buffers of `capacity` rows.

    res [2][capacity, hidden] float32; delta [2][capacity, hidden] (float64 in exact classes); sums and carry hold as
    many numbers a row as the widest segment leaves and carries.
    """

    def __init__(self, capacity: int, hidden: int, *, exact: bool, sums: int = 0, carry: int = 0) -> None:
        wide: type[np.float64 | np.float32] = np.float64 if exact else np.float32
        self.capacity = capacity
        self.res = tuple(np.zeros((capacity, hidden), np.float32) for _ in range(2))
        self.delta = tuple(np.zeros((capacity, hidden), wide) for _ in range(2))
        self._sums: Delta = np.zeros(capacity * sums, wide)
        self._carry = np.zeros(capacity * carry, np.float32)
        self._bound: dict[tuple[int, int], Any] = {}

    def carried(self, one: LoadedSegment, rows: int) -> NDArray[np.float32]:
        """What segment `one` carries: [rows, carry * groups]."""
        width = one.segment.carry * one.groups
        return self._carry[: rows * width].reshape(rows, width)

    def partial(self, one: LoadedSegment, parity: int, rows: int) -> Delta:
        """Where segment `one`, begun at `parity`, leaves its partial sum: [rows, width]."""
        width = one.segment.width
        if width:
            return self._sums[: rows * width].reshape(rows, width)
        return self.delta[parity if one.segment.takes == "carry" else 1 - parity][:rows]

    def bind(self, one: LoadedSegment, before: LoadedSegment | None, parity: int, rows: int) -> Any:
        """An IOBinding of segment `one` for the first `rows` rows; `before`: the segment before it on this device."""
        segment, binding = one.segment, one.session.io_binding()  # type: ignore[union-attr]
        if segment.takes == "carry" and before is not None:
            binding.bind_ortvalue_input("carry", as_value(self.carried(before, rows)))
            binding.bind_ortvalue_input("delta", as_value(self.partial(before, parity, rows)))
        else:
            binding.bind_ortvalue_input("res", as_value(self.res[parity][:rows]))
            binding.bind_ortvalue_input("delta", as_value(self.delta[parity][:rows]))
            binding.bind_ortvalue_output("res_out", as_value(self.res[1 - parity][:rows]))
        if segment.carry and one.groups:
            binding.bind_ortvalue_output("carry", as_value(self.carried(one, rows)))
        binding.bind_ortvalue_output("partial", as_value(self.partial(one, parity, rows)))
        return binding

    def stateless(self, index: int, one: LoadedSegment, before: LoadedSegment | None, parity: int, rows: int) -> Any:
        """The binding of segment `index`, which has no key-value state; kept when `rows` is small."""
        binding = self._bound.get((index, rows))
        if binding is None:
            binding = self.bind(one, before, parity, rows)
            if rows <= BOUND_ROWS:
                self._bound[index, rows] = binding
        return binding
