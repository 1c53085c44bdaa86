"""Runs the rows of a step through a shard, one segment at a time; the caller exchanges partial sums in between.

    batch = executor.begin(entries, role)      # validated; executor.residual(batch) is to be filled
    for index in range(executor.segments):
        partial = executor.run(batch, index)   # this device's partial sum: make it the sum over devices, in place
    executor.hand_on(batch) or executor.logits(batch, rows)

A layer of whole experts runs like every segment where all of them lie here. Where some lie elsewhere its parts are
called one by one: `route`, `experts` on each device for the rows that it is sent, and `leave` for their sum.

Numbers do not depend on what else is in a step: attention runs for each session, everything else once for all rows.
Where the class mixes formats, a step's role says through which layers its rows run; their key-value state is one.
An entry may take rows from another session layer by layer, before it attends: also those that an entry before it
writes in the same step. So branches run beside the chain that they go on from, each over a state of its own, a *slot*.
Graphs of exact classes give attention an even number of rows; for an odd number they write one position beyond the
session's rows, which its next row overwrites, so the buffers have room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.executor import seats
from ganglion.agent.executor.buffers import Delta, Pairs, Place, Rows, as_value
from ganglion.agent.executor.kv import KeyValueLedger, SessionState, Take
from ganglion.agent.executor.loader import LoadedSegment, Shard
from ganglion.agent.executor.lone_rows import lone_rows_differ
from ganglion.agent.executor.mixing import Routed, check_places, mix_each
from ganglion.agent.executor.prefix_blocks import Begin, Keep, PrefixBlocks
from ganglion.agent.roles import Role
from ganglion.wire.errors import Corrupt, Internal, InvalidDocument, ProtocolViolation
from ganglion.wire.nouns import EXACT_POSITIONS, PREFIX_BLOCK_TOKENS, Manifest, Plan, RopeTable
from ganglion.wire.shares import OpenPiece

SessionRows = seats.Rows[SessionState]


@dataclass(slots=True)
class Batch:
    """The rows of a step; `parity`: which of the buffers hold them now."""

    entries: tuple[SessionRows, ...]
    rows: int
    role: Role
    buffers: Rows
    parity: int = 0


class Executor:
    """A loaded shard with its buffers, key-value state and bindings; one thread uses it."""

    def __init__(self, manifest: Manifest, plan: Plan, shard: Shard, open_piece: OpenPiece) -> None:
        geometry = manifest.geometry
        self._shard = shard
        self._pager = shard.pager
        self._by_role: dict[Role, tuple[LoadedSegment, ...]] = {"any": shard.segments}
        if manifest.numeric_class.prompt:
            self._by_role = {"prompt": shard.prompt, "generated": shard.segments}
        self._exact = manifest.numeric_class.exact
        self._class_name = manifest.numeric_class.name
        self._plan = plan
        self._group_rows = geometry.vocab_group_rows
        self._attention = [index for index, one in enumerate(shard.segments) if one.attends]
        groups = [shard.segments[index].groups for index in self._attention]
        budget = KeyValueLedger.bytes_per_token(groups, geometry.head_dim) * plan.kv_tokens
        self._ledger = KeyValueLedger(groups, geometry.head_dim, budget)
        self._prefixes = PrefixBlocks(plan.prefix_tokens // PREFIX_BLOCK_TOKENS)
        self._seats = seats.Seats(self._ledger, self._prefixes, plan, pads=self._exact, moved=self._unbind)
        every = (*shard.segments, *shard.prompt)
        steps = any(one.sessions and (one.routes or not one.held) for one in every)  # else rows are only sent here
        capacity = max(plan.chunk, plan.sessions, 2) if steps else 0
        # A lone row of an exact class is run beside a second one, which nobody reads, where that changes its bits.
        self._least = 2 if self._exact and lone_rows_differ(_row_graphs(every, shard.head)) else 1
        self._buffers = Rows(capacity, geometry.hidden, every, exact=self._exact)
        later = plan.chunk // 2 + 2 if plan.overlap else 0
        self._later = Rows(later, geometry.hidden, every, exact=self._exact)  # of a batch, its second half
        self._head_rows = Rows(capacity, geometry.hidden, exact=self._exact)
        self._pairs = Pairs(geometry.hidden if any(one.held for one in every) else 0)
        self.on_routes: Callable[[int, NDArray[np.int64]], None] | None = None  # (layer, chosen experts [rows, k])
        self._parts = manifest.handover == "parts"
        ropes = manifest.ropes if steps else {}
        self._ropes = {name: rope_tables(tables, plan.context, open_piece) for name, tables in ropes.items()}
        self._rope_values = {name: tuple(as_value(one) for one in pair) for name, pair in self._ropes.items()}
        # session -> segment -> its row in the step, and attention's binding for that one row
        self._bound: dict[int, dict[Place, tuple[int, Any]]] = {}

    @property
    def class_name(self) -> str:
        """The numeric class of what it computes."""
        return self._class_name

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
        """Sessions that hold state now, slots of their branches aside."""
        return self._seats.sessions

    def close(self, session: int) -> None:
        """Drop a session's state."""
        self._seats.close(session)

    def prepare(self, keeps: Sequence[Keep], closed: Sequence[int], begins: Sequence[Begin]) -> None:
        """See `Seats.prepare`."""
        self._seats.prepare(keeps, closed, begins)

    def copy(self, source: int, target: int, start: int, stop: int) -> None:
        """See `Seats.copy`."""
        self._seats.copy(source, target, start, stop)

    def _unbind(self, session: int) -> None:
        self._bound.pop(session, None)

    def begin(
        self, entries: Sequence[tuple[int, int, int]], role: Role = "any", takes: Mapping[int, Take] | None = None
    ) -> Batch:
        """A batch for entries (session, start, count), with delta zero and sessions of start 0 opened.

        takes: by session, what it takes of another one before its rows; it is opened as a slot if it is not open.
        Raises ProtocolViolation for entries or a role that no scheduler of this plan announces, Exhausted without room.
        """
        seats.check_role(role, self._by_role)
        placed = self._seats.place(entries, takes or {}, seats.Rows)
        rows = sum(one.count for one in placed)
        self._buffers.delta[0][:rows] = 0.0
        return Batch(placed, rows, role, self._buffers)

    def residual(self, batch: Batch) -> NDArray[np.float32]:
        """The current residual [rows, hidden] float32; to be filled before the first segment."""
        return batch.buffers.res[batch.parity][: batch.rows]

    def halves(self, batch: Batch) -> tuple[Batch, Batch]:
        """The rows of a batch in two that run one after the other, segment by segment; `join` puts them together.

        Invariant: a session's earlier rows are in the first, which has run a segment before the second does.
        """
        middle = batch.rows // 4 * 2  # even: exact attention has nothing to pad then
        sooner, later = seats.halved(batch.entries, middle)
        rows = batch.rows - middle
        for mine, whole in ((self._later.res[0], batch.buffers.res), (self._later.delta[0], batch.buffers.delta)):
            mine[:rows] = whole[batch.parity][middle : batch.rows]
        return (
            Batch(sooner, middle, batch.role, batch.buffers, batch.parity),
            Batch(later, rows, batch.role, self._later),
        )

    def join(self, batch: Batch, halves: tuple[Batch, Batch]) -> None:
        """Put the rows of both halves, which have run alike, back into their batch."""
        sooner, later = halves
        batch.parity = sooner.parity
        for mine, whole in ((later.buffers.res, batch.buffers.res), (later.buffers.delta, batch.buffers.delta)):
            whole[batch.parity][sooner.rows : batch.rows] = mine[later.parity][: later.rows]

    def take(self, batch: Batch, handed: NDArray[np.float32]) -> None:
        """Begin with what the stage before handed on, in the shape of `handed_width`."""
        hidden = self._head_rows.res[0].shape[1]
        batch.buffers.res[batch.parity][: batch.rows] = handed[:, :hidden]
        if self._parts:
            batch.buffers.delta[batch.parity][: batch.rows] = handed[:, hidden:]

    def hand_on(self, batch: Batch) -> NDArray[np.float32]:
        """What the next stage begins with: [rows, handed_width] float32."""
        buffers, parity, rows = batch.buffers, batch.parity, batch.rows
        delta: NDArray[np.float32] = buffers.delta[parity][:rows].astype(np.float32, copy=False)
        residual = buffers.res[parity][:rows]
        return np.concatenate((residual, delta), axis=1) if self._parts else residual + delta

    @property
    def handed_width(self) -> int:
        """Numbers a row that travel between stages."""
        return self._head_rows.res[0].shape[1] * (2 if self._parts else 1)

    def run(self, batch: Batch, index: int) -> Delta:
        """Run segment `index`; returns its partial sum: [rows, width], zeros where this device has no group of it."""
        segments = self._by_role[batch.role]
        place: Place = (batch.role, index)
        one, before = segments[index], segments[index - 1] if index else None
        if one.routes:
            return self._run_mixture(batch, index, one)
        buffers, parity, rows = batch.buffers, batch.parity, batch.rows
        partial = buffers.partial(one, parity, rows)
        if not one.sessions:  # only where it takes no residual: nothing to keep, nothing to add
            partial[...] = 0.0
        else:
            buffers.run_first(place, one, before, parity, max(rows, self._least))
        if one.attends:
            for entry in batch.entries:
                self._attend(place, one, entry, buffers)
            buffers.run_last(place, one, parity, max(rows, self._least))
        if one.segment.takes != "carry":
            batch.parity = 1 - parity
        return partial

    def _run_mixture(self, batch: Batch, index: int, one: LoadedSegment) -> Delta:
        if not one.holds_all:
            raise Internal(f"segment {index}: {one.groups} of {one.segment.groups} experts lie here: route its rows")
        routed = self.route(batch, index)
        chosen = routed.chosen.reshape(-1)  # all lie here: an expert's place is its number
        given = self._through((batch.role, index), one, routed.rows, chosen)
        partial = self.leave(batch, index)
        mix_each(given, routed.weights, partial)
        return partial

    def held(self, index: int) -> tuple[int, ...]:
        """The experts of segment `index` that lie here, by rising number."""
        return self._shard.segments[index].held

    def route(self, batch: Batch, index: int) -> Routed:
        """Take the residual of segment `index` and choose its rows' experts; `leave` follows.

        What it gives is valid until it runs again. Raises Internal for a segment that is not cut by experts.
        """
        one = self._mixture(batch.role, index)
        if not one.routes:
            raise Internal(f"segment {index}: this device holds experts only, it is not asked to choose")
        batch.buffers.run_first((batch.role, index), one, None, batch.parity, max(batch.rows, self._least))
        routed = batch.buffers.routed(one, batch.rows)
        if self.on_routes is not None:
            self.on_routes(one.layer, routed.chosen)
        return routed

    def experts(self, index: int, rows: NDArray[np.float32], place: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the experts of segment `index` that lie here give: float32 [R, hidden], valid until the next run.

        rows: float32 [R, hidden]. place: int64 [R], of each row its expert, by place among those held (`held`). Raises
        ProtocolViolation for one that is not.
        """
        one = self._mixture("any", index)
        check_places(index, rows, place, len(one.held))
        return self._through(("any", index), one, rows, place)

    def _through(
        self, place: Place, one: LoadedSegment, rows: NDArray[np.float32], index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """What `Pairs.run` gives; experts on disk run as they come into memory, all rows of one at once."""
        if self._pager is None or one.paged < 0 or not len(index):
            return self._pairs.run(place, one, rows, index)
        repeats = len(index) // len(rows)
        given: NDArray[np.float32] | None = None
        for ready in self._pager.waves(one.paged, index.reshape(-1, repeats), rows):
            mine = np.flatnonzero(np.isin(index, ready))
            if len(mine) == len(index):
                given = self._pairs.run(place, one, rows, index)
                continue
            if given is None:
                given = np.empty((len(index), rows.shape[1]), np.float32)
            given[mine] = self._pairs.run(place, one, rows[mine // repeats], index[mine])
        if given is None:
            raise Internal("experts: none ran")
        return given

    def leave(self, batch: Batch, index: int) -> Delta:
        """Where the sum of what the experts of segment `index` gave goes: [rows, hidden], zeros to be added to."""
        one = self._mixture(batch.role, index)
        partial = batch.buffers.partial(one, batch.parity, batch.rows)
        partial[...] = 0.0
        batch.parity = 1 - batch.parity
        return partial

    def _mixture(self, role: Role, index: int) -> LoadedSegment:
        one = self._by_role[role][index]
        if one.segment.axis != "experts":
            raise Internal(f"segment {index}: {one.segment.kind} is not cut by experts")
        return one

    def _attend(self, place: Place, one: LoadedSegment, entry: SessionRows, buffers: Rows) -> None:
        state, session = entry.state, one.sessions[1]
        if entry.source is not None:
            state.take(entry.source, self._attention.index(place[1]), entry.taken_first, entry.start)
        state.total[0] = entry.start + entry.count
        state.seqlens[0] = entry.start + entry.count - 1
        if entry.count > 1 or buffers is self._later:
            session.run_with_iobinding(self._bind_attention(place[1], one, entry, buffers))
            return
        bound = self._bound.setdefault(entry.session, {})
        first, binding = bound.get(place, (-1, None))
        if first != entry.first:
            binding = self._bind_attention(place[1], one, entry, buffers)
            bound[place] = entry.first, binding
        session.run_with_iobinding(binding)

    def _bind_attention(self, index: int, one: LoadedSegment, entry: SessionRows, buffers: Rows) -> Any:
        state, layer = entry.state, self._attention.index(index)
        binding = one.sessions[1].io_binding()
        stop = entry.first + entry.count
        keys, values = as_value(state.keys[layer]), as_value(state.values[layer])
        inputs = [
            ("projected", as_value(buffers.projected(one, stop)[entry.first :])),
            ("past_key", keys),
            ("past_value", values),
            ("seqlens_k", as_value(state.seqlens)),
            ("total", as_value(state.total)),
        ]
        if one.segment.rope:
            inputs += zip(("cos", "sin"), self._rope_values[one.segment.rope], strict=True)
        for name, value in inputs:
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("attended", as_value(buffers.attended(one, stop)[entry.first :]))
        binding.bind_ortvalue_output("present_key", keys)  # the same buffer as the past: written in place
        binding.bind_ortvalue_output("present_value", values)
        return binding

    def logits(self, batch: Batch, rows: Sequence[int]) -> NDArray[np.float32]:
        """The head on the given rows of the step: [len(rows), vocabulary rows of this share] float32."""
        head, buffers = self._shard.head, self._head_rows
        if head is None or len(rows) > buffers.capacity:
            raise ProtocolViolation(f"logits of {len(rows)} rows were asked of a device that cannot give them")
        for place, row in enumerate(rows):
            buffers.res[0][place] = batch.buffers.res[batch.parity][row]
            buffers.delta[0][place] = batch.buffers.delta[batch.parity][row]
        count = max(len(rows), self._least)
        inputs = {"res": buffers.res[0][:count], "delta": buffers.delta[0][:count]}
        logits: NDArray[np.float32] = head.sessions[0].run(["logits"], inputs)[0]
        return logits[: len(rows)]


def _row_graphs(segments: Sequence[LoadedSegment], head: LoadedSegment | None) -> Iterator[Any]:
    """One session of every kind of graph that runs on the rows of a step."""
    kinds = {(one.segment.kind, one.groups): one for one in segments if one.sessions}
    for one in (*kinds.values(), *((head,) if head is not None else ())):
        yield one.sessions[0]
        if one.attends:
            yield one.sessions[2]


def rope_tables(
    tables: Sequence[RopeTable], context: int, open_piece: OpenPiece
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of a rope up to `context`, each [context, half]: of its tables the first that is long enough.

    Raises InvalidDocument when none is, Corrupt when a table has not the shape that it is named with.
    """
    chosen = next((one for one in tables if one.context >= context), None)
    if chosen is None:
        raise InvalidDocument(f"manifest: no rope table for a context of {context} tokens")
    pair = []
    for piece in (chosen.cos, chosen.sin):
        data = open_piece(piece.digest)
        if not len(data) or len(data) % (chosen.context * 4):
            raise Corrupt(f"rope table: {len(data)} bytes are no rows for {chosen.context} positions")
        # Exact attention turns padding rows at positions that the deployment's context need not reach.
        positions = max(context, EXACT_POSITIONS)
        pair.append(np.frombuffer(data, np.float32).reshape(chosen.context, -1)[:positions].copy())
    return pair[0], pair[1]
