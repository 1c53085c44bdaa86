"""From what is alive to a plan: gathers what the planner needs, and says why when nothing holds the model. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ganglion.partitioner.cost import Device, LinkFigures
from ganglion.partitioner.expert_placement_routes import CountedRoutes
from ganglion.partitioner.placement import surviving_options
from ganglion.wire.errors import DoesNotFit, GanglionError, Unavailable
from ganglion.wire.nouns import Manifest, Plan, PlanOptions, PlanReport

Planner = Callable[
    [
        Manifest,
        Sequence[Device],
        Mapping[tuple[str, str], LinkFigures],
        PlanOptions,
        Manifest | None,
        CountedRoutes | None,
        bool,
    ],
    PlanReport,
]
"""Model, devices, links, options, the model that guesses at the lead, which experts tokens chose, whether it is urgent.
"""


@dataclass(frozen=True, kw_only=True)
class PlanInput:
    """Everything a plan depends on. holders: names of devices here that hold the pieces; holder: who had them first.

    drafter: the model that guesses at the lead; drafter_held: by a device that is here, or by `holder`.
    routes: which experts tokens of a mixture chose; None where that is not known.
    again: the deployment was planned before, so a device that was named may have been lost: the survivors answer.
    """

    manifest: Manifest
    options: PlanOptions
    devices: tuple[Device, ...]
    links: Mapping[tuple[str, str], LinkFigures]
    holders: tuple[str, ...]
    holder: str
    drafter: Manifest | None = None
    routes: CountedRoutes | None = None
    drafter_held: bool = True
    again: bool = False


@dataclass(frozen=True)
class Placed:
    """A plan, the memory it takes, in bytes by node id, and the time per token that it predicts; 0: none."""

    plan: Plan
    reserved_bytes: dict[str, int]
    ms_per_token: float = 0.0


def less_reserved(devices: Sequence[Device], reserved: Sequence[Mapping[str, int]]) -> tuple[Device, ...]:
    """The devices with their memory budgets less what other deployments take."""
    rest = []
    for device in devices:
        taken = sum(share.get(device.node_id, 0) for share in reserved)
        budget = max(0, device.profile.memory_budget_bytes - taken)
        profile = msgspec.structs.replace(device.profile, memory_budget_bytes=budget)
        rest.append(Device(device.node_id, device.name, device.label, profile))
    return tuple(rest)


def make_plan(planner: Planner, asked: PlanInput, avoid: frozenset[str], banned: frozenset[str]) -> Placed:
    """The best plan without `avoid`, else with it, never with `banned` (node ids); raises what the planner raises.

    Raises Unavailable when no device is alive or nobody holds the pieces, DoesNotFit with the shortages.
    """
    model = asked.manifest.name
    if not asked.holders:
        raise Unavailable(
            f"{model}: none of the devices that are alive holds its pieces; {asked.holder} held them: start its agent, "
            "or deploy the model from a device that has it"
        )
    if asked.drafter is not None and not asked.drafter_held:
        raise Unavailable(
            f"{model}: none of the devices that are alive holds its drafter {asked.drafter.name}; {asked.holder} held"
            " it: start its agent, or deploy the model without --drafter"
        )
    allowed = [device for device in asked.devices if device.node_id not in banned]
    if not allowed:
        raise Unavailable(f"{model}: no device is alive and fit for it; ganglion device ls says which are missing")
    careful = [device for device in allowed if device.node_id not in avoid]
    if careful and len(careful) < len(allowed):
        try:
            return _place(planner, asked, careful)
        except GanglionError:
            pass  # the devices that failed lately are needed: the second try says what is wrong if that fails too
    return _place(planner, asked, allowed)


def _place(planner: Planner, asked: PlanInput, devices: Sequence[Device]) -> Placed:
    options = surviving_options(asked.options, devices) if asked.again else asked.options
    report = planner(asked.manifest, devices, asked.links, options, asked.drafter, asked.routes, asked.again)
    chosen = next((candidate for candidate in report.candidates if candidate.chosen), None)
    if report.plan is None or chosen is None:
        raise DoesNotFit(shortage_text(report))
    node_ids = {device.name: device.node_id for device in devices}
    reserved = {node_ids[name]: size for name, size in chosen.memory_bytes.items()}
    return Placed(report.plan, reserved, chosen.ms_per_token or 0.0)


def shortage_text(report: PlanReport, at_most: int = 4) -> str:
    """Why nothing is feasible: the reasons of the first candidates."""
    reasons = list(dict.fromkeys(f"{'+'.join(each.devices)}: {each.reason}" for each in report.candidates))
    more = f"; and {len(reasons) - at_most} more (ganglion plan --explain)" if len(reasons) > at_most else ""
    why = "; ".join(reasons[:at_most]) or "no candidate was found for these options"
    return f"no set of devices can hold {report.model} ({report.numeric_class}): {why}{more}"
