"""Buffers that a step's rows pass through, and the bindings of graphs to them.

A segment reads residual and delta of one parity and writes those of the other, so nothing is copied between segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    res [2][capacity, hidden] float32; delta [2][capacity, hidden] (float64 in exact classes); the others hold as many
    numbers a row as the widest of `segments` leaves, carries, projects and attends.
    """

    def __init__(self, capacity: int, hidden: int, segments: Sequence[LoadedSegment] = (), *, exact: bool) -> None:
        wide: type[np.float64 | np.float32] = np.float64 if exact else np.float32
        self.capacity = capacity
        self.res = tuple(np.zeros((capacity, hidden), np.float32) for _ in range(2))
        self.delta = tuple(np.zeros((capacity, hidden), wide) for _ in range(2))
        self._sums: Delta = np.zeros(capacity * max((one.segment.width for one in segments), default=0), wide)
        carry = max((one.segment.carry * one.groups for one in segments), default=0)
        self._carry = np.zeros(capacity * carry, np.float32)
        self._projected = np.zeros(capacity * max((one.projected for one in segments), default=0), np.float32)
        self._attended = np.zeros(capacity * max((one.attended for one in segments), default=0), np.float32)
        self._bound: dict[tuple[int, int, int], Any] = {}

    def carried(self, one: LoadedSegment, rows: int) -> NDArray[np.float32]:
        """What segment `one` carries: [rows, carry * groups]."""
        width = one.segment.carry * one.groups
        return self._carry[: rows * width].reshape(rows, width)

    def projected(self, one: LoadedSegment, rows: int) -> NDArray[np.float32]:
        """What the first graph of segment `one` leaves for attention: [rows, projected]."""
        return self._projected[: rows * one.projected].reshape(rows, one.projected)

    def attended(self, one: LoadedSegment, rows: int) -> NDArray[np.float32]:
        """What attention leaves for the last graph of segment `one`: [rows, attended]."""
        return self._attended[: rows * one.attended].reshape(rows, one.attended)

    def partial(self, one: LoadedSegment, parity: int, rows: int) -> Delta:
        """Where segment `one`, begun at `parity`, leaves its partial sum: [rows, width]."""
        width = one.segment.width
        if width:
            return self._sums[: rows * width].reshape(rows, width)
        return self.delta[parity if one.segment.takes == "carry" else 1 - parity][:rows]

    def run_first(self, index: int, one: LoadedSegment, before: LoadedSegment | None, parity: int, rows: int) -> None:
        """Run the first (or only) graph of segment `index`; `before`: the segment before it on this device."""
        self._run(index, 0, one, rows, lambda: self._bind_first(one, before, parity, rows))

    def run_last(self, index: int, one: LoadedSegment, parity: int, rows: int) -> None:
        """Run the last graph of segment `index`, which attends."""
        self._run(index, 2, one, rows, lambda: self._bind_last(one, parity, rows))

    def _run(self, index: int, graph: int, one: LoadedSegment, rows: int, bind: Callable[[], Any]) -> None:
        binding = self._bound.get((index, graph, rows))
        if binding is None:
            binding = bind()
            if rows <= BOUND_ROWS:
                self._bound[index, graph, rows] = binding
        one.sessions[graph].run_with_iobinding(binding)

    def _bind_first(self, one: LoadedSegment, before: LoadedSegment | None, parity: int, rows: int) -> Any:
        segment, binding = one.segment, one.sessions[0].io_binding()
        if segment.takes == "carry" and before is not None:
            binding.bind_ortvalue_input("carry", as_value(self.carried(before, rows)))
            binding.bind_ortvalue_input("delta", as_value(self.partial(before, parity, rows)))
        else:
            binding.bind_ortvalue_input("res", as_value(self.res[parity][:rows]))
            binding.bind_ortvalue_input("delta", as_value(self.delta[parity][:rows]))
            binding.bind_ortvalue_output("res_out", as_value(self.res[1 - parity][:rows]))
        if segment.carry and one.groups:
            binding.bind_ortvalue_output("carry", as_value(self.carried(one, rows)))
        if one.attends:
            binding.bind_ortvalue_output("projected", as_value(self.projected(one, rows)))
        else:
            binding.bind_ortvalue_output("partial", as_value(self.partial(one, parity, rows)))
        return binding

    def _bind_last(self, one: LoadedSegment, parity: int, rows: int) -> Any:
        binding = one.sessions[2].io_binding()
        binding.bind_ortvalue_input("attended", as_value(self.attended(one, rows)))
        binding.bind_ortvalue_output("partial", as_value(self.partial(one, parity, rows)))
        return binding
