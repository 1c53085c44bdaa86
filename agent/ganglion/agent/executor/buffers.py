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
from ganglion.agent.executor.mixing import Routed, Sums
from ganglion.agent.roles import Role

Place = tuple[Role, int]
"""A segment by the role whose layers it is of, and its number among them."""
Delta = Sums
BOUND_ROWS = 16  # bindings are kept for so many rows; above, binding anew is small against the run
BOUND_PAIRS = 128  # of rows and experts that buffers are kept for


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
        each = max((one.segment.experts for one in segments if one.routes), default=0)
        self._routed = np.zeros(capacity * hidden if each else 0, np.float32)
        self._chosen = np.zeros(capacity * each, np.int64)
        self._weights = np.zeros(capacity * each, np.float32)
        self._bound: dict[tuple[Place, int, int], Any] = {}

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

    def routed(self, one: LoadedSegment, rows: int) -> Routed:
        """What routing leaves for the experts of segment `one`."""
        each, hidden = one.segment.experts, self.res[0].shape[1]
        return Routed(
            self._routed[: rows * hidden].reshape(rows, hidden),
            self._chosen[: rows * each].reshape(rows, each),
            self._weights[: rows * each].reshape(rows, each),
        )

    def partial(self, one: LoadedSegment, parity: int, rows: int) -> Delta:
        """Where segment `one`, begun at `parity`, leaves its partial sum: [rows, width]."""
        width = one.segment.width
        if width:
            return self._sums[: rows * width].reshape(rows, width)
        return self.delta[parity if one.segment.takes == "carry" else 1 - parity][:rows]

    def run_first(self, place: Place, one: LoadedSegment, before: LoadedSegment | None, parity: int, rows: int) -> None:
        """Run the first (or only) graph of the segment at `place`; `before`: the segment before it on this device."""
        self._run(place, 0, one, rows, lambda: self._bind_first(one, before, parity, rows))

    def run_last(self, place: Place, one: LoadedSegment, parity: int, rows: int) -> None:
        """Run the last graph of the segment at `place`, which attends."""
        self._run(place, 2, one, rows, lambda: self._bind_last(one, parity, rows))

    def _run(self, place: Place, graph: int, one: LoadedSegment, rows: int, bind: Callable[[], Any]) -> None:
        binding = self._bound.get((place, graph, rows))
        if binding is None:
            binding = bind()
            if rows <= BOUND_ROWS:
                self._bound[place, graph, rows] = binding
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
        if one.routes:
            routed = self.routed(one, rows)
            for name in ("rows", "chosen", "weights"):
                binding.bind_ortvalue_output(name, as_value(getattr(routed, name)))
        elif one.attends:
            binding.bind_ortvalue_output("projected", as_value(self.projected(one, rows)))
        else:
            binding.bind_ortvalue_output("partial", as_value(self.partial(one, parity, rows)))
        return binding

    def _bind_last(self, one: LoadedSegment, parity: int, rows: int) -> Any:
        binding = one.sessions[2].io_binding()
        binding.bind_ortvalue_input("attended", as_value(self.attended(one, rows)))
        binding.bind_ortvalue_output("partial", as_value(self.partial(one, parity, rows)))
        return binding


class Pairs:
    """Rows that go through experts, each through one: buffers for up to `BOUND_PAIRS`, and the bindings to them."""

    def __init__(self, hidden: int) -> None:
        self._rows, self._given = (np.zeros((BOUND_PAIRS, hidden), np.float32) for _ in range(2))
        self._place = np.zeros(BOUND_PAIRS, np.int64)
        self._bound: dict[tuple[Place, int], Any] = {}

    def run(
        self, place: Place, one: LoadedSegment, rows: NDArray[np.float32], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """What the experts of the segment at `place` give: [R, hidden], valid until the next run.

        rows: float32 [R, hidden], or [S, hidden] of which each is repeated R / S times. index: int64 [R], of a row's
        expert among those held.
        """
        pairs, session = len(index), one.experts
        if session is None or not pairs:
            return np.zeros((pairs, rows.shape[1]), np.float32)
        repeats = pairs // len(rows)
        if pairs > BOUND_PAIRS:
            repeated = np.repeat(rows, repeats, axis=0) if repeats > 1 else np.ascontiguousarray(rows)
            given: NDArray[np.float32] = session.run(["given"], {"rows": repeated, "index": index})[0]
            return given
        self._rows[:pairs].reshape(len(rows), repeats, -1)[...] = rows[:, None]
        self._place[:pairs] = index
        binding = self._bound.get((place, pairs))
        if binding is None:
            binding = self._bound[place, pairs] = session.io_binding()
            binding.bind_ortvalue_input("rows", as_value(self._rows[:pairs]))
            binding.bind_ortvalue_input("index", as_value(self._place[:pairs]))
            binding.bind_ortvalue_output("given", as_value(self._given[:pairs]))
        session.run_with_iobinding(binding)
        return self._given[:pairs]
