"""Carries out what the deployments' state machines want: plans, persists, sends. For one event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Final

from ganglion.coordinator.deployments.deployment import Deployment
from ganglion.coordinator.deployments.events import (
    Again,
    BeginEpoch,
    Command,
    Event,
    FleetChanged,
    Forget,
    GatewaysChanged,
    Lost,
    Phase,
    Planned,
    RequestPlan,
    SendAssign,
    SendConnect,
    SendRelease,
    Status,
    Stop,
    Tick,
    Unplannable,
    WorkerPhase,
)
from ganglion.coordinator.deployments.machine import DeploymentMachine
from ganglion.coordinator.deployments.planning import Placed, PlanInput, Planner, less_reserved, make_plan
from ganglion.coordinator.registry import DeploymentRow, Registry
from ganglion.coordinator.roster import Roster
from ganglion.proto import fleet_pb2
from ganglion.wire.errors import (
    Exhausted,
    GanglionError,
    Internal,
    InvalidDocument,
    NotFound,
    ProtocolViolation,
    Unavailable,
)
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES, MANIFEST_BYTES, PLAN_BYTES
from ganglion.wire.nouns import Manifest, PlanOptions, PlanReport, digest, from_json, to_json

# What is left of a message is for the plans and the devices.
WATCHED_MANIFESTS_BYTES: Final = CONTROL_MESSAGE_BYTES * 7 // 8

log = logging.getLogger(__name__)


class Deployments:
    """Every wanted deployment; at most one for each name of a model, since the API knows models by name."""

    def __init__(self, registry: Registry, roster: Roster, planner: Planner, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._roster = roster
        self._planner = planner
        self._clock = clock
        self._known: dict[str, Deployment] = {}
        self._planning = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        roster.on_joined = lambda node_id: self._handle_all(FleetChanged(node_id))
        roster.on_changed = lambda: self._handle_all(FleetChanged())
        roster.on_lost = lambda node_id, reason: self._handle_all(Lost(node_id, reason))
        roster.on_silent = self._silent

    def restore(self) -> None:
        """Bring back what was wanted before a restart: old epochs end, every deployment is planned anew."""
        for row in self._registry.deployments():
            try:
                manifest, options = parse_request(row.manifest, row.options)
            except InvalidDocument as error:
                log.error("deployment %s (%s) is of another release: dropped: %s", row.deployment, row.model, error)
                self._registry.remove_deployment(row.deployment)
                continue
            machine = DeploymentMachine(self._roster.name_of, epoch=row.epoch)
            deployment = Deployment(
                row.deployment, manifest, row.manifest, row.manifest_digest, options, row.holder, machine
            )
            self._known[row.deployment] = deployment
            self._apply(deployment, machine.resume(self._clock(), row.devices))

    async def close(self) -> None:
        """End planning. Workers keep what they have; the next start plans anew."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What people want

    def deploy(self, manifest_json: bytes, options_json: bytes, holder: str) -> Deployment:
        """Want a model. The same manifest and options again: the same deployment, tried again if it had failed.

        Another manifest or other options under the same name take the place of the deployment before. Raises
        InvalidDocument, and Unavailable when the holder is not here.
        """
        manifest, options = parse_request(manifest_json, options_json)
        manifest_digest = digest(manifest)
        if self._roster.member(holder) is None:
            raise Unavailable(
                f"{self._roster.name_of(holder) if holder else 'the device'} that holds {manifest.name} has no control "
                "stream: check that its agent runs (ganglion device ls)",
                param="holder",
            )
        for known in list(self._known.values()):
            if known.manifest_digest == manifest_digest and known.options == options:
                known.holder = holder
                self._registry.put_holder(known.deployment, holder)
                self._handle(known, Again())
                return known
        self._check_room(manifest.name, len(manifest_json))
        for known in list(self._known.values()):
            if known.model == manifest.name:
                self._handle(known, Stop("another deployment of the same name takes its place"))
        deployment = Deployment(
            secrets.token_hex(6),
            manifest,
            to_json(manifest),
            manifest_digest,
            options,
            holder,
            DeploymentMachine(self._roster.name_of),
        )
        self._registry.put_deployment(
            DeploymentRow(
                deployment=deployment.deployment,
                model=deployment.model,
                manifest_digest=manifest_digest,
                manifest=deployment.manifest_json,
                options=to_json(options),
                holder=holder,
                epoch=0,
                devices=(),
                created_unix_s=time.time(),
            )
        )
        self._known[deployment.deployment] = deployment
        log.info("deployment %s: %s is wanted", deployment.deployment, deployment.model)
        self._apply(deployment, deployment.machine.start(self._clock()))
        return deployment

    def _check_room(self, model: str, size: int) -> None:
        """Raise Exhausted when the manifests of all deployments would no longer fit one message of Watch."""
        others = sum(len(each.manifest_json) for each in self._known.values() if each.model != model)
        if others + size > WATCHED_MANIFESTS_BYTES:
            raise Exhausted(
                f"the manifests of all deployments would take {others + size} bytes, at most {WATCHED_MANIFESTS_BYTES} "
                "are possible: stop a deployment (ganglion ps, ganglion stop)"
            )

    def stop(self, name: str) -> None:
        """Stop a deployment, given by its id or its model's name; raises NotFound naming those there are."""
        found = self._known.get(name) or next((each for each in self._known.values() if each.model == name), None)
        if found is None:
            have = ", ".join(sorted(each.model for each in self._known.values())) or "none"
            raise NotFound(f"no deployment {name!r}; there are: {have}", param="deployment")
        self._handle(found, Stop("stopped by the owner"))

    async def explain(self, manifest_json: bytes, options_json: bytes) -> PlanReport:
        """What a deployment would choose now, without deploying; raises what the planner raises."""
        manifest, options = parse_request(manifest_json, options_json)
        taken = [each.reserved_bytes for each in self._known.values() if each.model != manifest.name]
        devices = less_reserved(self._roster.devices(), taken)
        return await asyncio.to_thread(self._planner, manifest, devices, self._roster.links(), options)

    def all(self) -> list[Deployment]:
        """Every wanted deployment, in order of creation."""
        return list(self._known.values())

    # What devices report

    def status(self, node_id: str, message: fleet_pb2.AssignmentStatus) -> None:
        """A worker's status; raises ProtocolViolation for one that is none."""
        deployment = self._known.get(message.deployment)
        if deployment is None:
            return
        try:
            phase = WorkerPhase(message.phase)
        except ValueError:
            raise ProtocolViolation(f"an assignment status with phase {message.phase}") from None
        if phase is WorkerPhase.ASSIGNED:
            raise ProtocolViolation("an assignment status without a phase")
        self._handle(
            deployment,
            Status(
                node_id=node_id,
                epoch=message.epoch,
                phase=phase,
                done_bytes=message.done_bytes,
                total_bytes=message.total_bytes,
                lane_address=message.lane_address,
                error_code=message.error_code or Internal.code,
                error_message=message.error_message[:500] or "its worker failed without a reason",
            ),
        )

    def beat(self, node_id: str, workers: Iterable[fleet_pb2.WorkerBeat]) -> None:
        """What runs on a device, by its heartbeat; what should not run any more is released."""
        for worker in workers:
            deployment = self._known.get(worker.deployment)
            if (
                deployment is None
                or worker.epoch != deployment.machine.epoch
                or node_id not in deployment.machine.workers
            ):
                self._release(node_id, worker.deployment, worker.epoch, "this epoch is over")
            elif deployment.machine.devices[0] == node_id and deployment.sessions != worker.sessions:
                deployment.sessions = worker.sessions
                self._roster.changes.mark()

    def device_changed(self, node_id: str, reason: str) -> None:
        """A device may no longer be used as planned (its label changed): its deployments are planned again."""
        self._handle_all(Lost(node_id, reason))

    def gateways_changed(self) -> None:
        """Tell every lead who may open sessions."""
        self._handle_all(GatewaysChanged())

    def tick(self) -> None:
        """Time passed."""
        self._handle_all(Tick())
        ready = (each.machine.devices for each in self._known.values() if each.machine.phase is Phase.READY)
        self._roster.set_serving(frozenset(node_id for devices in ready for node_id in devices))

    def _silent(self, node_id: str, reason: str) -> None:
        for deployment in list(self._known.values()):
            if deployment.machine.phase is Phase.READY:
                self._handle(deployment, Lost(node_id, reason))

    # Carrying out

    def _handle_all(self, event: Event) -> None:
        for deployment in list(self._known.values()):
            self._handle(deployment, event)

    def _handle(self, deployment: Deployment, event: Event) -> None:
        machine = deployment.machine
        before = (machine.phase, machine.epoch, machine.message)
        commands = machine.handle(event, self._clock())
        after = (machine.phase, machine.epoch, machine.message)
        if after != before or isinstance(event, Status):
            self._roster.changes.mark()
        if after != before:
            log.info("deployment %s epoch %d: %s: %s", deployment.deployment, after[1], after[0].value, after[2])
        self._apply(deployment, commands)

    def _apply(self, deployment: Deployment, commands: list[Command]) -> None:
        roster, machine = self._roster, deployment.machine
        for command in commands:
            # A send may cut a device that does not read, which changes the machine under this list: an order of an
            # epoch that is over by then is not sent.
            match command:
                case RequestPlan():
                    task = asyncio.create_task(self._plan(deployment, command))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case BeginEpoch(epoch, devices):
                    self._registry.begin_epoch(deployment.deployment, epoch, devices)
                    deployment.sessions = 0
                case SendAssign(node_id, epoch):
                    if machine.epoch == epoch and machine.is_running:
                        assign = deployment.assign(roster, node_id, epoch)
                        roster.send(node_id, fleet_pb2.CoordinatorMessage(assign=assign))
                case SendConnect(node_id, epoch):
                    if machine.epoch == epoch and machine.is_running:
                        connect = deployment.connect(roster, node_id, epoch)
                        roster.send(node_id, fleet_pb2.CoordinatorMessage(connect=connect))
                case SendRelease(node_id, epoch, reason):
                    self._release(node_id, deployment.deployment, epoch, reason)
                case Forget():
                    self._forget(deployment)
        if not machine.is_running:
            deployment.reserved_bytes = {}

    def _release(self, node_id: str, deployment: str, epoch: int, reason: str) -> None:
        release = fleet_pb2.Release(deployment=deployment, epoch=epoch, reason=reason)
        self._roster.send(node_id, fleet_pb2.CoordinatorMessage(release=release))

    def _forget(self, deployment: Deployment) -> None:
        self._registry.remove_deployment(deployment.deployment)
        self._known.pop(deployment.deployment, None)
        deployment.reserved_bytes = {}
        self._roster.changes.mark()
        self._handle_all(FleetChanged())  # its memory is free for one that lacked it

    async def _plan(self, deployment: Deployment, command: RequestPlan) -> None:
        # One at a time: two plans made side by side could both take the same memory.
        async with self._planning:
            asked = self._plan_input(deployment)
            try:
                placed = await asyncio.to_thread(make_plan, self._planner, asked, command.avoid, command.banned)
            except GanglionError as error:
                self._handle(deployment, Unplannable(command.attempt, error.code, error.message))
            except Exception as error:
                log.error("planning %s failed by a defect", deployment.model, exc_info=error)
                message = f"planning failed by a defect ({type(error).__name__}); the coordinator's log has the details"
                self._handle(deployment, Unplannable(command.attempt, Internal.code, message))
            else:
                self._adopt(deployment, command, placed)

    def _plan_input(self, deployment: Deployment) -> PlanInput:
        roster = self._roster
        taken = [each.reserved_bytes for each in self._known.values() if each is not deployment]
        return PlanInput(
            manifest=deployment.manifest,
            options=deployment.options,
            devices=less_reserved(roster.devices(), taken),
            links=roster.links(),
            holders=tuple(roster.name_of(node_id) for node_id in deployment.holders(roster)),
            holder=roster.name_of(deployment.holder),
            again=deployment.machine.epoch > 0,
        )

    def _adopt(self, deployment: Deployment, command: RequestPlan, placed: Placed) -> None:
        if deployment.machine.is_current(command.attempt):
            deployment.adopt(placed.plan, placed.reserved_bytes)
        self._handle(deployment, Planned(command.attempt, placed.plan.devices))


def parse_request(manifest_json: bytes, options_json: bytes) -> tuple[Manifest, PlanOptions]:
    """The documents of a DeployRequest; raises InvalidDocument."""
    manifest = from_json(Manifest, manifest_json, limit_bytes=MANIFEST_BYTES)
    options = from_json(PlanOptions, options_json or b"{}", limit_bytes=PLAN_BYTES)
    if not manifest.name or len(manifest.name) > 128:
        raise InvalidDocument(f"Manifest: a name of {len(manifest.name)} characters, expected 1 to 128", param="name")
    return manifest, options


async def run_ticks(tick: Callable[[], None], every_s: float) -> None:
    """Call `tick` every `every_s` seconds until cancelled; a defect in one tick does not end the others."""
    while True:
        await asyncio.sleep(every_s)
        try:
            tick()
        except Exception as error:
            log.error("a tick failed by a defect", exc_info=error)
