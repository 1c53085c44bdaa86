"""Experts that do not all lie in memory: what they are charged, and what reading the others costs a token. Pure.

A device whose memory for experts is less than they take keeps them in files, and holds as many as that memory does. It
is so where the options say how much (`expert_memory_bytes`), or, once nothing fits otherwise, as much as is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from ganglion.partitioner.cost import Slice
from ganglion.partitioner.placement_request import Outcome, Request
from ganglion.wire.nouns import Range, Share, Stage

PAGING_BYTES: Final = 64 << 20  # that paging takes beside experts: tables that foretell them
PACKING: Final = 2  # times a layer's experts: what packing them for the disk takes, before any is held
LEAST_SHARE: Final = 0.25  # of experts' bytes that must be held where nobody said how many: below, it is all reading
PRIOR_DISK_BYTES_PER_S: Final = 200e6  # where a disk was not measured
HIT_POWER: Final = 0.5  # a share s of the experts in memory is assumed to serve s ** HIT_POWER of what tokens take


def pages(request: Request) -> bool:
    """Whether experts may stay on disk."""
    return request.paging or request.options.expert_memory_bytes > 0


def fixed_bytes(request: Request) -> int:
    """What a device that pages needs whatever it holds: with the options' budget of experts, where they say one."""
    size = request.size
    layers = (Range(one, one + 1) for one in range(size.all_layers.count))
    packing = PACKING * max((experts_bytes(request, layer) for layer in layers), default=0)
    return PAGING_BYTES + max(request.options.expert_memory_bytes, packing)


def experts_bytes(request: Request, layers: Range) -> int:
    """All experts of `layers` as they lie in files."""
    experts = request.size.experts
    return experts.total(layers, request.size.every_expert) - experts.whole(layers)


def paged_layer_bytes(request: Request, layer: Range) -> int:
    """What one more paged layer takes at least, beside `fixed_bytes`: its router, and of its experts what must be."""
    least = 0.0 if request.options.expert_memory_bytes else LEAST_SHARE * experts_bytes(request, layer)
    return int(request.size.weights_factor * request.size.experts.whole(layer)) + math.ceil(least)


def charge(request: Request, layers: Range, held_bytes: int) -> tuple[int, int]:
    """Memory of experts that lie in `held_bytes` of files, and of it, where not all are held, that for experts; else 0.

    Routers and norms of `layers`, which every share has, are included.
    """
    size, budget = request.size, request.options.expert_memory_bytes
    whole = size.experts.whole(layers)
    resident = int(size.weights_factor * held_bytes)
    if not held_bytes or not pages(request) or (budget and resident <= budget):
        return int(size.weights_factor * (held_bytes + whole)) if held_bytes else 0, 0
    cache = budget or math.ceil(LEAST_SHARE * held_bytes)
    return int(size.weights_factor * whole) + max(fixed_bytes(request), PAGING_BYTES + cache), cache


def held_bytes(request: Request, stage: Stage, share: Share) -> int:
    """A share's experts as they lie in files."""
    found = 0
    for number, experts in zip(range(stage.layers.start, stage.layers.stop), share.experts, strict=True):
        here = Range(number, number + 1)
        every = Range(0, len(experts))
        if experts == tuple(range(every.stop)) and every == request.size.every_expert:
            found += experts_bytes(request, here)
            continue
        whole = request.size.experts.whole(here)
        found += sum(request.size.experts.total(here, Range(one, one + 1)) - whole for one in experts)
    return found


def with_caches(
    request: Request, outcome: Outcome, parts: Mapping[str, Slice], stages: Sequence[Stage]
) -> tuple[Stage, ...]:
    """The stages with what is left of memory given to experts, if nobody said how much; reading is predicted."""
    found = []
    for stage in stages:
        waits_s, shares = 0.0, []
        for share in stage.shares:
            if share.expert_cache_bytes:
                grown, wait_s = _grown(request, outcome, parts[share.device], stage, share)
                waits_s = max(waits_s, wait_s)
                shares.append(grown)
            else:
                shares.append(share)
        outcome.compute_s += waits_s
        found.append(msgspec.structs.replace(stage, shares=tuple(shares)))
    return tuple(found)


def _grown(request: Request, outcome: Outcome, part: Slice, stage: Stage, share: Share) -> tuple[Share, float]:
    name, cache = part.device.name, share.expert_cache_bytes
    held = held_bytes(request, stage, share)
    if not request.options.expert_memory_bytes:
        charged = charge(request, stage.layers, held)[0]
        spare = outcome.available_bytes[name] - outcome.memory_bytes[name]
        # Packing is over when experts are held: the memory it took is theirs then.
        whole = int(request.size.weights_factor * request.size.experts.whole(stage.layers))
        room = charged + spare - whole
        resident = int(request.size.weights_factor * held)
        if resident <= room:
            outcome.memory_bytes[name] += resident + whole - charged
            return msgspec.structs.replace(share, expert_cache_bytes=0), 0.0
        cache = max(cache, room - PAGING_BYTES)
        outcome.memory_bytes[name] += max(charged, whole + PAGING_BYTES + cache) - charged
    part_held = min(1.0, cache / held)
    hits = part_held**HIT_POWER
    size, layers = request.size, stage.layers
    taken = size.experts_read.total(layers, size.every_expert) - size.experts_read.whole(layers)
    missed_bytes = (1 - hits) * taken * held / max(1, experts_bytes(request, layers))
    measured = part.device.profile.disk_read_bytes_per_s
    wait_s = missed_bytes / (measured or PRIOR_DISK_BYTES_PER_S)
    rate = f"{(measured or PRIOR_DISK_BYTES_PER_S) / 1e6:.0f} MB/s{'' if measured else ' (assumed)'}"
    outcome.remarks.append(
        f"{name} keeps {max(0, held - cache) / 1e6:.1f} of {held / 1e6:.1f} MB of experts on disk: {wait_s * 1e3:.1f}"
        f" ms a token to read at {rate}, if {hits:.0%} of what tokens take is in memory (assumed)"
    )
    return msgspec.structs.replace(share, expert_cache_bytes=cache), wait_s
