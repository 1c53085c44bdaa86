"""Placement: which devices run which shares, by the least predicted time of a token (D4, D6, D13). Pure.

Every single device, tensor-parallel set and pipeline is predicted; subsets are enumerated up to six devices, beyond
that sets grow by speed. The least predicted time among what fits wins, a single device wins ties, and every
candidate says why it won or lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Final, Literal

import msgspec

from ganglion.partitioner.cost import (
    Device,
    LinkFigures,
    Links,
    ModelSize,
    Network,
    TrustLabel,
    decode_rate,
    rate_key,
)
from ganglion.partitioner.expert_placement_routes import DEVICES, CountedRoutes
from ganglion.partitioner.placement_candidates import pipeline, tensor
from ganglion.partitioner.placement_drafter import drafter_load
from ganglion.partitioner.placement_experts import expert
from ganglion.partitioner.placement_request import FULL_CONTEXTS, Outcome, Request
from ganglion.wire.errors import InvalidRequest, NotFound, PermissionDenied
from ganglion.wire.nouns import Candidate, Manifest, PlanOptions, PlanReport, digest

__all__ = ["Device", "LinkFigures", "Links", "TrustLabel", "place", "surviving_options"]

EXACT_DEVICES: Final = 6  # 2**6 subsets; beyond it sets grow greedily by speed
_MODE_ORDER: Final = {"single": 0, "tensor": 1, "pipeline": 2, "expert": 3}


def place(  # noqa: PLR0917 - as a Planner of the coordinator takes them
    manifest: Manifest,
    devices: Sequence[Device],
    links: Mapping[tuple[str, str], LinkFigures],
    options: PlanOptions,
    drafter: Manifest | None = None,
    routes: CountedRoutes | None = None,
    soon: bool = False,
) -> PlanReport:
    """Predict every way to run `manifest` on `devices` and choose the fastest that fits.

    `links` holds what each device measured of the others; a missing pair is taken at a conservative prior, and the
    reason says so. `PlanReport.plan` is None when nothing fits, the reasons saying how many bytes are missing where.
    The same devices, links and options in any order give the same report. `drafter`: the model that guesses at the
    lead, where the options say so. `routes`: which experts tokens chose, for a model that is cut by experts; None where
    nobody counted. Placing experts takes seconds then, unless it is wanted `soon`, by a deployment that lost a device.
    A plan that drafts for another model is on one device that is labelled owner.

    Raises InvalidRequest for options that contradict each other, NotFound for a device that is not among `devices`,
    InvalidRequest naming what differs for a drafter of another tokenizer or vocabulary,
    PermissionDenied when `private` excludes a named device, InvalidDocument for a manifest whose pieces do not match.
    """
    if options.drafting is not None:
        devices = [_limited(device, options.drafting.memory_bytes) for device in devices]
        options = msgspec.structs.replace(options, mode="single", private=True)
    usable = _select(devices, manifest, options)
    request = Request(
        manifest=manifest,
        manifest_digest=digest(manifest),
        size=ModelSize(manifest),
        network=Network(links, devices),
        options=options,
        rungs=_rungs(manifest, options),
        drafter=drafter_load(manifest, options, drafter),
        routes=routes.layers if routes is not None else (),
        routed_tokens=routes.tokens if routes is not None else 0,
        soon=soon,
    )
    outcomes = list(_outcomes(request, usable))
    feasible = [outcome for outcome in outcomes if outcome.plan is not None]
    if not feasible and request.size.every_expert.count and not options.expert_memory_bytes:
        paging = replace(request, paging=True)
        paged = list(_outcomes(paging, usable))
        if any(outcome.plan is not None for outcome in paged):
            request, outcomes = paging, paged
            feasible = [outcome for outcome in outcomes if outcome.plan is not None]
    best = min(feasible, key=_rank) if feasible else None
    if best is not None and best.mode == "expert" and request.routes:
        placed = expert(request, best.devices, settled=True)
        if placed.plan is not None and _rank(placed) <= _rank(best):
            outcomes[outcomes.index(best)] = placed
            best = min((one for one in outcomes if one.plan is not None), key=_rank)
    ordered = sorted(outcomes, key=lambda outcome: (outcome is not best, outcome.plan is None, _rank(outcome)))
    labels: dict[str, TrustLabel] = {device.name: device.label for device in usable}
    return PlanReport(
        model=manifest.name,
        numeric_class=manifest.numeric_class.name,
        candidates=tuple(_candidate(outcome, best) for outcome in ordered),
        plan=best.plan if best else None,
        notes=_notes(best, labels) if best else (),
    )


def surviving_options(options: PlanOptions, devices: Sequence[Device]) -> PlanOptions:
    """What is left of a person's choice when devices were lost: names not among `devices` go, with their shares.

    Where fewer than two are left a wish for several devices is dropped, so that the survivors can answer at all. When
    none that was named is left nothing changes: who named devices did not mean others.
    """
    known = {device.node_id for device in devices} | {device.name for device in devices}
    kept = [index for index, name in enumerate(options.devices) if name in known]
    if options.devices and not kept:
        return options
    left = len(kept) if kept else len(devices)
    return msgspec.structs.replace(
        options,
        devices=tuple(options.devices[index] for index in kept),
        shares=tuple(options.shares[index] for index in kept) if options.shares and left > 1 else (),
        mode="auto" if left < 2 else options.mode,
    )


def _limited(device: Device, memory_bytes: int) -> Device:
    """The device with at most so much memory; 0: as it is."""
    budget = device.profile.memory_budget_bytes
    if not 0 < memory_bytes < budget:
        return device
    profile = msgspec.structs.replace(device.profile, memory_budget_bytes=memory_bytes)
    return Device(device.node_id, device.name, device.label, profile)


def _rank(outcome: Outcome) -> tuple[float, int, int, tuple[str, ...]]:
    ms = round(outcome.ms_per_token, 6)
    return ms, len(outcome.devices), _MODE_ORDER[outcome.mode], tuple(device.node_id for device in outcome.devices)


def _select(devices: Sequence[Device], manifest: Manifest, options: PlanOptions) -> list[Device]:
    """The devices that may be used, in order of preference: as named, else the fastest first."""
    known = {device.node_id: device for device in devices} | {device.name: device for device in devices}
    if options.shares and len(options.shares) != len(options.devices):
        raise InvalidRequest(
            f"shares: {len(options.shares)} given for {len(options.devices)} devices; name one device for each share",
            param="shares",
        )
    if options.shares and options.mode == "single":
        raise InvalidRequest(
            "shares: a single device takes the whole model; use mode tensor or pipeline", param="shares"
        )
    if options.devices:
        chosen = []
        for name in options.devices:
            if name not in known:
                have = ", ".join(sorted(device.name for device in devices)) or "none"
                raise NotFound(f"devices: no device {name!r} is ready; ready: {have}", param="devices")
            chosen.append(known[name])
        if len({device.node_id for device in chosen}) != len(chosen):
            raise InvalidRequest("devices: a device is named twice", param="devices")
    else:
        chosen = sorted(devices, key=lambda d: (-decode_rate(d.profile, manifest.numeric_class), d.node_id))
    if options.private:
        strangers = [device for device in chosen if device.label != "owner"]
        if options.devices and strangers:
            raise PermissionDenied(
                f"private: {strangers[0].name} is labelled {strangers[0].label}; private plans take owner devices only",
                param="private",
            )
        chosen = [device for device in chosen if device.label == "owner"]
    whole = any(segment.axis == "experts" for layer in manifest.layers for segment in layer.segments)
    if options.expert_memory_bytes and not whole:
        raise InvalidRequest(
            f"expert_memory: {manifest.name} is not cut by experts: cut a mixture with --experts whole, or leave"
            " --expert-memory out",
            param="expert_memory",
        )
    if options.payload in {"fp16", "int8"} and manifest.numeric_class.exact:
        raise InvalidRequest(
            f"payload: {options.payload} rounds partial sums, and {manifest.numeric_class.name} is an exact class; use"
            " a fast one",
            param="payload",
        )
    if options.mode in {"tensor", "pipeline", "expert"} and options.devices and len(chosen) < 2:
        raise InvalidRequest(f"mode: {options.mode} needs at least two devices, one is named", param="mode")
    return chosen


def _rungs(manifest: Manifest, options: PlanOptions) -> tuple[tuple[int, int], ...]:
    """(context, full contexts that fit at a time) from the most wanted to the least.

    What the options leave open is reduced in this order: the context down to 8192 tokens, the key-value memory from
    four full contexts to one, then the context down to 512.
    """
    own = manifest.geometry.context
    if options.context > own:
        raise InvalidRequest(f"context: {options.context} asked, {manifest.name} has {own}", param="context")
    held = range(min(FULL_CONTEXTS, options.sessions or FULL_CONTEXTS), 0, -1)
    if options.context:
        return tuple((options.context, count) for count in held)
    contexts = [own]
    while contexts[-1] // 2 >= 512:
        contexts.append(contexts[-1] // 2)
    comfortable = [context for context in contexts if context >= min(own, 8192)]
    rungs = [(context, held[0]) for context in comfortable]
    rungs += [(comfortable[-1], count) for count in held[1:]]
    rungs += [(context, held[-1]) for context in contexts[len(comfortable) :]]
    return tuple(rungs)


def _outcomes(request: Request, usable: Sequence[Device]) -> Iterator[Outcome]:
    mode = request.options.mode
    measured = []
    for device in usable:
        if decode_rate(device.profile, request.manifest.numeric_class) > 0:
            measured.append(device)
            continue
        key = rate_key(request.manifest.numeric_class)
        yield Outcome(
            mode="single", devices=(device,), problem=f"{device.name} has no measured rate for {key}: probe it"
        )
    if len(measured) < (1 if mode in {"auto", "single"} else 2):
        needed = "at least one device" if mode in {"auto", "single"} else "at least two devices"
        wanted: Literal["single", "tensor", "pipeline", "expert"] = "single" if mode == "auto" else mode
        problem = f"{wanted}: it needs {needed} that may be used, {len(measured)} may: start agents, or see --private"
        yield Outcome(mode=wanted, devices=tuple(measured), problem=problem)
        return
    if mode in {"auto", "single"} and not request.options.shares:
        for device in measured:
            yield tensor(request, (device,))
    whole_experts = request.size.every_expert.count > 0
    for number, group in enumerate(_groups(request, measured)):
        if mode == "tensor" or (mode == "auto" and (not whole_experts or not number)):  # refused once is enough
            yield tensor(request, group)
        if mode in {"auto", "pipeline"}:
            yield pipeline(request, group)
    if mode == "expert" or (mode == "auto" and whole_experts):
        for group in _grown(request, measured):
            yield expert(request, group)


def _grown(request: Request, usable: Sequence[Device]) -> Iterator[tuple[Device, ...]]:
    """Sets of devices for experts: all that were named, else the lead with the fastest one, the two fastest, ..."""
    if request.options.devices and (request.options.shares or request.options.mode != "auto"):
        yield tuple(usable)
        return
    lead = next((device for device in usable if device.label == "owner"), usable[0])
    grown = [lead, *(device for device in usable if device is not lead)][:DEVICES]
    for count in range(2, len(grown) + 1):
        yield tuple(sorted(grown[:count], key=usable.index))


def _groups(request: Request, usable: Sequence[Device]) -> Iterator[tuple[Device, ...]]:
    """Sets of at least two devices to consider, each in order of preference."""
    options = request.options
    if options.mode == "single" or len(usable) < 2:
        return
    if options.devices and (options.shares or options.mode != "auto"):
        yield tuple(usable)
    elif len(usable) <= EXACT_DEVICES:
        for count in range(2, len(usable) + 1):
            yield from combinations(usable, count)
    else:
        lead = next((device for device in usable if device.label == "owner"), usable[0])
        grown = [lead]
        for device in usable:
            meets = all(request.network.can_dial(lead.node_id, other.node_id) for other in (*grown, device))
            if device is not lead and meets:
                grown.append(device)
                yield tuple(sorted(grown, key=usable.index))


def _candidate(outcome: Outcome, best: Outcome | None) -> Candidate:
    fits = outcome.plan is not None
    return Candidate(
        mode=outcome.mode,
        devices=tuple(device.name for device in outcome.devices),
        feasible=fits,
        chosen=outcome is best,
        reason=_reason(outcome, best),
        ms_per_token=outcome.ms_per_token if fits else None,
        compute_ms=outcome.compute_s * 1e3 if fits else None,
        exchange_ms=outcome.exchange_s * 1e3 if fits else None,
        memory_bytes=outcome.memory_bytes,
        available_bytes=outcome.available_bytes,
        plan=outcome.plan,
    )


def _reason(outcome: Outcome, best: Outcome | None) -> str:
    if outcome.plan is None or best is None:
        return outcome.problem
    costs = f": {outcome.exchanges}" if outcome.exchanges else ""
    remarks = "".join(f"; {remark}" for remark in outcome.remarks)
    if outcome is best:
        return f"{outcome.title}: {outcome.ms_per_token:.1f} ms a token, the least predicted{costs}{remarks}"
    against = f"{outcome.ms_per_token:.1f} ms against {best.ms_per_token:.1f} of {best.title}"
    return f"{outcome.title}: {against}{costs}{remarks}"


def _notes(best: Outcome, labels: Mapping[str, TrustLabel]) -> tuple[str, ...]:
    """What the chosen plan does not protect (D11), and where its numbers are not those of one device."""
    names = [device.name for device in best.devices]
    notes = []
    if len(names) > 1:
        notes.append(
            f"{', '.join(names)} each compute on activations, from which most of a prompt can be reconstructed; sealing"
            " protects against the network and the coordinator, not against the devices of the plan"
        )
    others = [name for name in names if labels[name] != "owner"]
    if others:
        listed = ", ".join(f"{name} ({labels[name]})" for name in others)
        notes.append(f"not labelled owner: {listed}; --private keeps the plan to owner devices")
    families = {device.profile.kernel_family for device in best.devices}
    if len(families) > 1:
        notes.append(
            f"{', '.join(names)} are {len(families)} kernel families ({'; '.join(sorted(families))}): where two tokens"
            " are nearly as likely, the answer may differ from that of a single device"
        )
    return tuple(notes)
