"""A coordinator on loopback with real mutual TLS, and scripted agents that speak the real protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from ganglion.coordinator import Ready, run_coordinator
from ganglion.partitioner.cost import Device
from ganglion.proto import admin_pb2, admin_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.enrol import enrol
from ganglion.wire.errors import DoesNotFit, NotFound
from ganglion.wire.hello import hello
from ganglion.wire.home import Home, write_secret
from ganglion.wire.identity import Identity, OwnerKey, Role, TrustLabel
from ganglion.wire.nouns import (
    Candidate,
    DeviceProfile,
    Embedding,
    FormatRate,
    Geometry,
    Layer,
    Manifest,
    NumericClass,
    PieceRef,
    Plan,
    PlanOptions,
    PlanReport,
    Range,
    RopeTable,
    Segment,
    Share,
    Slot,
    Stage,
    digest,
    to_json,
)
from ganglion.wire.tokens import JoinToken, mint

DEADLINE_S = 15.0
MODEL_BYTES = 1 << 20


async def within(awaitable, seconds: float = DEADLINE_S):
    return await asyncio.wait_for(awaitable, seconds)


async def eventually(condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition of this process, which other tasks of its loop bring about."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.01)


def make_manifest(name: str = "tiny", layers: int = 2) -> Manifest:
    piece = PieceRef("ab" * 32, 1024)
    whole = Slot(name="w", join="whole", rows=1, pieces=(piece,))

    def segment(kind: str, axis: str, groups: int) -> Segment:
        grouped = Slot(name=f"{kind}.m", join="rows", rows=8, pieces=(piece,) * groups)
        return Segment(kind=kind, axis=axis, groups=groups, slots=(grouped, whole))

    return Manifest(
        format_version=3,
        name=name,
        family="llama",
        source_digest="cd" * 32,
        numeric_class=NumericClass(format="fp32", block=0, exact=True),
        opset=21,
        geometry=Geometry(
            hidden=8,
            layers=layers,
            heads=4,
            kv_heads=4,
            head_dim=2,
            intermediate=16,
            vocab=64,
            context=512,
            head_groups=4,
            column_groups=4,
            vocab_groups=4,
            vocab_group_rows=16,
        ),
        layers=(Layer(segments=(segment("attention", "heads", 4), segment("mlp", "columns", 4))),) * layers,
        head=segment("head", "columns", 4),
        embedding=Embedding(dtype="float32", pieces=(piece,) * 4),
        ropes={"default": (RopeTable(context=512, cos=piece, sin=piece),)},
        handover="sum",
        graphs={},
        tokenizer={},
        bos_id=None,
        eos_ids=(0,),
        parameters=1000,
    )


def make_profile(budget_bytes: int = 4 * MODEL_BYTES, **changes) -> DeviceProfile:
    figures = {
        "host_id": "host",
        "hostname": "host",
        "system": "Linux",
        "kernel_family": "test",
        "cores": 2,
        "threads": 1,
        "memory_bytes": 8 * budget_bytes,
        "memory_budget_bytes": budget_bytes,
        "disk_free_bytes": 1 << 30,
        "disk_read_bytes_per_s": 1e9,
        "memory_bytes_per_s": 1e10,
        "rates": {"fp32": FormatRate(decode_bytes_per_s=1e10, prefill_flop_per_s=1e11)},
        "providers": ("CPUExecutionProvider",),
        "version": "0",
    }
    return DeviceProfile(**(figures | changes))


def all_devices(
    manifest: Manifest,
    devices: Sequence[Device],
    links: object,
    options: PlanOptions,
    drafter: Manifest | None = None,
    routes: object = None,
    soon: bool = False,
) -> PlanReport:
    """A planner without figures: even shares over every device, if together they have MODEL_BYTES."""
    ranked = sorted(devices, key=lambda device: device.name)
    have = sum(device.profile.memory_budget_bytes for device in ranked)
    need = MODEL_BYTES
    names = tuple(device.name for device in ranked)
    if have < need or not ranked:
        reason = f"{need - have} bytes are missing"
        return report(
            manifest, None, Candidate(mode="tensor", devices=names, feasible=False, chosen=False, reason=reason)
        )
    count = len(ranked)
    cuts = [Range(4 * at // count, 4 * (at + 1) // count) for at in range(count)]
    shares = [Share(device=d.node_id, heads=cut, columns=cut, vocab=cut) for d, cut in zip(ranked, cuts, strict=True)]
    plan = Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=512,
        sessions=1,
        kv_tokens=4 * 8192,
        chunk=256,
        stages=(Stage(layers=Range(0, 2), shares=tuple(shares), topology="mesh"),),
        threads={device.node_id: 1 for device in ranked},
    )
    chosen = Candidate(
        mode="tensor",
        devices=names,
        feasible=True,
        chosen=True,
        reason="all",
        memory_bytes=dict.fromkeys(names, need // count),
        plan=plan,
    )
    return report(manifest, plan, chosen)


def report(manifest: Manifest, plan: Plan | None, candidate: Candidate) -> PlanReport:
    return PlanReport(model=manifest.name, numeric_class="fp32-exact", candidates=(candidate,), plan=plan)


class FakeAgent:
    """A supervisor without workers: it answers Assign with LISTENING and Connect with CONNECTED unless told not to."""

    def __init__(self, world: World, identity: Identity) -> None:
        self.world = world
        self.identity = identity
        self.node_id = identity.node_id
        self.name = identity.name
        self.received: list[fleet_pb2.CoordinatorMessage] = []
        self.works = True  # answers orders
        self.beats = True
        self.beat_workers: list[fleet_pb2.WorkerBeat] = []
        self.error: Exception | None = None
        self.ended = asyncio.Event()
        self._tasks: list[asyncio.Task] = []
        self._channel: grpc.aio.Channel | None = None

    async def start(self, *, profile: DeviceProfile | None = None, held: Sequence[str] = (), say_hello: bool = True):
        self._channel = rpc.channel(self.identity.coordinator, self.identity, peer="coordinator")
        self.call = fleet_pb2_grpc.FleetStub(self._channel).Control()
        if say_hello:
            await self.say(hello=hello(kernel_family="test"))
            await self.advertise(profile or make_profile())
            if held:
                await self.say(held=fleet_pb2.HeldModels(manifest_digests=held))
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._beat())]
        if say_hello:
            await eventually(lambda: self.received or self.ended.is_set())
        return self

    async def say(self, **body) -> None:
        await within(self.call.write(fleet_pb2.AgentMessage(**body)))

    async def advertise(self, profile: DeviceProfile, addresses: Sequence[str] = ("0.0.0.0:7777",)) -> None:
        await self.say(advert=fleet_pb2.Advert(profile=to_json(profile), addresses=addresses))

    async def status(self, deployment: str, epoch: int, phase: str, **fields) -> None:
        number = fleet_pb2.AssignmentPhase.Value(f"ASSIGNMENT_PHASE_{phase}")
        message = fleet_pb2.AssignmentStatus(deployment=deployment, epoch=epoch, phase=number, **fields)
        await self.say(status=message)

    async def _beat(self) -> None:
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while not self.ended.is_set():
                await asyncio.sleep(0.2)
                if self.beats:
                    await self.call.write(
                        fleet_pb2.AgentMessage(heartbeat=fleet_pb2.Heartbeat(workers=self.beat_workers))
                    )

    async def _read(self) -> None:
        try:
            async for message in self.call:
                self.received.append(message)
                if not self.works:
                    continue
                if message.HasField("assign"):
                    order = message.assign
                    await self.status(order.deployment, order.epoch, "FETCHING", done_bytes=1, total_bytes=2)
                    await self.status(order.deployment, order.epoch, "LISTENING", lane_address="0.0.0.0:7778")
                elif message.HasField("connect"):
                    await self.status(message.connect.deployment, message.connect.epoch, "CONNECTED")
        except grpc.aio.AioRpcError as error:
            self.error = rpc.to_error(error, "coordinator")
        finally:
            self.ended.set()

    def got(self, kind: str) -> list:
        return [getattr(message, kind) for message in self.received if message.HasField(kind)]

    async def stop(self) -> None:
        """As a kill would: the stream breaks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.call.cancel()
        if self._channel is not None:
            await self._channel.close()
        self.ended.set()


class Watcher:
    """What Watch said, newest last."""

    def __init__(self, stub: admin_pb2_grpc.AdminStub) -> None:
        self.states: list[admin_pb2.Fleetwide] = []
        self.error: Exception | None = None
        self._call = stub.Watch(admin_pb2.WatchRequest())
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for state in self._call:
                self.states.append(state)
        except grpc.aio.AioRpcError as error:
            self.error = rpc.to_error(error, "coordinator")

    def device(self, name: str) -> admin_pb2.DeviceState | None:
        return next((each for each in self.states[-1].devices if each.name == name), None) if self.states else None

    def deployment(self, model: str = "tiny") -> admin_pb2.DeploymentState | None:
        found = [each for each in self.states[-1].deployments if each.model == model] if self.states else []
        return found[-1] if found else None

    def phases(self) -> list[str]:
        """Phases of the first deployment in order, without repeats."""
        seen: list[str] = []
        for state in self.states:
            for each in state.deployments[:1]:
                name = admin_pb2.DeploymentPhase.Name(each.phase).removeprefix("DEPLOYMENT_PHASE_")
                if not seen or seen[-1] != name:
                    seen.append(name)
        return seen

    async def until(self, phase: str, model: str = "tiny") -> admin_pb2.DeploymentState:
        number = admin_pb2.DeploymentPhase.Value(f"DEPLOYMENT_PHASE_{phase}")

        def reached() -> bool:
            found = self.deployment(model)
            return found is not None and found.phase == number

        await eventually(reached)
        found = self.deployment(model)
        assert found is not None
        return found

    async def stop(self) -> None:
        self._call.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@dataclass
class World:
    """One owner, one coordinator, and whoever enrols."""

    path: Path
    owner: OwnerKey
    planner: Callable = all_devices
    ready: Ready | None = None
    _task: asyncio.Task | None = None
    _agents: list[FakeAgent] = field(default_factory=list)
    _watchers: list[Watcher] = field(default_factory=list)
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    @property
    def home(self) -> Home:
        return Home(self.path / "coordinator")

    async def start(self, **options) -> Ready:
        ports = {"fleet_port": self.ready.fleet_port, "enrolment_port": self.ready.enrolment_port} if self.ready else {}
        bound: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        settings = {"fleet_port": 0, "enrolment_port": 0, "discovery": False, "planner": self.planner}
        self._task = asyncio.create_task(
            run_coordinator(self.home, bind="127.0.0.1", ready=bound.set_result, **(settings | ports | options))
        )
        await within(asyncio.wait({self._task, bound}, return_when=asyncio.FIRST_COMPLETED))
        if self._task.done():
            bound.cancel()
            ended, self._task = self._task, None
            ended.result()
        self.ready = bound.result()
        return self.ready

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await within(self._task)
            self._task = None

    async def close(self) -> None:
        for watcher in self._watchers:
            await watcher.stop()
        for agent in self._agents:
            await agent.stop()
        for channel in self._channels:
            await channel.close()
        await self.stop()

    def token(self, role: Role = Role.AGENT, **options) -> JoinToken:
        assert self.ready is not None
        address = f"127.0.0.1:{self.ready.enrolment_port}"
        return mint(self.owner, addresses=[address], authority_pin=self.ready.authority_pin, role=role, **options)

    async def enrol(self, name: str, role: Role = Role.AGENT, label: TrustLabel = TrustLabel.OWNER) -> Identity:
        folder = Home(self.path / name).identity
        return await within(enrol(folder, token=self.token(role, label=label), role=role, name=name))

    async def agent(self, name: str, **options) -> FakeAgent:
        return await self.enter(await self.enrol(name), **options)

    async def enter(self, identity: Identity, **options) -> FakeAgent:
        agent = FakeAgent(self, identity)
        self._agents.append(agent)
        return await agent.start(**options)

    async def again(self, agent: FakeAgent, **options) -> FakeAgent:
        """The same device, with a new stream."""
        fresh = FakeAgent(self, agent.identity)
        self._agents.append(fresh)
        return await fresh.start(**options)

    async def admin(self, role: Role = Role.OWNER) -> admin_pb2_grpc.AdminStub:
        name = f"by-{role.value}"
        try:
            identity = Identity.load(Home(self.path / name).identity)
        except NotFound:
            identity = await self.enrol(name, role)
        return self.stub(identity)

    def stub(self, identity: Identity) -> admin_pb2_grpc.AdminStub:
        channel = rpc.channel(identity.coordinator, identity, peer="coordinator")
        self._channels.append(channel)
        return admin_pb2_grpc.AdminStub(channel)

    async def watch(self, role: Role = Role.OWNER) -> Watcher:
        watcher = Watcher(await self.admin(role))
        self._watchers.append(watcher)
        await eventually(lambda: watcher.states)
        return watcher

    async def deploy(
        self, holder: FakeAgent, manifest: Manifest | None = None, options: PlanOptions | None = None
    ) -> list[admin_pb2.DeployEvent]:
        """Every event until the end; raises the error of the tree."""
        request = deploy_request(holder.node_id, manifest, options)
        stub = await self.admin()
        try:
            return await within(collect(stub.Deploy(request)))
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error, "coordinator") from error

    async def call(self, made) -> object:
        """The reply of a call; raises the error of the tree."""
        try:
            return await within(made)
        except grpc.aio.AioRpcError as error:
            raise rpc.to_error(error, "coordinator") from error


async def collect(call) -> list:
    return [each async for each in call]


def deploy_request(holder: str, manifest: Manifest | None = None, options: PlanOptions | None = None):
    return admin_pb2.DeployRequest(
        manifest=to_json(manifest or make_manifest()), options=to_json(options or PlanOptions()), holder=holder
    )


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A running coordinator with the planner `all_devices`."""
    made = World(tmp_path, OwnerKey.generate())
    write_secret(made.home.path / "owner.pub", made.owner.public_key)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
def tools() -> type:
    """What tests take from this file."""

    class Tools:
        manifest = staticmethod(make_manifest)
        profile = staticmethod(make_profile)
        request = staticmethod(deploy_request)
        until = staticmethod(eventually)
        within = staticmethod(within)
        collect = staticmethod(collect)
        plan_all = staticmethod(all_devices)
        model_bytes = MODEL_BYTES
        does_not_fit = DoesNotFit.code

    return Tools
