"""Routes of mixtures as leads report them: checked, added up for each model, and as the planner takes them. Pure."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from ganglion.partitioner.expert_placement_routes import CountedRoutes, RouteSets
from ganglion.proto import fleet_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.limits import ROUTE_SETS, ROUTED_TOKENS
from ganglion.wire.nouns import Manifest

REMEMBERED_TOKENS: Final = 1 << 17  # beyond them what was counted before counts half
_LAYERS: Final = 1024
_TOKENS: Final = 1 << 40


def check_routes(report: fleet_pb2.RouteReport, manifest: Manifest) -> None:
    """Raise ProtocolViolation for a report that no lead of this model makes."""
    if not ROUTED_TOKENS <= report.tokens <= _TOKENS:
        raise ProtocolViolation(f"routes of {report.tokens} tokens; a report counts at least {ROUTED_TOKENS}")
    if len(report.layers) != len(manifest.layers) or len(report.layers) > _LAYERS:
        raise ProtocolViolation(f"routes of {len(report.layers)} layers, {manifest.name} has {len(manifest.layers)}")
    for number, (told, experts) in enumerate(zip(report.layers, experts_of(manifest), strict=True)):
        if len(told.sets) > ROUTE_SETS:
            raise ProtocolViolation(f"routes of layer {number}: {len(told.sets)} sets, at most {ROUTE_SETS}")
        if told.others + sum(one.tokens for one in told.sets) > report.tokens:
            raise ProtocolViolation(f"routes of layer {number}: more tokens than the {report.tokens} of the report")
        for one in told.sets:
            falls = any(first >= second for first, second in pairwise(one.experts))
            if not one.experts or falls or one.experts[-1] >= experts or not one.tokens:
                raise ProtocolViolation(f"routes of layer {number}: a set that is none of its {experts} experts")


def experts_of(manifest: Manifest) -> list[int]:
    """Experts of every layer; 0 of one without, or whose experts are cut by columns."""
    return [next((one.groups for one in layer.segments if one.axis == "experts"), 0) for layer in manifest.layers]


def added(before: bytes, report: fleet_pb2.RouteReport) -> bytes:
    """A report added to what was known of the model (a serialized RouteReport, b"" for nothing)."""
    known = fleet_pb2.RouteReport.FromString(before)
    if len(known.layers) != len(report.layers):
        return report.SerializeToString(deterministic=True)
    half = 1 + (known.tokens + report.tokens > REMEMBERED_TOKENS)
    sums = fleet_pb2.RouteReport(manifest_digest=report.manifest_digest, tokens=known.tokens // half + report.tokens)
    for old, new in zip(known.layers, report.layers, strict=True):
        counts = {tuple(one.experts): one.tokens // half for one in old.sets}
        for one in new.sets:
            key = tuple(one.experts)
            counts[key] = counts.get(key, 0) + one.tokens
        ranked = sorted(((key, count) for key, count in counts.items() if count), key=lambda one: (-one[1], one[0]))
        rest = sum(count for _, count in ranked[ROUTE_SETS:])
        told = sums.layers.add(others=old.others // half + new.others + rest)
        for experts, tokens in ranked[:ROUTE_SETS]:
            told.sets.add(experts=experts, tokens=tokens)
    return sums.SerializeToString(deterministic=True)


def counted(stored: bytes, manifest: Manifest) -> CountedRoutes | None:
    """As the planner takes them; None where nothing is known, or it is not of this model."""
    report = fleet_pb2.RouteReport.FromString(stored)
    experts = experts_of(manifest)
    if not stored or len(report.layers) != len(experts):
        return None
    layers = tuple(
        RouteSets(
            count,
            tuple(tuple(one.experts) for one in told.sets),
            tuple(float(one.tokens) for one in told.sets),
            others=float(told.others),
        )
        for told, count in zip(report.layers, experts, strict=True)
    )
    return CountedRoutes(report.tokens, layers)
