"""A device's part of a step, on the lead as on everyone else: segments, exchanges, handing on, candidates."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.exchange.allreduce import AllReduce
from ganglion.agent.exchange.experts import ExpertExchange, is_expert_parallel
from ganglion.agent.exchange.payload import payload_of
from ganglion.agent.exchange.plan import contributors, plan_exchange, stage_ranks
from ganglion.agent.executor.buffers import Delta
from ganglion.agent.executor.port import StepBatch, StepExecutor
from ganglion.agent.lead.candidates import Answer, answer
from ganglion.agent.lead.draw import Draw
from ganglion.wire.errors import Internal, InvalidDocument, ProtocolViolation
from ganglion.wire.frames import Dtype, Expectation, Kind
from ganglion.wire.lane import Lane
from ganglion.wire.nouns import Manifest, Plan, Segment
from ganglion.wire.nouns.plan import Payload
from ganglion.wire.sampling.adjusting import VocabShare


def vocab_shares(manifest: Manifest, plan: Plan) -> dict[int, VocabShare]:
    """The shares of the output matrix by rank, in order of token ids; padding rows are left out."""
    geometry = manifest.geometry
    stages = stage_ranks(plan)
    pairs = zip(plan.stages[-1].shares, stages[-1], strict=True)
    found = {}
    for share, rank in sorted(pairs, key=lambda pair: pair[0].vocab.start):
        first = share.vocab.start * geometry.vocab_group_rows
        last = min(share.vocab.stop * geometry.vocab_group_rows, geometry.vocab)
        if last > first:
            found[rank] = VocabShare(first, last - first, geometry.vocab_group_rows)
    return found


@dataclass(slots=True)
class Meter:
    """Seconds since the worker began: computing, waiting for peers (sealing included)."""

    compute_s: float = 0.0
    exchange_s: float = 0.0


class StageRunner:
    """Runs batches through this device's stage. One step at a time; one task uses it."""

    def __init__(
        self, manifest: Manifest, plan: Plan, rank: int, executor: StepExecutor, lanes: Mapping[int, Lane]
    ) -> None:
        ranks_by_stage = stage_ranks(plan)
        number = next(index for index, ranks in enumerate(ranks_by_stage) if rank in ranks)
        stage, ranks = plan.stages[number], ranks_by_stage[number]
        self.executor = executor
        self.rank = rank
        self.meter = Meter()
        self._hidden = manifest.geometry.hidden
        # The first stage gets embedded rows, the others what the stage before them handed on.
        self._handed = executor.handed_width if number else 0
        self._vocab = vocab_shares(manifest, plan).get(rank)
        self._logits: NDArray[np.float32] | None = None
        self._kept: dict[int, NDArray[np.float32]] = {}  # by session: its row of this device's logits
        self._source = None if rank == 0 else lanes[0] if number == 0 else lanes[ranks_by_stage[number - 1][0]]
        following = ranks_by_stage[number + 1] if rank == ranks[0] and number + 1 < len(plan.stages) else ()
        # Devices that hold experts only get rows when they are needed, and no residual.
        by_experts = is_expert_parallel(manifest, plan)
        self._experts = ExpertExchange(manifest, plan, lanes) if by_experts else None
        self._peers = tuple(lanes[other] for other in ranks[1:]) if rank == 0 and not by_experts else ()
        self._following = tuple(lanes[other] for other in following)
        layers = manifest.layers[stage.layers.start : stage.layers.stop]
        segments = [segment for layer in layers for segment in layer.segments]
        self._payload: Payload = payload_of(manifest, plan)
        self._overlaps = plan.overlap and len(ranks) > 1
        self._chunk = plan.chunk
        self._alone = len(plan.devices) == 1
        self._exchanges = self._plan_exchanges(plan, number, segments, lanes)

    def _plan_exchanges(
        self, plan: Plan, number: int, segments: Sequence[Segment], lanes: Mapping[int, Lane]
    ) -> tuple[AllReduce | None, ...]:
        """The exchange after each segment; who gives is who has groups of what it sums: since the last exchange."""
        stage, ranks = plan.stages[number], stage_ranks(plan)[number]
        if len(ranks) == 1 or self._experts is not None:
            return (None,) * len(segments)
        made: dict[tuple[int, ...], AllReduce] = {}
        found: list[AllReduce | None] = []
        giving: set[int] = set()
        for segment in segments:
            giving.update(contributors(stage, ranks, segment.axis))
            if not segment.exchange:
                found.append(None)
                continue
            if not giving:
                raise InvalidDocument(f"plan: stage {number}: no share has {segment.axis}")
            key = tuple(sorted(giving))
            if key not in made:
                part = plan_exchange(ranks, key, stage.topology, self.rank)
                made[key] = AllReduce(part, self.rank, lanes, self._payload)
            found.append(made[key])
            giving = set()
        return tuple(found)

    @property
    def alone(self) -> bool:
        """Whether nothing of a step waits for another device."""
        return self._alone

    def run_alone(self, batch: StepBatch, rows: Sequence[int]) -> None:
        """What `forward` and `head` do, on a device that is alone: it blocks, and may be called in another thread."""
        before = time.perf_counter()
        for index in range(len(self._exchanges)):
            self.executor.run(batch, index)
        self.meter.compute_s += time.perf_counter() - before
        self.head(batch, rows)

    async def forward(self, step: int, batch: StepBatch) -> None:
        """Take the rows (the lead has filled them in), run every segment, hand them on; raises what lanes raise."""
        executor, meter = self.executor, self.meter
        before = time.perf_counter()
        if self._source is not None:
            width = self._handed
            expected = Expectation(Kind.HIDDEN, step, 0, Dtype.F32, batch.rows, width or self._hidden)
            handed = await self._source.receive(expected, into=None if width else executor.residual(batch))
            if width:
                executor.take(batch, handed)
        for lane in self._peers:
            await lane.send_tensor(Kind.HIDDEN, step, 0, executor.residual(batch))
        now = time.perf_counter()
        meter.exchange_s += now - before
        if self._overlaps and batch.rows >= max(4, self._chunk // 2):
            halves = executor.halves(batch)
            await self._run_segments(step, halves)
            executor.join(batch, halves)
        else:
            await self._run_segments(step, (batch,))
        if self._following:
            now = time.perf_counter()
            handed = executor.hand_on(batch)
            for lane in self._following:
                await lane.send_tensor(Kind.HIDDEN, step, 0, handed)
            meter.exchange_s += time.perf_counter() - now

    async def _run_segments(self, step: int, parts: Sequence[StepBatch]) -> None:
        """Every segment on every part of a step: while a part's sums travel, the next one computes."""
        executor, meter = self.executor, self.meter
        sums: list[Delta | None] = [None] * len(parts)
        now = time.perf_counter()
        for index in range(len(self._exchanges) + 1):
            for number, part in enumerate(parts):
                travelling = sums[number]
                if travelling is not None:
                    await self._exchange(index - 1).take(step, (index - 1) * len(parts) + number, travelling)
                    sums[number] = None
                    before, now = now, time.perf_counter()
                    meter.exchange_s += now - before
                if index == len(self._exchanges):
                    continue
                if self._experts is not None and self._experts.sends(index):
                    await self._run_experts(self._experts, step, part, index)
                    now = time.perf_counter()
                    continue
                partial = executor.run(part, index)
                before, now = now, time.perf_counter()
                meter.compute_s += now - before
                if self._exchanges[index] is not None:
                    await self._exchange(index).give(step, index * len(parts) + number, partial)
                    sums[number] = partial
                    before, now = now, time.perf_counter()
                    meter.exchange_s += now - before

    async def _run_experts(self, exchange: ExpertExchange, step: int, batch: StepBatch, index: int) -> None:
        """A layer whose experts lie on several devices: those here run while the others do."""
        executor, meter = self.executor, self.meter
        began = time.perf_counter()
        routed = executor.route(batch, index)
        routed_at = time.perf_counter()
        routing = await exchange.give(step, index, routed)
        given_at = time.perf_counter()
        partial = executor.leave(batch, index)
        exchange.run_own(index, routing, functools.partial(executor.experts, index), partial)
        ran_at = time.perf_counter()
        await exchange.take(step, routing, partial)
        meter.compute_s += routed_at - began + ran_at - given_at
        meter.exchange_s += given_at - routed_at + time.perf_counter() - ran_at

    def _exchange(self, index: int) -> AllReduce:
        exchange = self._exchanges[index]
        if exchange is None:
            raise Internal(f"segment {index} leaves sums that are not exchanged")
        return exchange

    @property
    def vocab(self) -> VocabShare | None:
        """This device's share of the vocabulary; None when it answers no draws."""
        return self._vocab

    def head(self, batch: StepBatch, rows: Sequence[int]) -> None:
        """Run this device's share of the output matrix, if any, on rows of the batch; `answer` reads them."""
        if self._vocab is None or not rows:
            self._logits = None
            return
        before = time.perf_counter()
        self._logits = self.executor.logits(batch, rows)[:, : self._vocab.count]
        self.meter.compute_s += time.perf_counter() - before

    def answer(self, number: int, draw: Draw) -> Answer:
        """Answer a draw about the `number`-th row of the last `head`; raises ProtocolViolation without one."""
        if self._vocab is None or self._logits is None or not 0 <= number < len(self._logits):
            raise ProtocolViolation(f"draw {number} was asked of a device that has none")
        return answer(self._logits[number], self._vocab, draw)

    def keep(self, number: int, session: int) -> None:
        """Keep the `number`-th row of the last `head` for `session`, in place of the one before, until `drop`."""
        if self._logits is None or not 0 <= number < len(self._logits):
            raise ProtocolViolation(f"row {number} was to be kept by a device that has none")
        self._kept[session] = self._logits[number].copy()

    def kept(self, session: int, ids: NDArray[np.uint32] | None) -> NDArray[np.float32]:
        """The raw logits of ids (from the share's first on; None: all) in the row that was kept; ProtocolViolation."""
        row = self._kept.get(session)
        if row is None:
            raise ProtocolViolation(f"no row of session {session} was kept")
        if ids is None:
            return row
        if ids.max(initial=0) >= row.size:
            raise ProtocolViolation(f"the logit of id {ids.max()} was asked for; this share has {row.size}")
        return row[ids]

    def drop(self, sessions: Iterable[int]) -> None:
        """These sessions are over."""
        for session in sessions:
            self._kept.pop(session, None)
