"""What the supervisor says on the control stream, built from reports and counters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ganglion.agent.supervisor_core import Key, Phase, Report
from ganglion.agent.supervisor_held import Held
from ganglion.agent.supervisor_worker import read_beat
from ganglion.proto import fleet_pb2
from ganglion.wire.address import join_address
from ganglion.wire.nouns import DeviceProfile, to_json

_PHASES: Final = {
    Phase.FETCHING: fleet_pb2.ASSIGNMENT_PHASE_FETCHING,
    Phase.LOADING: fleet_pb2.ASSIGNMENT_PHASE_LOADING,
    Phase.LISTENING: fleet_pb2.ASSIGNMENT_PHASE_LISTENING,
    Phase.CONNECTED: fleet_pb2.ASSIGNMENT_PHASE_CONNECTED,
    Phase.FAILED: fleet_pb2.ASSIGNMENT_PHASE_FAILED,
    Phase.RELEASED: fleet_pb2.ASSIGNMENT_PHASE_RELEASED,
}


def status_message(report: Report, host: str) -> fleet_pb2.AgentMessage:
    """A report; the lane's port becomes an address on `host` (a wildcard means: where I am seen)."""
    status = fleet_pb2.AssignmentStatus(
        deployment=report.key.deployment,
        epoch=report.key.epoch,
        phase=_PHASES[report.phase],
        done_bytes=report.done_bytes,
        total_bytes=report.total_bytes,
        lane_address=join_address(host, report.port) if report.port else "",
    )
    if report.error is not None:
        status.error_code, status.error_message = report.error.code, report.error.message
    return fleet_pb2.AgentMessage(status=status)


def heartbeat_message(sequence: int, workers: Iterable[tuple[Key, Path]]) -> fleet_pb2.AgentMessage:
    """A beat with the counters of every worker: its key and its counter file."""
    beats = []
    for key, path in workers:
        steps, sessions, kv_bytes, longest_run_s = read_beat(path)
        beats.append(
            fleet_pb2.WorkerBeat(
                deployment=key.deployment,
                epoch=key.epoch,
                steps=steps,
                longest_run_s=longest_run_s,
                sessions=sessions,
                kv_bytes=kv_bytes,
            )
        )
    return fleet_pb2.AgentMessage(heartbeat=fleet_pb2.Heartbeat(sequence=sequence, workers=beats))


def advert_message(profile: DeviceProfile, piece_address: str) -> fleet_pb2.AgentMessage:
    """What this device is, and where its pieces are."""
    return fleet_pb2.AgentMessage(advert=fleet_pb2.Advert(profile=to_json(profile), addresses=[piece_address]))


@dataclass(frozen=True, slots=True)
class Offer:
    """To draft on this device: Manifest (JSON) of a model that lies whole in its store, and how (Drafting, JSON)."""

    manifest: bytes
    drafting: bytes


def offer_message(offer: Offer | None) -> fleet_pb2.AgentMessage:
    """An offer to draft; None: this device does not."""
    if offer is None:
        return fleet_pb2.AgentMessage(draft_offer=fleet_pb2.DraftOffer())
    return fleet_pb2.AgentMessage(draft_offer=fleet_pb2.DraftOffer(manifest=offer.manifest, drafting=offer.drafting))


def routes_message(report: bytes) -> fleet_pb2.AgentMessage:
    """A lead's report of a mixture's routes, serialized."""
    return fleet_pb2.AgentMessage(routes=fleet_pb2.RouteReport.FromString(report))


def held_message(held: Held) -> fleet_pb2.AgentMessage:
    """Which models lie here."""
    return fleet_pb2.AgentMessage(
        held=fleet_pb2.HeldModels(manifest_digests=held.whole, partial_manifest_digests=held.partial)
    )
