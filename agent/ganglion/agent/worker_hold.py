"""What a worker does that holds experts and leads nothing: it hears of every step, and runs the rows that are sent."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping
from typing import Final

from ganglion.agent.exchange.experts import ExpertLayer, expert_layers, travel_of
from ganglion.agent.exchange.parcels import give
from ganglion.agent.executor.port import StepExecutor
from ganglion.agent.worker_beat import Beat, LongestRun
from ganglion.agent.worker_follow import begin_step, read_step
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.frames import Kind
from ganglion.wire.lane import Lane, Message
from ganglion.wire.nouns import Manifest, Plan
from ganglion.wire.routed import parse_routed, routed_bytes

KINDS: Final = (Kind.STEP, Kind.ROUTED)


class Announced:
    """What may come of the step that was announced last: a pure core.

    Invariant: of each layer at most one frame, in the order of layers. None at all is as good: no row needed an expert.
    """

    def __init__(self, layers: Mapping[int, ExpertLayer]) -> None:
        self._layers = layers
        self._last = -1
        self.step = 0
        self.rows = 0

    def announce(self, step: int, rows: int) -> None:
        """A step of so many rows begins, and the one before is over."""
        self.step, self.rows, self._last = step, rows, -1

    def admit(self, step: int, layer: int) -> ExpertLayer:
        """The layer of a frame that has come; raises ProtocolViolation for one that cannot come now."""
        if step != self.step or not self.rows:
            raise ProtocolViolation(f"rows of step {step}, expected of step {self.step}, which has {self.rows}")
        found = self._layers.get(layer)
        if found is None:
            raise ProtocolViolation(f"rows for layer {layer}, which has no experts")
        if layer <= self._last:
            raise ProtocolViolation(f"rows for layer {layer} after those for layer {self._last} of step {step}")
        self._last = layer
        return found


class Holder:
    """Serves the lead's steps over `lane` with the experts of `executor`."""

    def __init__(
        self, manifest: Manifest, plan: Plan, rank: int, *, executor: StepExecutor, lane: Lane, beat: Beat
    ) -> None:
        stage = plan.stages[0]
        layers = expert_layers(manifest, stage, stage.shares[rank])
        self._executor = executor
        self._lane = lane
        self._beat = beat
        self._longest = LongestRun(executor.weights_bytes)
        self._travel = travel_of(manifest, plan)
        self._announced = Announced(layers)
        each = max((one.each for one in layers.values()), default=0)
        row_bytes = routed_bytes(1, each, self._travel.hidden, self._travel.payload)
        self._largest_bytes = {Kind.ROUTED: plan.chunk * row_bytes}

    async def run(self) -> None:
        """Serve until the lane ends; raises what it raises, and ProtocolViolation for what no lead sends."""
        while True:
            message = await self._lane.receive_any(KINDS, self._largest_bytes)
            if message.kind is Kind.STEP:
                self._begin(message)
                await asyncio.sleep(0)  # a lane that is quick never waits by the loop: let it see to everything else
            else:
                await self._serve(message)

    def _begin(self, message: Message) -> None:
        step = read_step(message, self._announced.step + 1)
        batch = begin_step(self._executor, step)
        self._announced.announce(step.step, batch.rows if batch is not None else 0)
        self._beat.end(self._executor.sessions, self._executor.kv_bytes)

    async def _serve(self, message: Message) -> None:
        executor = self._executor
        layer = self._announced.admit(message.step, message.exchange)
        routed = parse_routed(
            message.payload,
            rows=self._announced.rows,
            each=layer.each,
            width=self._travel.width,
            dtype=self._travel.dtype,
            place=layer.place,
        )
        rows = len(routed.rows)
        self._beat.begin(self._longest.announce(rows), executor.sessions, executor.kv_bytes)
        began = time.perf_counter()
        given = give(routed, layer.place, functools.partial(executor.experts, layer.index), self._travel)
        await self._lane.send_tensor(Kind.GIVEN, message.step, message.exchange, given)
        self._longest.finished(rows, time.perf_counter() - began)
        self._beat.end(executor.sessions, executor.kv_bytes)
