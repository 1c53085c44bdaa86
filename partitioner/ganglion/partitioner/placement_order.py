"""The order of ranks in a candidate: who leads, and whether every pair that must exchange can meet (D6). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from ganglion.partitioner.cost import Device, Network
from ganglion.wire.nouns.plan import Topology


def arrange(
    network: Network, asked: Topology | Literal["auto"], devices: Sequence[Device]
) -> tuple[list[tuple[Topology, list[Device]]], str]:
    """For each topology that works, the order of ranks: the lead (an owner) first, then who cannot be dialled.

    Of each pair the lower rank dials. The second value names what stands in the way when no topology works.
    """
    topologies: tuple[Topology, ...] = ("mesh", "star") if asked == "auto" else (asked,)
    found: list[tuple[Topology, list[Device]]] = []
    problem = "no device is labelled owner, and the lead must be"
    for topology in topologies:
        for lead in (device for device in devices if device.label == "owner"):
            rest = [device for device in devices if device is not lead]
            shy = {d.node_id: sum(not network.can_dial(o.node_id, d.node_id) for o in rest if o is not d) for d in rest}
            order = [lead, *sorted(rest, key=lambda device: -shy[device.node_id])]
            pairs = (
                [(a, b) for index, a in enumerate(order) for b in order[index + 1 :]]
                if topology == "mesh"
                else [(lead, device) for device in order[1:]]
            )
            blocked = _blocked(network, pairs)
            if not blocked:
                found.append((topology, order))
                break
            problem = blocked
        if len(devices) == 1:
            break
    return found, problem


def chain(network: Network, devices: Sequence[Device], *, as_named: bool) -> tuple[list[Device], str]:
    """Stages in order: as named, else each next one the nearest; empty, with a reason, when impossible."""
    problem = "no device is labelled owner, and the lead must be"
    for lead in (device for device in devices if device.label == "owner"):
        order, rest = [lead], [device for device in devices if device is not lead]
        while rest:
            here = order[-1].node_id
            near = rest[0] if as_named else min(rest, key=lambda d: (network.hop(here, d.node_id).latency_s, d.node_id))
            order.append(near)
            rest.remove(near)
        pairs = [(lead, device) for device in order[1:]] + list(pairwise(order))
        blocked = _blocked(network, pairs)
        if not blocked:
            return order, ""
        problem = blocked
    return [], problem


def _blocked(network: Network, pairs: Sequence[tuple[Device, Device]]) -> str:
    for one, other in pairs:
        if not network.can_dial(one.node_id, other.node_id):
            return f"{one.name} cannot reach {other.name}, and they have to exchange: open its port, or leave one out"
    return ""
