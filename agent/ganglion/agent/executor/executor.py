"""Runs the rows of a step through a shard, one segment at a time; the caller exchanges partial sums in between.

    batch = executor.begin(entries)            # validated; executor.residual(batch) is to be filled
    for index in range(executor.segments):
        partial = executor.run(batch, index)   # this device's partial sum: make it the sum over devices, in place
    executor.hidden(batch) or executor.logits(batch, rows)

Numbers do not depend on what else is in a step: attention runs per session. Graphs of exact classes give attention an
even number of rows; for an odd number they write one position beyond the session's rows, which its next row overwrites,
so the buffers have room for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.executor.buffers import Delta, Rows, as_value
from ganglion.agent.executor.kv import KeyValueLedger, SessionState, capacity_for
from ganglion.agent.executor.loader import Shard
from ganglion.wire.errors import Corrupt, Exhausted, ProtocolViolation
from ganglion.wire.nouns import Manifest, Plan
from ganglion.wire.shares import OpenPiece


@dataclass(frozen=True, slots=True)
class SessionRows:
    """Rows start..start+count-1 of a session: `state` its keys and values, `first` its first row of the step."""

    session: int
    state: SessionState
    start: int
    count: int
    first: int


@dataclass(slots=True)
class Batch:
    """The rows of a step; `parity`: which of the buffers hold them now."""

    entries: tuple[SessionRows, ...]
    rows: int
    buffers: Rows
    parity: int = 0


class Executor:
    """A loaded shard with its buffers, key-value state and bindings; one thread uses it."""

    def __init__(self, manifest: Manifest, plan: Plan, shard: Shard, open_piece: OpenPiece) -> None:
        geometry = manifest.geometry
        self._shard = shard
        self._exact = manifest.numeric_class.exact
        self._plan = plan
        self._group_rows = geometry.vocab_group_rows
        groups = [one.groups for one in shard.segments if one.axis == "heads"]
        budget = KeyValueLedger.bytes_per_token(groups, geometry.head_dim) * capacity_for(plan.context) * plan.sessions
        self._ledger = KeyValueLedger(groups, geometry.head_dim, budget)
        capacity = max(plan.chunk, plan.sessions)
        self._alone = Rows(capacity, geometry.hidden, exact=self._exact)  # steps of one session, and entries
        self._together = Rows(capacity, geometry.hidden, exact=self._exact)  # rows of several sessions
        self._head_rows = Rows(plan.sessions, geometry.hidden, exact=self._exact)
        shape = (geometry.context, geometry.head_dim // 2)
        tables = (_table(open_piece(one.digest), shape) for one in (manifest.rope_cos, manifest.rope_sin))
        self._rope = tuple(table[: plan.context].copy() for table in tables)
        self._rope_values = tuple(as_value(table) for table in self._rope)
        self._attention = [index for index, one in enumerate(shard.segments) if one.axis == "heads"]
        self._bound: dict[int, dict[int, Any]] = {}  # session -> segment -> binding for one row

    @property
    def segments(self) -> int:
        """Segments of the stage, those without a share of this device among them."""
        return len(self._shard.segments)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights that this device holds."""
        return self._shard.weights_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of key-value state that sessions hold now."""
        return self._ledger.kv_bytes

    @property
    def sessions(self) -> int:
        """Sessions that hold state now."""
        return len(self._ledger)

    def close(self, session: int) -> None:
        """Drop a session's state."""
        self._ledger.close(session)
        self._bound.pop(session, None)

    def begin(self, entries: Sequence[tuple[int, int, int]]) -> Batch:
        """A batch for entries (session, start, count), with delta zero and sessions of start 0 opened.

        Raises ProtocolViolation for entries that no scheduler of this plan announces, Exhausted without room.
        """
        rows = sum(count for _, _, count in entries)
        if not 0 < rows <= self._plan.chunk or len({session for session, _, _ in entries}) != len(entries):
            raise ProtocolViolation(f"a step of {rows} rows in {len(entries)} entries; at most {self._plan.chunk} rows")
        placed, first = [], 0
        for session, start, count in entries:
            placed.append(SessionRows(session, self._place(session, start, count), start, count, first))
            first += count
        buffers = self._alone if len(placed) == 1 else self._together
        buffers.delta[0][:rows] = 0.0
        return Batch(tuple(placed), rows, buffers)

    def _place(self, session: int, start: int, count: int) -> SessionState:
        state = self._ledger.get(session)
        if state is None:
            if start != 0:
                raise ProtocolViolation(f"session {session} begins at token {start}")
            if len(self._ledger) >= self._plan.sessions:
                raise Exhausted(f"{len(self._ledger)} sessions are open, the plan allows {self._plan.sessions}")
            state = self._ledger.open(session)
        end = start + count + (count % 2 if self._exact else 0)
        if count < 1 or start > state.held or end > self._plan.context:
            raise ProtocolViolation(
                f"session {session}: rows {start}..{start + count} on {state.held} held tokens, context"
                f" {self._plan.context}"
            )
        if self._ledger.reserve(state, end):
            self._bound.pop(session, None)
        state.held = start + count
        return state

    def residual(self, batch: Batch) -> NDArray[np.float32]:
        """The current residual [rows, hidden] float32; to be filled before the first segment."""
        return batch.buffers.res[batch.parity][: batch.rows]

    def partial(self, batch: Batch) -> Delta:
        """What the last segment left, and after the exchange the sum: [rows, hidden]."""
        return batch.buffers.delta[batch.parity][: batch.rows]

    def run(self, batch: Batch, index: int) -> Delta:
        """Run segment `index`; returns `partial`, which holds no sum yet where this device's share is empty."""
        segment = self._shard.segments[index]
        if segment.session is None:
            self._pass(batch)
        elif segment.axis == "columns":
            binding = batch.buffers.columns(index, segment.session, batch.parity, batch.rows)
            segment.session.run_with_iobinding(binding)
        elif batch.buffers is self._alone:
            self._attend(index, segment.session, batch.entries[0], batch.parity)
        else:
            self._attend_each(index, segment.session, batch)
        batch.parity = 1 - batch.parity
        return self.partial(batch)

    def _pass(self, batch: Batch) -> None:
        """What every graph does to the residual: res + delta in float32; the partial sum is left as zero."""
        buffers, rows, parity = batch.buffers, slice(batch.rows), batch.parity
        delta = buffers.delta[parity][rows].astype(np.float32, copy=False)
        np.add(buffers.res[parity][rows], delta, out=buffers.res[1 - parity][rows])
        buffers.delta[1 - parity][rows] = 0.0

    def _attend_each(self, index: int, session: Any, batch: Batch) -> None:
        alone, together, parity = self._alone, batch.buffers, batch.parity
        for entry in batch.entries:
            span, rows = slice(entry.first, entry.first + entry.count), slice(entry.count)
            alone.res[parity][rows] = together.res[parity][span]
            alone.delta[parity][rows] = together.delta[parity][span]
            self._attend(index, session, entry, parity)
            together.res[1 - parity][span] = alone.res[1 - parity][rows]
            together.delta[1 - parity][span] = alone.delta[1 - parity][rows]

    def _attend(self, index: int, session: Any, entry: SessionRows, parity: int) -> None:
        state = entry.state
        state.total[0] = entry.start + entry.count
        state.seqlens[0] = entry.start + entry.count - 1
        if entry.count > 1:
            session.run_with_iobinding(self._bind_attention(index, session, state, parity, entry.count))
            return
        bound = self._bound.setdefault(entry.session, {})
        binding = bound.get(index)
        if binding is None:
            binding = bound[index] = self._bind_attention(index, session, state, parity, 1)
        session.run_with_iobinding(binding)

    def _bind_attention(self, index: int, session: Any, state: SessionState, parity: int, rows: int) -> Any:
        binding = self._alone.bind(session, parity, rows)
        place = self._attention.index(index)
        keys, values = as_value(state.keys[place]), as_value(state.values[place])
        for name, value in (
            ("past_key", keys),
            ("past_value", values),
            ("seqlens_k", as_value(state.seqlens)),
            ("total", as_value(state.total)),
            ("cos", self._rope_values[0]),
            ("sin", self._rope_values[1]),
        ):
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("present_key", keys)  # the same buffer as the past: written in place
        binding.bind_ortvalue_output("present_value", values)
        return binding

    def hidden(self, batch: Batch) -> NDArray[np.float32]:
        """Residual plus delta: [rows, hidden] float32, the input of the next stage."""
        delta: NDArray[np.float32] = self.partial(batch).astype(np.float32, copy=False)
        return self.residual(batch) + delta

    def logits(self, batch: Batch, rows: Sequence[int]) -> NDArray[np.float32]:
        """The head on the given rows of the step: [len(rows), vocabulary rows of this share] float32."""
        head, buffers = self._shard.head, self._head_rows
        if head is None or head.session is None or len(rows) > buffers.capacity:
            raise ProtocolViolation(f"logits of {len(rows)} rows were asked of a device that cannot give them")
        for place, row in enumerate(rows):
            buffers.res[0][place] = batch.buffers.res[batch.parity][row]
            buffers.delta[0][place] = batch.buffers.delta[batch.parity][row]
        inputs = {"res": buffers.res[0][: len(rows)], "delta": buffers.delta[0][: len(rows)]}
        logits: NDArray[np.float32] = head.session.run(["logits"], inputs)[0]
        return logits


def _table(data: memoryview, shape: tuple[int, int]) -> NDArray[np.float32]:
    if len(data) != shape[0] * shape[1] * 4:
        raise Corrupt(f"rope table: {len(data)} bytes, expected {shape[0] * shape[1] * 4}")
    return np.frombuffer(data, np.float32).reshape(shape)
