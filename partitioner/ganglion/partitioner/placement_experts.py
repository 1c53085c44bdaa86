"""The candidate "expert": a lead with all but the experts, and devices that hold experts only, predicted. Pure.

Per layer the lead routes, and sends each device that a token touches its row; a layer takes as long as the slowest of
the lead's own experts and, of each touched device, the way there, its experts, and the way back. How often which
devices are touched comes from the placement of the experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec
import numpy as np

from ganglion.partitioner.cost import (
    COLD_RUN_S,
    DECODE_DEPTH_TOKENS,
    HEAD_LAYER,
    RUN_S,
    Device,
    Slice,
    slices,
)
from ganglion.partitioner.expert_placement import (
    EFFORT,
    KICKS,
    SPARE,
    ExpertHost,
    ExpertLayer,
    ExpertPlacement,
    place_apart,
    place_experts,
)
from ganglion.partitioner.expert_placement_routes import Floats, RouteSets, uniform_sets
from ganglion.partitioner.placement_candidates import complete, missing
from ganglion.partitioner.placement_order import arrange
from ganglion.partitioner.placement_paging import LEAST_SHARE, charge, fixed_bytes, pages
from ganglion.partitioner.placement_paging import held_bytes as bytes_on_disk
from ganglion.partitioner.placement_request import Outcome, Request, Rung
from ganglion.partitioner.placement_sums import payload_of
from ganglion.wire.errors import DoesNotFit, InvalidDocument, Unsupported
from ganglion.wire.nouns import Range, Share, Stage
from ganglion.wire.routed import touch_bytes
from ganglion.wire.shares import weights_size

EMPTY: Final = Range(0, 0)
PROGRAMME_S: Final = 2.0  # for the integer programme of the devices that were chosen
QUICK_EFFORT: Final = 6_000  # where devices are only compared, or answers wait: a tenth of a second for a small mixture


def expert(request: Request, devices: Sequence[Device], *, settled: bool = False) -> Outcome:
    """Experts over `devices`, the lead an owner; settled: these devices it will be, so that more pains are taken."""
    outcome = Outcome(mode="expert", devices=tuple(devices))
    size, options = request.size, request.options
    if not size.every_expert.count:
        outcome.problem = (
            f"{outcome.title}: {request.manifest.name} is cut by columns through every expert; cut it with --experts"
            " whole"
            if size.chosen
            else f"{outcome.title}: {request.manifest.name} has no experts; it is no mixture"
        )
        return outcome
    if options.topology == "mesh":
        outcome.problem = f"{outcome.title}: holders answer the lead only, which is a star: leave --topology out"
        return outcome
    orders, problem = arrange(request.network, "star", devices)
    if not orders:
        outcome.problem = f"{outcome.title}: {problem}"
        return outcome
    order = orders[0][1]
    outcome.devices = tuple(order)
    parts = slices(order, request.manifest.numeric_class)
    outcome.available_bytes = {part.device.name: part.available_bytes for part in parts}
    layers = _layers(request)
    for rung in request.rungs:
        rooms = [_room(request, part, rung, lead=rank == 0) for rank, part in enumerate(parts)]
        if pages(request):
            rooms = [_paged_room(request, room) for room in rooms]
        short = min(range(len(parts)), key=lambda rank: rooms[rank])
        if rooms[short] < 0:
            outcome.problem = missing(outcome, order[short], -rooms[short], request)
            continue
        try:
            placement = _place(request, layers, parts, rooms, outcome, settled=settled)
        except DoesNotFit as error:
            outcome.problem = f"{outcome.title}: {error.message}, at context {rung[0]}"
            continue
        idle = [
            order[rank].name for rank in range(1, len(order)) if not any(one.held[rank] for one in placement.layers)
        ]
        outcome.problem = f"{outcome.title}: {', '.join(idle)} would hold no expert: leave it out" if idle else ""
        if not idle:
            _finish(request, outcome, parts, layers, placement, rung)
        return outcome
    return outcome


def _layers(request: Request) -> list[ExpertLayer]:
    """Bytes and routes of every layer's experts; raises InvalidDocument for routes of another model."""
    size, found = request.size, []
    for number, layer in enumerate(request.manifest.layers):
        here = Range(number, number + 1)
        one = next((segment for segment in layer.segments if segment.axis == "experts"), None)
        if one is None:
            found.append(ExpertLayer(0, RouteSets(0, (), ())))
            continue
        routes = request.routes[number] if number < len(request.routes) else None
        if routes is not None and routes.experts != one.groups:
            raise InvalidDocument(f"routes: layer {number} has {one.groups} experts, they name {routes.experts}")
        if routes is None or not routes.sets:
            routes = uniform_sets(one.groups, one.experts)
        found.append(ExpertLayer(int(size.weights_factor * size.experts.largest_group(here)), routes))
    return found


def _room(request: Request, part: Slice, rung: Rung, *, lead: bool) -> int:
    """Bytes of a device that are left for experts, beside the routers and norms that every share has."""
    size, geometry = request.size, request.manifest.geometry
    room = part.available_bytes - size.fixed_bytes(chunk=request.chunk(rung[0]), lead=lead)
    room -= int(size.weights_factor * size.experts.whole(size.all_layers))
    if not lead:
        return room
    every = (Range(0, geometry.head_groups), Range(0, geometry.column_groups), Range(0, geometry.vocab_groups))
    room -= size.share_bytes(size.all_layers, *every, kv_tokens=request.kv_tokens(rung), experts=False)
    return request.lead_room(room, rung, alone=False)


def _paged_room(request: Request, room: int) -> int:
    """The room of a device whose experts may lie on its disk: so much as would hold as many in memory."""
    size = request.size
    room -= fixed_bytes(request)
    if room < 0:
        return room
    every = int(size.weights_factor * size.experts.total(size.all_layers, size.every_expert))
    return every if request.options.expert_memory_bytes else int(size.weights_factor * room / LEAST_SHARE)


def _place(
    request: Request,
    layers: Sequence[ExpertLayer],
    parts: Sequence[Slice],
    rooms: Sequence[int],
    outcome: Outcome,
    *,
    settled: bool,
) -> ExpertPlacement:
    """The experts' places; what was assumed is remarked. Raises DoesNotFit."""
    speeds = [part.weight_bytes_per_s for part in parts]
    if request.options.shares:
        named = list(request.options.devices)
        keys = [part.device.name if part.device.name in named else part.device.node_id for part in parts]
        speeds = [float(request.options.shares[named.index(key)]) for key in keys]
    hosts = [
        ExpertHost(speed, room, float(rank > 0)) for rank, (speed, room) in enumerate(zip(speeds, rooms, strict=True))
    ]
    # Candidates are compared without replicas; the one that is chosen gets them, where routes say which.
    kicks, spare = (KICKS, 0.0 if pages(request) else SPARE) if settled else (0, 0.0)
    effort = EFFORT if settled and not request.soon else QUICK_EFFORT
    time_limit_s = PROGRAMME_S if settled and not request.soon else 0.0
    outcome.remarks = [
        f"experts placed by the routes of {request.routed_tokens} tokens{_known(request)}"
        if request.routes
        else "no routes of this model were reported yet: experts are placed as if all were chosen alike"
    ]
    place = partial(place_experts, layers, hosts, kicks=kicks, spare=spare, effort=effort)
    try:
        placement = place(time_limit_s=time_limit_s)
    except Unsupported as error:
        placement = place()
        outcome.remarks.append(f"placed by descent: {error.message}")
    else:
        if time_limit_s:
            outcome.remarks.append(
                "no placement needs fewer messages"
                if placement.proved
                else f"at most {placement.gap:.0%} of the messages could be spared"
            )
    if settled and request.soon:
        outcome.remarks.append("placed by descent, since answers wait for it")
    apart = place_apart(layers, hosts)
    if sum(_experts_s(request, parts, layers, apart)) < sum(_experts_s(request, parts, layers, placement)):
        outcome.remarks[1:] = ["a token's experts lie apart: computing them at once spares more than messages cost"]
        return apart
    outcome.remarks.extend(placement.remarks)
    return placement


def _known(request: Request) -> str:
    """In which layers routes were counted, where it is not in all: a pipeline's lead counts its own stage's."""
    layers = sum(any(one.axis == "experts" for one in layer.segments) for layer in request.manifest.layers)
    counted = sum(bool(routes.sets) for routes in request.routes)
    return f", known of {counted} of {layers} layers" if counted < layers else ""


def _experts_s(
    request: Request, parts: Sequence[Slice], layers: Sequence[ExpertLayer], placement: ExpertPlacement
) -> tuple[float, float]:
    """Seconds of a token's experts in all layers: computing, and beyond that waiting for links."""
    compute_s = waited_s = 0.0
    for number, (layer, one) in enumerate(zip(layers, placement.layers, strict=True)):
        if layer.routes.experts:
            own_s, all_s = _layer_s(request, parts, number, one.covers.per_set)
            compute_s += float(layer.routes.weights @ own_s)
            waited_s += float(layer.routes.weights @ (all_s - own_s))
    return compute_s, waited_s


def _finish(  # noqa: PLR0917 - one candidate
    request: Request,
    outcome: Outcome,
    parts: Sequence[Slice],
    layers: Sequence[ExpertLayer],
    placement: ExpertPlacement,
    rung: Rung,
) -> None:
    """Weigh every share, predict a token, and make the plan."""
    size, geometry = request.size, request.manifest.geometry
    every = (Range(0, geometry.head_groups), Range(0, geometry.column_groups), Range(0, geometry.vocab_groups))
    shares = []
    for rank, part in enumerate(parts):
        held = tuple(one.held[rank] for one in placement.layers)
        heads, columns, vocab = every if rank == 0 else (EMPTY, EMPTY, EMPTY)
        share = Share(device=part.device.node_id, heads=heads, columns=columns, vocab=vocab, experts=held)
        on_disk = bytes_on_disk(request, Stage(layers=size.all_layers, shares=(), topology="star"), share)
        charged, cache = charge(request, size.all_layers, on_disk)
        shares.append(msgspec.structs.replace(share, expert_cache_bytes=cache))
        used = part.available_bytes - _room(request, part, rung, lead=rank == 0)
        if rank == 0 and request.drafter is not None:
            used -= request.drafter.least_bytes(rung[0], chunk=request.chunk(rung[0]), alone=False)
        used += charged - int(size.weights_factor * size.experts.whole(size.all_layers)) if on_disk else 0
        outcome.memory_bytes[part.device.name] = used
    stages = (Stage(layers=size.all_layers, shares=tuple(shares), topology="star"),)
    payload = payload_of(request, stages, rung[0])
    compute_s, outcome.exchange_s = _experts_s(request, parts, layers, placement)
    outcome.compute_s = _lead_s(request, parts[0]) + (sum(size.segments) + 1) * RUN_S + compute_s
    outcome.exchanges = _told(parts, placement)
    complete(request, outcome, parts, stages, rung, payload, overlap=False)


def _lead_s(request: Request, part: Slice) -> float:
    """Everything but experts, on the lead: attention, other columns, routers, the output matrix."""
    size, geometry, layers = request.size, request.manifest.geometry, request.size.all_layers
    heads, columns = Range(0, geometry.head_groups), Range(0, geometry.column_groups)
    weights = size.heads_read.total(layers, heads) + size.columns_read.total(layers, columns)
    weights += size.vocab.total(HEAD_LAYER, Range(0, geometry.vocab_groups)) + size.experts_read.whole(layers)
    read = size.kv_bytes(layers, heads, tokens=DECODE_DEPTH_TOKENS)
    return weights / part.weight_bytes_per_s + read / part.memory_bytes_per_s


def _layer_s(request: Request, parts: Sequence[Slice], number: int, per_set: Floats) -> tuple[Floats, Floats]:
    """Seconds of each set of experts in one layer: of the slowest device's experts, and with ways there and back."""
    hidden, exact = request.manifest.geometry.hidden, request.manifest.numeric_class.exact
    touched = [touch_bytes(pairs, hidden, exact=exact) for pairs in range(1, int(per_set.max(initial=0)) + 1)]
    travelling_bytes = np.array([0, *touched])
    here = Range(number, number + 1)
    expert_bytes = _read_bytes(request, here)
    computed, arrived = [], []
    for rank, part in enumerate(parts):
        rows = per_set[:, rank]
        own_s = rows * expert_bytes / part.weight_bytes_per_s + (rows > 0) * RUN_S
        computed.append(own_s)
        if rank:
            hop = request.network.hop(parts[0].device.node_id, part.device.node_id)
            ways_s = 2 * hop.latency_s + COLD_RUN_S + travelling_bytes[rows.astype(np.intp)] / hop.bytes_per_s
            own_s = own_s + (rows > 0) * ways_s
        arrived.append(own_s)
    return np.max(computed, axis=0), np.max(arrived, axis=0)


def _read_bytes(request: Request, layer: Range) -> float:
    """Bytes that one row reads of an expert, on average."""
    segment = next(one for one in request.manifest.layers[layer.start].segments if one.axis == "experts")
    return (weights_size(segment, Range(0, segment.groups)) - weights_size(segment, ())) / segment.groups


def _told(parts: Sequence[Slice], placement: ExpertPlacement) -> str:
    """Devices touched and messages of a token per layer, and each device's part of the experts."""
    total = sum(len(held) for one in placement.layers for held in one.held)
    shares = [
        f"{part.device.name} {sum(len(one.held[rank]) for one in placement.layers) / total:.0%}"
        for rank, part in enumerate(parts)
    ]
    return (
        f"{placement.touched:.2f} devices touched by a token in a layer, {placement.cost:.2f} of them over a link;"
        f" experts: {', '.join(shares)}"
    )
