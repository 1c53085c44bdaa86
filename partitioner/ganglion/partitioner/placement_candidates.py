"""Candidates: one way to run a model on a given set of devices, predicted. Pure.

A single device is tensor parallel over one. A stage's time is the sum over its axes of the slowest share, which equals
the sum over its segments when layers are alike (a lower bound otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from ganglion.partitioner.cost import (
    COLD_RUN_S,
    DECODE_DEPTH_TOKENS,
    HEAD_LAYER,
    RUN_S,
    AxisBytes,
    Device,
    ModelSize,
    Slice,
    exchange_s,
    slices,
)
from ganglion.partitioner.placement_order import arrange, chain
from ganglion.partitioner.placement_paging import charge, experts_bytes, paged_layer_bytes, with_caches
from ganglion.partitioner.placement_paging import fixed_bytes as paging_bytes
from ganglion.partitioner.placement_paging import pages as may_page
from ganglion.partitioner.placement_request import FULL_CONTEXTS, Outcome, Request, Rung
from ganglion.partitioner.placement_split import (
    AxisLoad,
    Counts,
    Shortage,
    divide,
    fill_layers,
    improve,
    largest_remainder,
    objective_s,
    proportional_layers,
    shortage,
)
from ganglion.partitioner.placement_sums import PAYLOADS, overlaps, payload_of
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS, Drafter, Plan, Range, Share, Stage, kv_capacity_tokens
from ganglion.wire.nouns.plan import Payload, Topology
from ganglion.wire.shares import every_expert

SESSIONS: Final = 16  # at a time, where none were asked for

EMPTY = Range(0, 0)
KEPT_TOKENS: Final = 8192  # of earlier sessions at most, unless more are asked for: several long chats


def tensor(request: Request, devices: Sequence[Device]) -> Outcome:
    """All layers on every device (in order of preference), each with its groups; one device is "single"."""
    mode: Literal["single", "tensor"] = "single" if len(devices) == 1 else "tensor"
    outcome = Outcome(mode=mode, devices=tuple(devices))
    orders, problem = arrange(request.network, request.options.topology, devices)
    if not orders:
        outcome.problem = f"{outcome.title}: {problem}"
        return outcome
    if mode == "tensor" and request.size.every_expert.count:
        outcome.problem = (
            f"{outcome.title}: {request.manifest.name} is cut by experts, and tensor parallel cuts each of them: use"
            " mode expert, or cut it with --experts columns"
        )
        return outcome
    if len(devices) > request.manifest.geometry.column_groups:
        groups = request.manifest.geometry.column_groups
        outcome.problem = f"{outcome.title}: {groups} column groups cannot be shared by {len(devices)} devices"
        return outcome
    tried = [_tensor(request, mode, topology, order) for topology, order in orders]
    return min(tried, key=lambda one: (one.plan is None, one.ms_per_token))


def _tensor(
    request: Request, mode: Literal["single", "tensor"], topology: Topology, order: Sequence[Device]
) -> Outcome:
    size, layers = request.size, request.size.all_layers
    experts = every_expert(request.manifest.layers)
    outcome = Outcome(mode=mode, devices=tuple(order))
    parts = slices(order, request.manifest.numeric_class)
    outcome.available_bytes = {part.device.name: part.available_bytes for part in parts}
    experts_held, cache = charge(request, layers, experts_bytes(request, layers))
    short = Shortage(0, 0)
    for rung in request.rungs:
        axes = _axes(request, parts, rung)
        room = [
            part.available_bytes - size.fixed_bytes(chunk=request.chunk(rung[0]), lead=rank == 0)
            for rank, part in enumerate(parts)
        ]
        room[0] = request.lead_room(room[0], rung, alone=len(parts) == 1)
        room[0] -= experts_held
        counts = _counts(request, axes, parts, room)
        if not isinstance(counts, Shortage):
            break
        short = counts
    else:
        outcome.problem = missing(outcome, order[short.device], short.missing_bytes, request)
        return outcome
    heads, columns, vocab = (_ranges(row) for row in counts)
    shares = tuple(
        Share(
            device=device.node_id,
            heads=heads[rank],
            columns=columns[rank],
            vocab=vocab[rank],
            experts=experts,
            expert_cache_bytes=cache,
        )
        for rank, device in enumerate(order)
    )
    _finish(request, outcome, parts, (Stage(layers=layers, shares=shares, topology=topology),), rung)
    return outcome


def pipeline(request: Request, devices: Sequence[Device]) -> Outcome:
    """A stage of layers on each of `devices`: as many as fit on the fastest, or in proportion when it was asked for."""
    outcome = Outcome(mode="pipeline", devices=tuple(devices))
    order, problem = chain(request.network, devices, as_named=bool(request.options.devices))
    if not order:
        outcome.problem = f"{outcome.title}: {problem}"
        return outcome
    outcome.devices = tuple(order)
    size, options, geometry = request.size, request.options, request.manifest.geometry
    parts = slices(order, request.manifest.numeric_class)
    outcome.available_bytes = {part.device.name: part.available_bytes for part in parts}
    if size.all_layers.count < len(order):
        outcome.problem = f"{outcome.title}: {size.all_layers.count} layers cannot be shared by {len(order)} devices"
        return outcome
    everything = (Range(0, geometry.head_groups), Range(0, geometry.column_groups))
    paging = may_page(request) and size.every_expert.count > 0
    heaviest = max(
        range(size.all_layers.count),
        key=lambda one: size.share_bytes(Range(one, one + 1), *everything, EMPTY, kv_tokens=1),
    )
    by_speed = sorted(range(len(parts)), key=lambda rank: (-parts[rank].weight_bytes_per_s, rank))
    lacking, capacity = 0, list[int]()
    for rung in request.rungs:
        kv_tokens = request.kv_tokens(rung)
        one = Range(heaviest, heaviest + 1)
        layer_bytes = size.share_bytes(one, *everything, EMPTY, kv_tokens=kv_tokens, experts=not paging)
        layer_bytes += paged_layer_bytes(request, one) if paging else 0
        capacity.clear()
        for rank, part in enumerate(parts):
            room = part.available_bytes - size.fixed_bytes(chunk=request.chunk(rung[0]), lead=rank == 0)
            if rank == 0:
                room = request.lead_room(room, rung, alone=False)
            if rank == len(parts) - 1:
                room -= size.share_bytes(EMPTY, EMPTY, EMPTY, Range(0, geometry.vocab_groups), kv_tokens=0)
            room -= paging_bytes(request) if paging else 0
            capacity.append(max(0, room // max(1, layer_bytes)))
        counts: list[int] | None
        if options.shares:
            weights = [float(options.shares[list(devices).index(device)]) for device in order]
            counts = largest_remainder(size.all_layers.count, weights, 1)
            counts = counts if all(n <= limit for n, limit in zip(counts, capacity, strict=True)) else None
        elif options.mode == "pipeline":
            counts = proportional_layers(size.all_layers.count, [p.weight_bytes_per_s for p in parts], capacity)
        else:
            counts = fill_layers(size.all_layers.count, by_speed, capacity)
        if counts is not None:
            break
        lacking = max(1, size.all_layers.count - sum(capacity)) * layer_bytes
    else:
        tightest = min(range(len(order)), key=lambda rank: (capacity[rank], rank))
        outcome.problem = missing(outcome, order[tightest], lacking, request)
        return outcome
    last = len(order) - 1
    stages = tuple(
        Stage(
            layers=layers,
            shares=(
                Share(
                    device=order[rank].node_id,
                    heads=everything[0],
                    columns=everything[1],
                    vocab=Range(0, geometry.vocab_groups) if rank == last else EMPTY,
                    experts=every_expert(request.manifest.layers[layers.start : layers.stop]),
                    expert_cache_bytes=charge(request, layers, experts_bytes(request, layers))[1],
                ),
            ),
            topology="mesh" if options.topology == "auto" else options.topology,
        )
        for rank, layers in enumerate(_ranges(counts))
    )
    _finish(request, outcome, parts, stages, rung)
    return outcome


def _axes(request: Request, parts: Sequence[Slice], rung: Rung) -> tuple[AxisLoad, AxisLoad, AxisLoad]:
    """Loads of heads, columns and vocabulary over all layers."""
    size, geometry, layers = request.size, request.manifest.geometry, request.size.all_layers
    kv_tokens = request.kv_tokens(rung)
    one = Range(0, 1)

    def load(held: AxisBytes, read: AxisBytes, of: Range, groups: int, *, least: int, kv: bool) -> AxisLoad:
        kv_read = size.kv_bytes(of, one, tokens=DECODE_DEPTH_TOKENS) if kv else 0
        kv_held = size.kv_bytes(of, one, tokens=kv_tokens) if kv else 0
        group_bytes, whole_bytes = read.largest_group(of), read.whole(of)
        return AxisLoad(
            groups=groups,
            each_s=tuple(group_bytes / p.weight_bytes_per_s + kv_read / p.memory_bytes_per_s for p in parts),
            fixed_s=tuple(whole_bytes / p.weight_bytes_per_s for p in parts),
            each_bytes=int(size.weights_factor * held.largest_group(of)) + kv_held,
            fixed_bytes=int(size.weights_factor * held.whole(of)),
            least=least,
        )

    every = int(geometry.head_groups >= len(parts))
    return (
        load(size.heads, size.heads_read, layers, geometry.head_groups, least=every, kv=True),
        load(size.columns, size.columns_read, layers, geometry.column_groups, least=1, kv=False),
        load(size.vocab, size.vocab, HEAD_LAYER, geometry.vocab_groups, least=0, kv=False),
    )


def _counts(
    request: Request, axes: Sequence[AxisLoad], parts: Sequence[Slice], room: Sequence[int]
) -> Counts | Shortage:
    options = request.options
    if options.shares:
        named = list(options.devices)
        weights = []
        for part in parts:
            key = part.device.name if part.device.name in named else part.device.node_id
            weights.append(float(options.shares[named.index(key)]))
        counts = [largest_remainder(axis.groups, weights, axis.least) for axis in axes]
        return shortage(axes, counts, room) or counts
    counts_or_short = divide(axes, room)
    if isinstance(counts_or_short, Shortage):
        return counts_or_short
    unlimited = divide(axes, [2**62] * len(room))
    bound = not isinstance(unlimited, Shortage) and objective_s(axes, unlimited) < objective_s(axes, counts_or_short)
    return improve(axes, counts_or_short, room) if bound else counts_or_short


def _ranges(counts: Sequence[int]) -> list[Range]:
    found, start = [], 0
    for count in counts:
        found.append(Range(start, start + count))
        start += count
    return found


def _finish(request: Request, outcome: Outcome, parts: Sequence[Slice], stages: tuple[Stage, ...], rung: Rung) -> None:
    """Predict `stages`, weigh every share, and make the plan."""
    size, network, context = request.size, request.network, rung[0]
    by_id = {part.device.node_id: part for part in parts}
    hidden_bytes = request.manifest.geometry.hidden * (8 if request.manifest.handover == "parts" else 4)
    compute_s = handover_s = sums_s = 0.0
    payload = payload_of(request, stages, context)
    sums = handovers = 0
    for index, stage in enumerate(stages):
        ids = [share.device for share in stage.shares]
        compute_s += _stage_s(size, stage, by_id)
        if len(ids) > 1:
            for row_bytes, count in size.exchanges(stage.layers).items():
                sums += count
                sums_s += count * exchange_s(network, ids, stage.topology, int(PAYLOADS[payload] * row_bytes))
        handed = [device for device in ids if device != stages[0].shares[0].device] if index == 0 else ids
        sender = stages[max(0, index - 1)].shares[0].device
        if handed:
            handovers += 1
            handover_s += max(network.hop(sender, device).seconds(hidden_bytes) for device in handed)
    lead = stages[0].shares[0].device
    drawing = [share.device for share in stages[-1].shares if share.device != lead]
    if drawing:
        handovers += 1
        handover_s += max(network.hop(device, lead).latency_s for device in drawing)
    lone = len(parts) == 1
    compute_s += (sum(size.segments) + 1) * (RUN_S if lone else RUN_S + COLD_RUN_S)
    outcome.compute_s, outcome.exchange_s = compute_s, sums_s + handover_s
    told = [f"{sums} exchanges of {sums_s / sums * 1e3:.2f} ms"] if sums else []
    told += [f"sums travel as {payload}"] if payload != "full" else []
    told += [f"{handovers} hand-overs of {handover_s / handovers * 1e3:.2f} ms"] if handovers else []
    outcome.exchanges = ", ".join(told)
    for stage in stages:
        for share in stage.shares:
            fixed = size.fixed_bytes(chunk=request.chunk(context), lead=share.device == lead)
            loaded = size.share_bytes(
                stage.layers, share.heads, share.columns, share.vocab, kv_tokens=request.kv_tokens(rung), experts=False
            )
            loaded += charge(request, stage.layers, experts_bytes(request, stage.layers))[0]
            outcome.memory_bytes[by_id[share.device].device.name] = fixed + loaded
    overlap = overlaps(request, stages, payload, context, compute_s)
    complete(request, outcome, parts, stages, rung, payload, overlap=overlap)


def complete(  # noqa: PLR0917 - what was decided of one candidate
    request: Request,
    outcome: Outcome,
    parts: Sequence[Slice],
    stages: tuple[Stage, ...],
    rung: Rung,
    payload: Payload,
    *,
    overlap: bool,
) -> None:
    """Make the plan of a predicted and weighed outcome, with what fits beside it: a drafter, tokens that are kept."""
    context, held = rung
    by_id = {part.device.node_id: part for part in parts}
    lead, lone = stages[0].shares[0].device, len(parts) == 1
    prefix_tokens = request.prefix_tokens
    drafter = _seat_drafter(request, outcome, by_id[lead].device.name, context, alone=lone)
    if request.options.prefix_tokens is None:
        prefix_tokens = _keep_what_fits(request, outcome, by_id, stages, context)
    stages = with_caches(request, outcome, by_id, stages)
    _remark(request, outcome, rung)
    outcome.plan = Plan(
        manifest_digest=request.manifest_digest,
        numeric_class=request.manifest.numeric_class,
        context=context,
        sessions=request.options.sessions or SESSIONS,
        kv_tokens=held * kv_capacity_tokens(context),
        chunk=request.chunk(context),
        stages=stages,
        threads={part.device.node_id: part.threads for part in sorted(parts, key=lambda p: p.device.node_id)},
        payload=payload,
        overlap=overlap,
        prefix_tokens=prefix_tokens,
        drafter=drafter,
        drafting=request.options.drafting,
    )


def _seat_drafter(request: Request, outcome: Outcome, name: str, context: int, *, alone: bool) -> Drafter | None:
    """The drafter at the lead called `name`, charged there; None without one."""
    if request.drafter is None:
        return None
    spare_bytes = outcome.available_bytes[name] - outcome.memory_bytes[name]
    sessions = request.options.sessions or SESSIONS
    seat = request.drafter.seat(sessions, spare_bytes, context, chunk=request.chunk(context), alone=alone)
    outcome.memory_bytes[name] += seat.size_bytes
    outcome.remarks.append(f"{seat.remark} on {name}" if seat.size_bytes else seat.remark)
    return seat.drafter


def _keep_what_fits(
    request: Request, outcome: Outcome, parts: dict[str, Slice], stages: Sequence[Stage], context: int
) -> int:
    """Tokens kept of earlier sessions when nobody said how many, charged to every device; in whole blocks."""
    blocks = min(context, KEPT_TOKENS) // PREFIX_BLOCK_TOKENS
    block_bytes: dict[str, int] = {}
    for stage in stages:
        for share in stage.shares:
            name = parts[share.device].device.name
            block_bytes[name] = request.size.kv_bytes(stage.layers, share.heads, tokens=PREFIX_BLOCK_TOKENS)
            spare_bytes = max(0, outcome.available_bytes[name] - outcome.memory_bytes[name])
            blocks = min(blocks, spare_bytes // max(1, block_bytes[name]))
    for name, size_bytes in block_bytes.items():
        outcome.memory_bytes[name] += blocks * size_bytes
    return blocks * PREFIX_BLOCK_TOKENS


def _stage_s(size: ModelSize, stage: Stage, parts: dict[str, Slice]) -> float:
    heads_s, columns_s, vocab_s, experts_s = [0.0], [0.0], [0.0], [0.0]
    for share in stage.shares:
        part = parts[share.device]
        read = size.kv_bytes(stage.layers, share.heads, tokens=DECODE_DEPTH_TOKENS)
        weights = size.heads_read.total(stage.layers, share.heads)
        heads_s.append(weights / part.weight_bytes_per_s + read / part.memory_bytes_per_s)
        columns_s.append(size.columns_read.total(stage.layers, share.columns) / part.weight_bytes_per_s)
        vocab_s.append(size.vocab.total(HEAD_LAYER, share.vocab) / part.weight_bytes_per_s)
        experts_s.append(size.experts_read.total(stage.layers, size.every_expert) / part.weight_bytes_per_s)
    return max(heads_s) + max(columns_s) + max(vocab_s) + max(experts_s)


def _remark(request: Request, outcome: Outcome, rung: Rung) -> None:
    context, held = rung
    own = request.manifest.geometry.context
    if not request.options.context and context < own:
        outcome.remarks.append(f"context reduced to {context} of {own} to fit: more memory raises it")
    if held < min(FULL_CONTEXTS, request.options.sessions or FULL_CONTEXTS):
        outcome.remarks.append(f"key-value memory for {held} full context{'s' if held > 1 else ''}")
    ids = [device.node_id for device in outcome.devices]
    names = {device.node_id: device.name for device in outcome.devices}
    for index, one in enumerate(ids):
        for other in ids[index + 1 :]:
            hop = request.network.hop(one, other)
            if hop.assumed:
                outcome.remarks.append(
                    f"link {names[one]} - {names[other]} not measured: {hop.latency_s * 1e3:.1f} ms one way assumed"
                )


def missing(outcome: Outcome, device: Device, missing_bytes: int, request: Request) -> str:
    """What a person reads where `device` is too small by so many bytes."""
    context, held = request.rungs[-1]
    available = outcome.available_bytes[device.name]
    kept = f", and {request.prefix_tokens} tokens kept (--prefix-tokens)" if request.prefix_tokens else ""
    if request.drafter is not None and request.drafter.size is not None:
        kept += f", and {request.drafter.name} to draft (--drafter)"
    way_out = "use int4, which holds the weights once," if request.size.mixed else "use int4,"
    whole = request.size.every_expert.count > 0 and not request.options.expert_memory_bytes
    keep = " keep experts on disk (--expert-memory)," if whole else ""
    return (
        f"{outcome.title}: {device.name} lacks {missing_bytes / 1e6:.0f} MB beyond its {available / 1e6:.0f} MB, at"
        f" context {context} and key-value memory for {held} of it{kept}: raise its memory budget, lower"
        f" the context, {way_out}{keep} or add a device"
    )
