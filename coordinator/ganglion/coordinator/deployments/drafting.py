"""Drafting deployments and the models that they draft for: who may open sessions, and what is told of a verifier."""

from __future__ import annotations

from collections.abc import Iterable

from ganglion.coordinator.deployments.deployment import Deployment
from ganglion.coordinator.deployments.events import Phase
from ganglion.coordinator.roster import Roster
from ganglion.proto import fleet_pb2
from ganglion.wire.nouns import drafting_fault


def drafters_of(target: Deployment, known: Iterable[Deployment]) -> tuple[str, ...]:
    """Node ids of the devices that draft for `target` now: its lead admits their sessions."""
    if target.drafting is not None:
        return ()
    return tuple(
        sorted(
            each.machine.devices[0]
            for each in known
            if each.drafts_for == target.model and not each.verifier_url and each.machine.is_running
        )
    )


def verifier_for(drafting: Deployment, known: Iterable[Deployment], roster: Roster) -> fleet_pb2.Verifier:
    """What the worker of a drafting deployment is told: a lead, a URL, or why there is none.

    What is known of a model that is away is told too: a device that goes on alone needs its ids and its context.
    """
    told = fleet_pb2.Verifier(deployment=drafting.deployment, epoch=drafting.machine.epoch, target=drafting.drafts_for)
    if drafting.verifier_url:
        told.url = drafting.verifier_url
        return told
    target = next((each for each in known if each.drafting is None and each.model == drafting.drafts_for), None)
    if target is None:
        told.why_away = f"{drafting.drafts_for} is not deployed"
        return told
    fault = drafting_fault(target.manifest, drafting.manifest)
    if fault:
        told.why_away = fault
        return told
    told.manifest_digest = target.manifest_digest
    told.numeric_class = target.manifest.numeric_class.name
    told.context = target.plan.context if target.plan is not None else 0
    told.vocab = target.manifest.geometry.vocab
    told.eos_ids.extend(target.manifest.eos_ids)
    machine = target.machine
    if machine.phase is not Phase.READY:
        told.why_away = f"{target.model} is {machine.phase.value.lower()}: {machine.message}"
        return told
    member = roster.member(drafting.machine.devices[0])
    told.lead.CopyFrom(target.worker_peer(roster, machine.devices[0], member.seen_host if member else ""))
    told.lead_deployment, told.lead_epoch = target.deployment, machine.epoch
    return told
