"""Who sends what to whom, in which order: a pure core that both topologies and the dialling of lanes follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ganglion.wire.nouns import Plan, Stage
from ganglion.wire.nouns.plan import Topology


@dataclass(frozen=True, slots=True)
class ExchangePlan:
    """One device's part of an all-reduce, in the order of the fields.

    send_own_to: ranks that get this device's partial sum. add: the contributors in order of rank, this device among
    them if it contributes; their partial sums are received and added in that order. send_sum_to: ranks that get the
    sum. take_sum_from: the rank that sends the sum instead of adding here, else None.
    """

    send_own_to: tuple[int, ...]
    add: tuple[int, ...]
    send_sum_to: tuple[int, ...]
    take_sum_from: int | None


def plan_exchange(ranks: Sequence[int], contributors: Sequence[int], topology: Topology, rank: int) -> ExchangePlan:
    """The part of `rank` in a sum over `contributors` that all of `ranks` need; both in rising order, hub first.

    Invariant: over all ranks, every send has one receive, and every rank ends up with the sum of all contributors.
    """
    others = tuple(other for other in ranks if other != rank)
    if topology == "mesh":
        return ExchangePlan(others if rank in contributors else (), tuple(contributors), (), None)
    hub = ranks[0]
    if rank == hub:
        return ExchangePlan((), tuple(contributors), others, None)
    return ExchangePlan((hub,) if rank in contributors else (), (), (), hub)


def stage_ranks(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """The ranks of the shares of each stage."""
    found, first = [], 0
    for stage in plan.stages:
        found.append(tuple(range(first, first + len(stage.shares))))
        first += len(stage.shares)
    return tuple(found)


def contributors(stage: Stage, ranks: Sequence[int], axis: str) -> tuple[int, ...]:
    """The ranks whose range of `axis` ("heads" or "columns") is not empty."""
    pairs = zip(stage.shares, ranks, strict=True)
    return tuple(rank for share, rank in pairs if (share.heads if axis == "heads" else share.columns).count)


def lane_pairs(plan: Plan) -> frozenset[tuple[int, int]]:
    """The pairs (lower, higher rank) that need a lane; the lower rank dials.

    The lead speaks with everyone; within a stage everyone with everyone (mesh) or with the hub (star); the first share
    of a stage with all of the next.
    """
    stages = stage_ranks(plan)
    pairs = {(0, rank) for ranks in stages for rank in ranks if rank}
    for stage, ranks in zip(plan.stages, stages, strict=True):
        hubs = ranks if stage.topology == "mesh" else ranks[:1]
        pairs |= {(min(a, b), max(a, b)) for a in hubs for b in ranks if a != b}
    for ranks, following in pairwise(stages):
        pairs |= {(ranks[0], rank) for rank in following}
    return frozenset(pairs)
