"""Buffers that a step's rows pass through, and the bindings of graphs to them.

A segment reads residual and delta of one parity and writes those of the other, so nothing is copied between segments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Delta = NDArray[np.float64 | np.float32]
BOUND_ROWS = 16  # bindings are kept for so many rows; above, binding anew is small against the run


def as_value(array: NDArray[Any]) -> Any:
    """An OrtValue that shares `array`'s memory; the caller keeps the array alive."""
    return ort.OrtValue.ortvalue_from_numpy(array)


class Rows:
    """Residual [2][capacity, hidden] float32 and delta [2][capacity, hidden] (float64 in exact classes)."""

    def __init__(self, capacity: int, hidden: int, *, exact: bool) -> None:
        self.capacity = capacity
        self.res = tuple(np.zeros((capacity, hidden), np.float32) for _ in range(2))
        self.delta = tuple(np.zeros((capacity, hidden), np.float64 if exact else np.float32) for _ in range(2))
        self._bound: dict[tuple[int, int], Any] = {}

    def bind(self, session: Any, parity: int, rows: int) -> Any:
        """An IOBinding of a segment's residual and delta, in and out, for the first `rows` rows."""
        binding = session.io_binding()
        binding.bind_ortvalue_input("res", as_value(self.res[parity][:rows]))
        binding.bind_ortvalue_input("delta", as_value(self.delta[parity][:rows]))
        binding.bind_ortvalue_output("res_out", as_value(self.res[1 - parity][:rows]))
        binding.bind_ortvalue_output("partial", as_value(self.delta[1 - parity][:rows]))
        return binding

    def columns(self, index: int, session: Any, parity: int, rows: int) -> Any:
        """The binding of segment `index` (axis columns), kept when `rows` is small."""
        binding = self._bound.get((index, rows))
        if binding is None:
            binding = self.bind(session, parity, rows)
            if rows <= BOUND_ROWS:
                self._bound[index, rows] = binding
        return binding
