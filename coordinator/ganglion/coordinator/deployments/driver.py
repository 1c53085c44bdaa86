"""Carries out what the deployments' state machines want: plans, persists, sends. For one event loop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Final

from ganglion.coordinator.deployments.deployment import Deployment, place_of
from ganglion.coordinator.deployments.drafting import drafters_of, verifier_for
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
from ganglion.coordinator.deployments.offers import Offers, read_offer
from ganglion.coordinator.deployments.planning import Placed, PlanInput, Planner, less_reserved, make_plan
from ganglion.coordinator.registry import DeploymentRow, Registry
from ganglion.coordinator.roster import Roster
from ganglion.coordinator.routes import added, check_routes, counted
from ganglion.partitioner.cost import Device
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
from ganglion.wire.identity import TrustLabel
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES, MANIFEST_BYTES, PLAN_BYTES
from ganglion.wire.nouns import Manifest, PlanOptions, PlanReport, digest, from_json, to_json

# What is left of a message is for the plans and the devices.
WATCHED_MANIFESTS_BYTES: Final = CONTROL_MESSAGE_BYTES * 7 // 8

log = logging.getLogger(__name__)


class Deployments:
    """Every wanted deployment; at most one for each name of a model, since the API knows models by name.

    Deployments that draft are beside these: one for each drafter, model and choice of devices. Neither kind ends with
    the other: a device that drafts goes on alone.
    """

    def __init__(self, registry: Registry, roster: Roster, planner: Planner, clock: Callable[[], float]) -> None:
        self._registry = registry
        self._roster = roster
        self._planner = planner
        self._clock = clock
        self._known: dict[str, Deployment] = {}
        self._planning = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self.offers = Offers(self._label_of, roster.name_of)
        roster.on_joined = lambda node_id: self._handle_all(FleetChanged(node_id))
        roster.on_changed = lambda: self._handle_all(FleetChanged())
        roster.on_lost = self._lost
        roster.on_silent = self._silent

    def restore(self) -> None:
        """Bring back what was wanted before a restart: old epochs end, every deployment is planned anew."""
        for row in self._registry.deployments():
            try:
                manifest, options, drafter = parse_request(row.manifest, row.options, row.drafter)
            except InvalidDocument as error:
                log.error("deployment %s (%s) is of another release: dropped: %s", row.deployment, row.model, error)
                self._registry.remove_deployment(row.deployment)
                continue
            machine = DeploymentMachine(self._roster.name_of, epoch=row.epoch)
            deployment = Deployment(
                row.deployment, manifest, row.manifest, row.manifest_digest, options, row.holder, machine
            )
            deployment.drafter, deployment.drafter_json = drafter, row.drafter
            self._known[row.deployment] = deployment
            self._apply(deployment, machine.resume(self._clock(), row.devices))

    async def close(self) -> None:
        """End planning. Workers keep what they have; the next start plans anew."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What people want

    def deploy(self, manifest_json: bytes, options_json: bytes, holder: str, drafter_json: bytes = b"") -> Deployment:
        """Want a model. The same manifest and options again: the same deployment, tried again if it had failed.

        `drafter_json`: the model that guesses at its lead, which `holder` holds too. Another manifest or other options
        under the same name take the place of the deployment before. Raises InvalidDocument, and Unavailable when the
        holder is not here.
        """
        manifest, options, drafter = parse_request(manifest_json, options_json, drafter_json)
        manifest_digest, place = digest(manifest), place_of(manifest, options)
        if self._roster.member(holder) is None:
            raise Unavailable(
                f"{self._roster.name_of(holder) if holder else 'the device'} that holds {manifest.name} has no control "
                "stream: check that its agent runs (ganglion device ls)",
                param="holder",
            )
        for known in list(self._known.values()):
            if (known.manifest_digest, known.options, known.drafter) == (manifest_digest, options, drafter):
                known.holder = holder
                self._registry.put_holder(known.deployment, holder)
                self._handle(known, Again())
                return known
        self._check_room(place, len(manifest_json))
        for known in list(self._known.values()):
            if known.place == place:
                self._handle(known, Stop("another deployment of the same name takes its place"))
        deployment = Deployment(
            secrets.token_hex(6),
            manifest,
            to_json(manifest),
            manifest_digest,
            options,
            holder,
            DeploymentMachine(self._roster.name_of),
            drafter=drafter,
            drafter_json=to_json(drafter) if drafter is not None else b"",
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
                drafter=deployment.drafter_json,
            )
        )
        self._known[deployment.deployment] = deployment
        log.info("deployment %s: %s is wanted", deployment.deployment, deployment.model)
        self._apply(deployment, deployment.machine.start(self._clock()))
        if deployment.drafting is None:
            self._take_offers(self.offers.node_ids, deployment.model)
        return deployment

    def _check_room(self, place: tuple[str, ...], size: int) -> None:
        """Raise Exhausted when the manifests of all deployments would no longer fit one message of Watch."""
        others = sum(len(each.manifest_json) for each in self._known.values() if each.place != place)
        if others + size > WATCHED_MANIFESTS_BYTES:
            raise Exhausted(
                f"the manifests of all deployments would take {others + size} bytes, at most {WATCHED_MANIFESTS_BYTES} "
                "are possible: stop a deployment (ganglion ps, ganglion stop)"
            )

    def stop(self, name: str) -> None:
        """Stop a deployment, given by its id or its model's name; raises NotFound naming those there are."""
        named = [each for each in self._known.values() if each.model == name]
        found = self._known.get(name) or min(named, key=lambda each: each.drafts_for, default=None)
        if found is None:
            have = ", ".join(sorted(each.model for each in self._known.values())) or "none"
            raise NotFound(f"no deployment {name!r}; there are: {have}", param="deployment")
        self._handle(found, Stop("stopped by the owner"))

    async def explain(self, manifest_json: bytes, options_json: bytes, drafter_json: bytes = b"") -> PlanReport:
        """What a deployment would choose now, without deploying; raises what the planner raises."""
        manifest, options, drafter = parse_request(manifest_json, options_json, drafter_json)
        place = place_of(manifest, options)
        taken = [each.reserved_bytes for each in self._known.values() if each.place != place]
        devices = less_reserved(self._devices(options), taken)
        routes = counted(self._registry.routes(digest(manifest)), manifest)
        links = self._roster.links()
        return await asyncio.to_thread(self._planner, manifest, devices, links, options, drafter, routes, False)

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

    def routes(self, node_id: str, report: fleet_pb2.RouteReport) -> None:
        """A lead counted routes: the next plan of its model goes by them; raises ProtocolViolation for none it has."""
        for deployment in self._known.values():
            leads = deployment.machine.devices[:1] == (node_id,)
            if leads and deployment.manifest_digest == report.manifest_digest:
                check_routes(report, deployment.manifest)
                known = self._registry.routes(report.manifest_digest)
                self._registry.put_routes(report.manifest_digest, added(known, report))
                return

    def device_changed(self, node_id: str, reason: str) -> None:
        """A device may no longer be used as planned (its label changed): its deployments are planned again."""
        self._handle_all(Lost(node_id, reason))
        self._take_offers((node_id,))

    def offer(self, node_id: str, message: fleet_pb2.DraftOffer) -> None:
        """A device would draft, or would not any more: what came of its offers then ends. Raises InvalidDocument."""
        offer = read_offer(message)
        if offer is None:
            self.offers.forget(node_id)
        else:
            self.offers.put(node_id, offer)
        kept = digest(offer.manifest) if offer is not None else ""
        for each in list(self._known.values()):
            offered = each.drafting is not None and each.drafting.offered and each.options.devices == (node_id,)
            if offered and each.manifest_digest != kept:
                self._handle(each, Stop("its device offers it no more"))
        self._take_offers((node_id,))

    def _take_offers(self, node_ids: tuple[str, ...], model: str = "") -> None:
        """Make what the offers of these devices lead to, for every model or for the one of this name."""
        targets = {
            each.model: each.manifest
            for each in self._known.values()
            if each.drafting is None and model in ("", each.model)
        }
        for wanted in self.offers.match(node_ids, targets):
            target = wanted.options.drafting.target if wanted.options.drafting is not None else ""
            try:
                self.deploy(wanted.manifest_json, to_json(wanted.options), wanted.node_id)
            except GanglionError as error:
                self.offers.answer(wanted.node_id, target, error.message)
            else:
                self.offers.answer(wanted.node_id, target, "")
        for node_id, answer in self.offers.news():
            self._roster.send(node_id, fleet_pb2.CoordinatorMessage(draft_answer=answer))
            self._roster.changes.mark()

    def _label_of(self, node_id: str) -> str:
        return TrustLabel.of(self._registry.device(node_id).label).value

    def _lost(self, node_id: str, reason: str) -> None:
        self.offers.forget(node_id)
        self._handle_all(Lost(node_id, reason))

    def gateways_changed(self) -> None:
        """Tell every lead who may open sessions."""
        self._handle_all(GatewaysChanged())

    def tick(self) -> None:
        """Time passed."""
        self._handle_all(Tick())
        ready = (each.machine.devices for each in self._known.values() if each.machine.phase is Phase.READY)
        self._roster.set_serving(frozenset(node_id for devices in ready for node_id in devices))
        self._tell_drafting()

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
        if after != before:
            self._tell_drafting()

    def _tell_drafting(self) -> None:
        """Tell leads which devices draft for them, then those devices who verifies, where either has changed."""
        known = list(self._known.values())
        if not any(each.drafting is not None or each.drafters for each in known):
            return
        for target in known:
            drafters = drafters_of(target, known)
            if drafters != target.drafters:
                target.drafters = drafters
                self._handle(target, GatewaysChanged())
        for each in known:
            if each.drafting is None or each.machine.phase is not Phase.READY:
                continue
            told = verifier_for(each, known, self._roster)
            if told != each.told:
                each.told = told
                self._roster.send(each.machine.devices[0], fleet_pb2.CoordinatorMessage(verifier=told))

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
                    deployment.sessions, deployment.told = 0, None
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

    def _devices(self, options: PlanOptions) -> list[Device]:
        """Devices that may be planned on; what offers to draft does nothing else unless it is named."""
        drafting = set(self.offers.node_ids) if options.drafting is None else set()
        named = set(options.devices)
        return [
            device
            for device in self._roster.devices()
            if device.node_id not in drafting or {device.node_id, device.name} & named
        ]

    def _plan_input(self, deployment: Deployment) -> PlanInput:
        roster = self._roster
        taken = [each.reserved_bytes for each in self._known.values() if each is not deployment]
        return PlanInput(
            manifest=deployment.manifest,
            options=deployment.options,
            devices=less_reserved(self._devices(deployment.options), taken),
            links=roster.links(),
            holders=tuple(roster.name_of(node_id) for node_id in deployment.holders(roster)),
            holder=roster.name_of(deployment.holder),
            drafter=deployment.drafter,
            routes=counted(self._registry.routes(deployment.manifest_digest), deployment.manifest),
            drafter_held=bool(deployment.drafter_holders(roster)),
            again=deployment.machine.epoch > 0,
        )

    def _adopt(self, deployment: Deployment, command: RequestPlan, placed: Placed) -> None:
        if deployment.machine.is_current(command.attempt):
            deployment.adopt(placed.plan, placed.reserved_bytes, placed.ms_per_token)
        self._handle(deployment, Planned(command.attempt, placed.plan.devices))


def parse_request(
    manifest_json: bytes, options_json: bytes, drafter_json: bytes = b""
) -> tuple[Manifest, PlanOptions, Manifest | None]:
    """The documents of a DeployRequest: model, options, drafter; raises InvalidDocument."""
    manifest = from_json(Manifest, manifest_json, limit_bytes=MANIFEST_BYTES)
    options = from_json(PlanOptions, options_json or b"{}", limit_bytes=PLAN_BYTES)
    if not manifest.name or len(manifest.name) > 128:
        raise InvalidDocument(f"Manifest: a name of {len(manifest.name)} characters, expected 1 to 128", param="name")
    if options.drafting is not None and not options.drafting.target:
        raise InvalidDocument("PlanOptions: who drafts needs the name of the model that answers", param="drafting")
    if options.drafting is not None and options.drafting.target == manifest.name:
        # Under one name a gateway could take the one for the other while that is away.
        raise InvalidDocument(f"a drafter for {manifest.name} needs another name (--name)", param="drafting")
    drafter = from_json(Manifest, drafter_json, limit_bytes=MANIFEST_BYTES) if drafter_json else None
    return manifest, options, drafter


async def run_ticks(tick: Callable[[], None], every_s: float) -> None:
    """Call `tick` every `every_s` seconds until cancelled; a defect in one tick does not end the others."""
    while True:
        await asyncio.sleep(every_s)
        try:
            tick()
        except Exception as error:
            log.error("a tick failed by a defect", exc_info=error)
