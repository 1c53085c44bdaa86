"""Experts of a layer on several devices: the lead sends rows to those that it needs, and adds what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.exchange.assign import LEAD, Holders, assign, speeds_of
from ganglion.agent.exchange.parcels import Asked, Experts, Travel, add, ask
from ganglion.agent.exchange.payload import payload_of
from ganglion.agent.executor.buffers import Delta
from ganglion.agent.executor.mixing import Routed, mix
from ganglion.wire.errors import InvalidDocument
from ganglion.wire.frames import Dtype, Expectation, Kind
from ganglion.wire.lane import Lane
from ganglion.wire.nouns import Manifest, Plan, Segment, Share, Stage
from ganglion.wire.shares import every_expert


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer as a device has them.

    each: pairs of a row at most. place [experts] (int64): of each among those held here, -1 where it is not.
    """

    layer: int
    index: int  # of its segment in the stage
    each: int
    place: NDArray[np.int64]


def is_expert_parallel(manifest: Manifest, plan: Plan) -> bool:
    """Whether experts of a layer lie on several devices; raises InvalidDocument for a plan that cannot run so.

    That shares name experts that there are is `check_experts`' to say.
    """
    split = any(len(stage.shares) > 1 for stage in plan.stages)
    if not split or not every_expert(manifest.layers):
        return False
    if len(plan.stages) > 1 or any(stage.topology != "star" for stage in plan.stages) or plan.overlap:
        raise InvalidDocument("plan: experts on several devices take one stage, a star, and steps that run whole")
    return True


def expert_layers(manifest: Manifest, stage: Stage, share: Share) -> dict[int, ExpertLayer]:
    """The layers of experts by number, as the device of a share has them."""
    found = {}
    for index, layer, segment in _segments(manifest, stage):
        if segment.axis == "experts":
            place = np.full(segment.groups, -1, np.int64)
            held = share.experts[layer - stage.layers.start]
            place[list(held)] = np.arange(len(held))
            found[layer] = ExpertLayer(layer, index, segment.experts, place)
    return found


def _segments(manifest: Manifest, stage: Stage) -> list[tuple[int, int, Segment]]:
    """(index in the stage, layer, segment)."""
    layers = range(stage.layers.start, stage.layers.stop)
    pairs = [(layer, segment) for layer in layers for segment in manifest.layers[layer].segments]
    return [(index, layer, segment) for index, (layer, segment) in enumerate(pairs)]


def travel_of(manifest: Manifest, plan: Plan) -> Travel:
    """How rows and sums travel; raises InvalidDocument where an exact class would be rounded."""
    return Travel(manifest.geometry.hidden, manifest.numeric_class.exact, payload_of(manifest, plan))


class Routing:
    """The pairs of one layer of a step, sent to whom they are for; what is run here is `own`."""

    __slots__ = ("asked", "chosen", "layer", "own", "rows", "weights")

    def __init__(self, layer: int, routed: Routed, own: NDArray[np.bool_], asked: list[tuple[int, Asked]]) -> None:
        self.layer = layer
        self.rows, self.chosen, self.weights = routed.rows, routed.chosen, routed.weights
        self.own = own
        self.asked = asked


class ExpertExchange:
    """The lead's side; `lanes` by rank. Its methods raise what lanes raise: DeviceLost, ProtocolViolation."""

    def __init__(self, manifest: Manifest, plan: Plan, lanes: Mapping[int, Lane]) -> None:
        stage = plan.stages[0]
        self._lanes = lanes
        self._travel = travel_of(manifest, plan)
        self._speeds: Sequence[float] = speeds_of(stage)
        self._layers = {one.index: one for one in expert_layers(manifest, stage, stage.shares[LEAD]).values()}
        self._holders = {
            one.index: Holders.of(
                [share.experts[one.layer - stage.layers.start] for share in stage.shares], len(one.place)
            )
            for one in self._layers.values()
        }
        self._answers: dict[int, NDArray[np.uint8]] = {}

    def sends(self, index: int) -> bool:
        """Whether segment `index` has experts that are not here."""
        return index in self._layers and bool((self._layers[index].place < 0).any())

    async def give(self, step: int, index: int, routed: Routed) -> Routing:
        """Send the rows of what the router said, `routed`, to the devices that they need; the others hear nothing."""
        layer = self._layers[index].layer
        ranks = assign(routed.chosen, self._holders[index], self._speeds)
        own = ranks == LEAD
        asked: list[tuple[int, Asked]] = []
        if not own.all():
            for rank in sorted(set(ranks.ravel().tolist()) - {LEAD}):
                one, payload = ask(routed.rows, routed.chosen, routed.weights, ranks == rank, self._travel)
                await self._lanes[rank].send_message(Kind.ROUTED, step, payload, layer)
                asked.append((rank, one))
            for rank, _ in asked:  # what is left of a large frame would wait until the experts here are done
                await self._lanes[rank].flush()
        return Routing(layer, routed, own, asked)

    def run_own(self, index: int, routing: Routing, experts: Experts, into: Delta) -> None:
        """Add what the experts here give to `into` [S, hidden]."""
        row, place = routing.own.nonzero()
        if len(row):
            given = experts(routing.rows[row], self._layers[index].place[routing.chosen[row, place]])
            mix(given, row, routing.weights[row, place], into)

    async def take(self, step: int, routing: Routing, into: Delta) -> None:
        """Add what the others give."""
        for rank, asked in routing.asked:
            size = asked.given_bytes(self._travel)
            answer = self._answers.get(rank)
            if answer is None or len(answer) < size:
                answer = self._answers[rank] = np.empty(size, np.uint8)
            content = answer[:size].reshape(1, size)
            expected = Expectation(Kind.GIVEN, step, routing.layer, Dtype.U8, 1, size)
            await self._lanes[rank].receive(expected, into=content)
            add(content, asked, self._travel, into)
