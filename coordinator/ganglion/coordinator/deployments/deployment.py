"""One deployment with what the coordinator knows of it, as the protocol shows it. No prompt or activation is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from ganglion.coordinator.deployments.events import Phase, WorkerPhase
from ganglion.coordinator.deployments.machine import DeploymentMachine
from ganglion.coordinator.roster import Roster
from ganglion.proto import admin_pb2, fleet_pb2, identity_pb2
from ganglion.wire.errors import NotFound
from ganglion.wire.nouns import Drafting, Manifest, Plan, PlanOptions, digest, to_json


@dataclass
class Deployment:
    """A wanted model, its machine and its present plan.

    reserved_bytes: memory that the plan takes, by node id. sessions: open on the lead, as it last said. drafter: the
    model that guesses at the lead. drafters: devices that draft for this one, whose sessions the lead admits. told: the
    worker of a drafting deployment, last. ms_per_token: as the plan predicts it; 0: not.
    """

    deployment: str
    manifest: Manifest
    manifest_json: bytes
    manifest_digest: str
    options: PlanOptions
    holder: str
    machine: DeploymentMachine
    plan: Plan | None = None
    plan_json: bytes = b""
    reserved_bytes: dict[str, int] = field(default_factory=dict)
    sessions: int = 0
    drafter: Manifest | None = None
    drafter_json: bytes = b""
    drafters: tuple[str, ...] = ()
    ms_per_token: float = 0.0
    told: fleet_pb2.Verifier | None = None

    @property
    def model(self) -> str:
        """The name that the API shows."""
        return self.manifest.name

    @property
    def drafting(self) -> Drafting | None:
        """How it drafts for another model; None: it answers itself."""
        return self.options.drafting

    @property
    def drafts_for(self) -> str:
        """Name of the model that it drafts for; "" for any other deployment."""
        return self.drafting.target if self.drafting is not None else ""

    @property
    def drafter_digest(self) -> str:
        """Of the other model that guesses at its lead; "" without one."""
        return digest(self.drafter) if self.drafter is not None else ""

    @property
    def verifier_url(self) -> str:
        """Of the HTTP verifier that it drafts for; "" for none."""
        return self.drafting.url if self.drafting is not None else ""

    @property
    def place(self) -> tuple[str, ...]:
        """What is wanted once: a model of a name; and a drafter of a name for each model and choice of devices."""
        return place_of(self.manifest, self.options)

    def adopt(self, plan: Plan, reserved_bytes: dict[str, int], ms_per_token: float) -> None:
        """This plan is the one of the next epoch."""
        self.plan, self.plan_json, self.reserved_bytes = plan, to_json(plan), reserved_bytes
        self.ms_per_token = ms_per_token

    def event(self, roster: Roster) -> admin_pb2.DeployEvent:
        """What Deploy streams."""
        machine = self.machine
        return admin_pb2.DeployEvent(
            deployment=self.deployment,
            epoch=machine.epoch,
            phase=_PHASE_NUMBERS[machine.phase],
            message=machine.message,
            error_code=machine.error_code,
            devices=[
                admin_pb2.DeviceProgress(
                    node_id=node_id,
                    name=roster.name_of(node_id),
                    phase=worker.phase.name.lower(),
                    done_bytes=worker.done_bytes,
                    total_bytes=worker.total_bytes,
                )
                for node_id, worker in machine.workers.items()
            ],
        )

    def state(self, roster: Roster, viewer_host: str) -> admin_pb2.DeploymentState:
        """What Watch shows to somebody at `viewer_host`."""
        machine = self.machine
        state = admin_pb2.DeploymentState(
            deployment=self.deployment,
            model=self.model,
            manifest_digest=self.manifest_digest,
            epoch=machine.epoch,
            phase=_PHASE_NUMBERS[machine.phase],
            message=machine.message,
            manifest=self.manifest_json,
            holders=[roster.peer(node_id, viewer_host) for node_id in self.holders(roster)],
            sessions=self.sessions,
            drafts_for=self.drafts_for,
            drafter=self.drafter.name if self.drafter is not None else "",
            drafter_digest=self.drafter_digest,
        )
        if machine.is_running:
            state.plan = self.plan_json
        if machine.phase is Phase.READY:
            state.lead.CopyFrom(self.worker_peer(roster, machine.devices[0], viewer_host))
        return state

    def holders(self, roster: Roster) -> list[str]:
        """Node ids of the devices at hand that hold the whole model; who deployed it from its store comes first."""
        held = [member.node_id for member in roster.ready_members() if self.manifest_digest in member.held]
        if roster.member(self.holder) is not None:
            held = [self.holder, *(node_id for node_id in held if node_id != self.holder)]
        return held

    def sources(self, roster: Roster, node_id: str) -> list[str]:
        """Node ids of the devices that `node_id` may ask for pieces, those with the whole model first.

        A device that lacks pieces is also sent to those that hold some, and to the others of the plan, which fetch
        theirs at the same time.
        """
        whole = self.holders(roster)
        if node_id in whole:
            return [holder for holder in whole if holder != node_id]
        partly = [member.node_id for member in roster.ready_members() if self.manifest_digest in member.held_partly]
        others = [device for device in self.machine.devices if roster.member(device) is not None]
        return [source for source in dict.fromkeys((*whole, *partly, *others)) if source != node_id]

    def worker_peer(self, roster: Roster, node_id: str, viewer_host: str) -> identity_pb2.Peer:
        """A worker of the present epoch as a peer of somebody at `viewer_host`; raises NotFound before it listens."""
        worker = self.machine.workers.get(node_id)
        if worker is None or worker.phase < WorkerPhase.LISTENING:
            raise NotFound(f"the worker on {roster.name_of(node_id)} does not listen yet")
        return roster.peer(node_id, viewer_host, (worker.lane_address,))

    def assign(self, roster: Roster, node_id: str, epoch: int) -> fleet_pb2.Assign:
        """The order to prepare a share."""
        host = _host_of(roster, node_id)
        is_lead = self.plan is not None and self.plan.lead == node_id
        drafter_holders = self.drafter_holders(roster) if self.drafter is not None and is_lead else []
        return fleet_pb2.Assign(
            deployment=self.deployment,
            epoch=epoch,
            plan=self.plan_json,
            manifest=self.manifest_json,
            holders=[roster.peer(source, host) for source in self.sources(roster, node_id)],
            gateways=self._admitted(roster),
            drafter=self.drafter_json if is_lead else b"",
            drafter_holders=[roster.peer(holder, host) for holder in drafter_holders if holder != node_id],
        )

    def connect(self, roster: Roster, node_id: str, epoch: int) -> fleet_pb2.Connect:
        """The order to connect the lanes; peers in order of rank."""
        host = _host_of(roster, node_id)
        return fleet_pb2.Connect(
            deployment=self.deployment,
            epoch=epoch,
            peers=[self.worker_peer(roster, peer, host) for peer in self.machine.devices],
            gateways=self._admitted(roster),
        )

    def drafter_holders(self, roster: Roster) -> list[str]:
        """Node ids of the devices at hand that hold the drafter whole; who deployed it from its store comes first."""
        if self.drafter is None:
            return []
        held = [member.node_id for member in roster.ready_members() if self.drafter_digest in member.held]
        first = [self.holder] if roster.member(self.holder) is not None else []
        return list(dict.fromkeys((*first, *held)))

    def _admitted(self, roster: Roster) -> list[identity_pb2.Peer]:
        """Who may open sessions: gateways, and devices that draft for this model. They dial, and have no address."""
        return [*roster.gateways(), *(roster.peer(node_id, "", ()) for node_id in self.drafters)]


def place_of(manifest: Manifest, options: PlanOptions) -> tuple[str, ...]:
    """See `Deployment.place`."""
    drafting = options.drafting
    return (manifest.name,) if drafting is None else (manifest.name, drafting.target, *options.devices)


def _host_of(roster: Roster, node_id: str) -> str:
    member = roster.member(node_id)
    return member.seen_host if member else ""


_PHASE_NUMBERS: Final = {
    Phase.PLANNING: admin_pb2.DEPLOYMENT_PHASE_PLANNING,
    Phase.PREPARING: admin_pb2.DEPLOYMENT_PHASE_PREPARING,
    Phase.CONNECTING: admin_pb2.DEPLOYMENT_PHASE_CONNECTING,
    Phase.READY: admin_pb2.DEPLOYMENT_PHASE_READY,
    Phase.REPLANNING: admin_pb2.DEPLOYMENT_PHASE_REPLANNING,
    Phase.FAILED: admin_pb2.DEPLOYMENT_PHASE_FAILED,
    Phase.STOPPED: admin_pb2.DEPLOYMENT_PHASE_STOPPED,
}
