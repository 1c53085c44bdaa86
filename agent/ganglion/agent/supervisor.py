"""The supervisor: one process for each device that enrolled. Holds pieces, answers the coordinator, starts workers.

It runs no model. What takes long (hashing, probing, reading a store) runs in threads or processes, so that a heartbeat
is never late.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from ganglion.agent import control
from ganglion.agent.executor.choice import kernels_of, parse_executor
from ganglion.agent.probe import probe_device
from ganglion.agent.store import ManifestShelf, PieceStore
from ganglion.agent.store.bandwidth import Throttle
from ganglion.agent.store.service import ALLOWED, STREAMS, PieceService
from ganglion.agent.supervisor_control import ControlStream, Outbox
from ganglion.agent.supervisor_core import (
    Assigned,
    Assignments,
    Command,
    ConnectAsked,
    Drain,
    End,
    Event,
    Fetched,
    Fetching,
    GaveUp,
    Key,
    Phase,
    Refused,
    ReleaseAsked,
    Report,
    Spawn,
    StartFetch,
    StreamUp,
    Tell,
    VerifierTold,
    WorkerExited,
    WorkerSaid,
)
from ganglion.agent.supervisor_fetch import fetch_assignment
from ganglion.agent.supervisor_held import HeldModels
from ganglion.agent.supervisor_links import measure_links
from ganglion.agent.supervisor_messages import (
    Offer,
    advert_message,
    heartbeat_message,
    held_message,
    offer_message,
    routes_message,
    status_message,
)
from ganglion.agent.supervisor_orders import (
    Assignment,
    key_of,
    read_assign,
    read_connect,
    read_holders,
    read_verifier,
)
from ganglion.agent.supervisor_worker import WORKER_MODULE, WorkerProcess
from ganglion.proto import fleet_pb2, identity_pb2
from ganglion.wire import rpc
from ganglion.wire.address import join_address
from ganglion.wire.errors import GanglionError, Internal
from ganglion.wire.hello import DRAFTING, ROUTES
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity
from ganglion.wire.lane_upgrade import LaneMode
from ganglion.wire.limits import HEARTBEAT_ACTIVE_S, HEARTBEAT_IDLE_S
from ganglion.wire.nouns import DeviceProfile

log = logging.getLogger(__name__)

PROGRESS_S: Final = 0.25  # between two progress reports of one assignment
FAREWELL_S: Final = 0.5  # for last words on the control stream

Prober = Callable[..., Awaitable[DeviceProfile]]
OnAnswer = Callable[[str, str], None]
"""(model to draft for, "" for any; why not, "" when this device drafts for it)."""


@dataclass(frozen=True, slots=True)
class AgentReady:
    """What `run_agent` tells once the coordinator greeted this device for the first time."""

    identity: Identity
    profile: DeviceProfile
    piece_address: str


async def run_agent(
    home: Home,
    *,
    bind: str = "0.0.0.0",  # noqa: S104 - other devices dial this one; mutual TLS decides who may
    threads: int = 0,
    memory_budget_bytes: int = 0,
    store_budget_bytes: int = 0,
    piece_port: int = 0,
    bandwidth_bytes_per_s: int = 0,
    lanes: LaneMode = "auto",
    offer: Offer | None = None,
    on_answer: OnAnswer | None = None,
    executor: str = "ort",
    ready: Callable[[AgentReady], None] | None = None,
    probe: Prober = probe_device,
    worker_module: str = WORKER_MODULE,
) -> None:
    """Be a device until cancelled; then workers end, the coordinator is told, and nothing is left behind.

    `bind`: for pieces, lanes and sessions. `threads`, `memory_budget_bytes`, `store_budget_bytes`, `piece_port`: 0
    leaves the choice to the agent. `bandwidth_bytes_per_s`: of pieces, each way; 0: no limit. `lanes`: which of
    them may be sockets. `executor`: what workers compute with, as `parse_executor` reads it. `offer`: to draft here;
    `on_answer` is told what came of it. Raises Conflict (home or port in use), NotFound (not enrolled),
    PermissionDenied and Unauthenticated (shut out by the coordinator), Unsupported (no torch). A coordinator that is
    not there is waited for.
    """
    identity = Identity.load(home.identity)
    with home.lock():
        clear_folder(home.run)
        family = kernels_of(parse_executor(executor))
        probed = functools.partial(
            probe, home.path, store=home.store, threads=threads, memory_budget_bytes=memory_budget_bytes
        )

        async def measured(*, fresh: bool) -> DeviceProfile:
            profile = await probed(fresh=fresh)
            return msgspec.structs.replace(profile, kernel_family=family) if family else profile

        profile = await measured(fresh=False)
        store = PieceStore(home.store, store_budget_bytes)
        await asyncio.to_thread(store.sweep)
        server = rpc.server(
            identity,
            bind=bind,
            port=piece_port,
            what="the piece port",
            knob="--piece-port",
            allowed=ALLOWED,
            kind="tensor",
            streams=STREAMS,
        )
        PieceService(store, profile.kernel_family, Throttle(bandwidth_bytes_per_s)).add_to(server.server)
        await server.start()
        supervisor = Supervisor(
            home=home,
            identity=identity,
            store=store,
            profile=profile,
            bind=bind,
            lanes=lanes,
            executor=executor,
            piece_port=server.port,
            throttle=Throttle(bandwidth_bytes_per_s),
            offer=offer,
            on_answer=on_answer,
            ready=ready,
            reprobe=lambda: measured(fresh=True),
            worker_module=worker_module,
        )
        try:
            await supervisor.run()
        finally:
            await supervisor.drain()
            await server.stop()
            clear_folder(home.run)


def clear_folder(folder: Path) -> None:
    """Remove what a process before this one left in `folder`."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


class Supervisor:
    """Drives the assignments (`supervisor_core`) with the control stream, fetches and worker processes."""

    def __init__(
        self,
        *,
        home: Home,
        identity: Identity,
        store: PieceStore,
        profile: DeviceProfile,
        bind: str,
        lanes: LaneMode,
        executor: str,
        piece_port: int,
        throttle: Throttle,
        offer: Offer | None,
        on_answer: OnAnswer | None,
        ready: Callable[[AgentReady], None] | None,
        reprobe: Callable[[], Awaitable[DeviceProfile]],
        worker_module: str,
    ) -> None:
        self._home, self._identity, self._store, self._bind = home, identity, store, bind
        self._lanes: LaneMode = lanes
        self._executor = executor
        self._throttle = throttle
        self._offer, self._on_answer = offer, on_answer
        self._ready = ready
        self._worker_module = worker_module
        self._piece_address = join_address(bind, piece_port)  # a wildcard host means: where I am seen
        self._core = Assignments()
        self._assignments: dict[Key, Assignment] = {}
        self._fetches: dict[Key, asyncio.Task[None]] = {}
        self._workers: dict[Key, WorkerProcess] = {}
        self._ending: dict[Key, asyncio.Task[None]] = {}
        self._reported_s: dict[Key, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beats = 0
        self._busy = asyncio.Event()
        self._measuring: asyncio.Task[None] | None = None
        self._outbox = Outbox()
        self.profile = profile
        self._reprobe = reprobe
        self._shelf = ManifestShelf(home.store)
        self._held = HeldModels(store, self._shelf, lambda held: self._outbox.put(held_message(held)))
        self._stream = ControlStream(
            identity,
            self._outbox,
            kernel_family=profile.kernel_family,
            on_up=self._stream_up,
            on_message=self._order,
            on_down=self._stream_down,
        )
        self._streaming: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve until cancelled, or until the coordinator shuts this device out."""
        self._streaming = asyncio.create_task(self._stream.run())
        beating = asyncio.create_task(self._beat())
        looking = asyncio.create_task(self._held.watch())
        try:
            done, _ = await asyncio.wait((self._streaming, beating, looking), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (beating, looking):
                task.cancel()
            await asyncio.gather(beating, looking, return_exceptions=True)

    async def drain(self) -> None:
        """End every assignment, tell the coordinator if it listens, and wait until nothing runs."""
        self._handle(Drain())
        if self._measuring is not None:
            self._measuring.cancel()
        while self._ending:
            await asyncio.gather(*self._ending.values(), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                if self._stream.up:
                    await self._outbox.written()
        for task in (*self._tasks, *([self._streaming] if self._streaming else [])):
            task.cancel()
        await asyncio.gather(*self._tasks, *([self._streaming] if self._streaming else []), return_exceptions=True)

    # The control stream

    def _stream_up(self) -> None:
        log.info("connected to the coordinator at %s", self._identity.coordinator)
        self._outbox.put(advert_message(self.profile, self._piece_address))
        if self._held.held is not None:
            self._outbox.put(held_message(self._held.held))
        if DRAFTING in self._stream.features:
            self._outbox.put(offer_message(self._offer))
        self._handle(StreamUp())
        if self._ready is not None:
            self._ready(AgentReady(self._identity, self.profile, self._piece_address))
            self._ready = None

    def _stream_down(self, error: GanglionError, pause_s: float) -> None:
        log.warning("no control stream: %s; trying again in %.1f s", error.message, pause_s)

    async def _order(self, message: fleet_pb2.CoordinatorMessage) -> None:
        try:
            await self._obey(message)
        except Exception as error:  # no message of a coordinator may end the workers here
            log.error("an order could not be carried out", exc_info=error)

    async def _obey(self, message: fleet_pb2.CoordinatorMessage) -> None:
        match message.WhichOneof("body"):
            case "assign":
                await self._assign(message.assign)
            case "connect":
                self._connect(message.connect)
            case "release":
                release = message.release
                log.info("released %s up to epoch %d: %s", release.deployment, release.epoch, release.reason[:200])
                with _reported(self, release.deployment, release.epoch):
                    self._handle(ReleaseAsked(key_of(release.deployment, release.epoch)))
            case "verifier":
                self._verifier(message.verifier)
            case "draft_answer":
                answer = message.draft_answer
                log.info("drafting for %s: %s", answer.target or "others", answer.refused[:500] or "accepted")
                if self._on_answer is not None:
                    self._on_answer(answer.target, answer.refused)
            case "measure_links":
                if self._measuring is None or self._measuring.done():
                    self._measuring = self._start(self._measure(list(message.measure_links.peers)))
            case "reprobe":
                self._start(self._probe_again())
            case _:
                log.warning("an order of the coordinator is not known to this release; it was left aside")

    async def _assign(self, order: fleet_pb2.Assign) -> None:
        with _reported(self, order.deployment, order.epoch):
            assignment = await asyncio.to_thread(read_assign, order, self._identity, self.profile)
            self._assignments.setdefault(assignment.key, assignment)
            self._handle(Assigned(assignment.key, assignment.gateways))
            for key in self._assignments.keys() - set(self._core.active) - self._ending.keys():
                del self._assignments[key]

    def _connect(self, order: fleet_pb2.Connect) -> None:
        with _reported(self, order.deployment, order.epoch):
            key = key_of(order.deployment, order.epoch)
            assignment = self._assignments.get(key)
            if assignment is None:
                self._handle(ConnectAsked(key, (), ()))  # the core refuses it with its reason
                return
            try:
                peers, gateways = read_connect(order, assignment.plan, self._identity)
            except GanglionError as error:
                # What this worker would have spoken with is not who it claims to be: its epoch cannot begin.
                self._handle(GaveUp(key, error))
                return
            self._handle(ConnectAsked(key, peers, gateways))

    def _verifier(self, order: fleet_pb2.Verifier) -> None:
        with _reported(self, order.deployment, order.epoch):
            key = key_of(order.deployment, order.epoch)
            try:
                verifier = read_verifier(order, self._identity)
            except GanglionError as error:
                # Drafting goes on alone: nothing is sent to one whom the owner does not vouch for.
                log.warning("the verifier of %s is refused: %s", order.target, error.message)
                verifier = control.Verifier(target=order.target, why_away=error.message)
            self._handle(VerifierTold(key, verifier))

    async def _measure(self, peers: list[identity_pb2.Peer]) -> None:
        try:
            links = await measure_links(read_holders(peers, self._identity), self._identity)
        except GanglionError as error:
            log.warning("links are not measured: %s", error.message)
            return
        self._outbox.put(fleet_pb2.AgentMessage(links=fleet_pb2.LinkReport(links=links)))

    async def _probe_again(self) -> None:
        try:
            self.profile = await self._reprobe()
        except GanglionError as error:
            log.warning("the probe failed: %s", error.message)
            return
        self._outbox.put(advert_message(self.profile, self._piece_address))

    # Beats

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            if self._stream.up and not self._outbox.has_heartbeat():
                self._beats += 1
                workers = [(key, self._run_path(key, ".beat")) for key in self._core.running]
                self._outbox.put(heartbeat_message(self._beats, workers))
            active = bool(self._core.active)
            pause_s = HEARTBEAT_ACTIVE_S if active else HEARTBEAT_IDLE_S
            pause_s = max(0.0, pause_s - (loop.time() - began_s))
            if active:
                await asyncio.sleep(pause_s)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._busy.wait()  # an assignment ends the long pause
            self._busy.clear()

    # Carrying out

    def _handle(self, event: Event) -> None:
        for command in self._core.handle(event):
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Report():
                self._report(command)
            case StartFetch(key):
                self._busy.set()
                self._fetches[key] = self._start(self._fetch(key))
            case Spawn(key):
                self._start(self._spawn(key))
            case Tell(key, told):
                if key in self._workers:
                    self._workers[key].tell(told)
            case End(key):
                if key not in self._ending:
                    self._ending[key] = self._start(self._end(key))

    def _report(self, report: Report) -> None:
        if report.error is not None:
            log.warning("%s epoch %d failed: %s", report.key.deployment, report.key.epoch, report.error.message)
        if self._stream.up or report.phase in {Phase.FAILED, Phase.RELEASED}:
            self._outbox.put(status_message(report, self._bind))

    async def _fetch(self, key: Key) -> None:
        assignment = self._assignments[key]

        def progress(done_bytes: int, total_bytes: int) -> None:
            if self._due(key):
                self._handle(Fetching(key, done_bytes, total_bytes))

        try:
            await fetch_assignment(
                assignment, self._store, self._shelf, self._identity, throttle=self._throttle, progress=progress
            )
        except GanglionError as error:
            self._handle(GaveUp(key, error))
        except OSError as error:
            self._handle(GaveUp(key, Internal(f"the store {self._store.path} failed: {error}")))
        else:
            self._handle(Fetched(key))
            await self._held.look()
        finally:
            self._fetches.pop(key, None)

    async def _spawn(self, key: Key) -> None:
        # The epoch before must be gone: two workers of one deployment would need its memory twice.
        before = [task for other, task in self._ending.items() if other.deployment == key.deployment and other != key]
        await asyncio.gather(*before, return_exceptions=True)
        if key not in self._core.active:
            return
        assignment, beat = self._assignments[key], self._run_path(key, ".beat")
        beat.write_bytes(bytes(control.BEAT.size))
        load = control.Load(
            home=str(self._home.path),
            deployment=key.deployment,
            epoch=key.epoch,
            plan=assignment.plan_json,
            manifest=assignment.manifest_json,
            node_id=self._identity.node_id,
            bind=self._bind,
            beat_path=str(beat),
            lanes=self._lanes,
            executor=self._executor,
            store_budget_bytes=self._store.budget_bytes,
            drafter=assignment.drafter_json,
        )
        try:
            worker = await WorkerProcess.spawn(
                load,
                self._run_path(key, ".log"),
                lambda said: self._said(key, said),
                lambda code, line: self._handle(WorkerExited(key, code, line)),
                module=self._worker_module,
            )
        except OSError as error:
            self._handle(GaveUp(key, Internal(f"a worker cannot be started: {error}")))
            return
        self._workers[key] = worker
        if key not in self._core.active:  # ended while it was being started
            await self._stop_worker(key)

    def _said(self, key: Key, said: control.Event) -> None:
        if isinstance(said, control.Routes) and ROUTES in self._stream.features and self._stream.up:
            self._outbox.put(routes_message(said.report))
        if not isinstance(said, control.Loading) or self._due(key):
            self._handle(WorkerSaid(key, said))

    async def _end(self, key: Key) -> None:
        try:
            fetch = self._fetches.pop(key, None)
            if fetch is not None:
                fetch.cancel()
            await self._stop_worker(key)
            self._assignments.pop(key, None)
            self._reported_s.pop(key, None)
        finally:
            self._ending.pop(key, None)

    async def _stop_worker(self, key: Key) -> None:
        worker = self._workers.pop(key, None)
        if worker is not None:
            await worker.stop()
        await asyncio.to_thread(shutil.rmtree, self._run_path(key), ignore_errors=True)
        await asyncio.to_thread(self._store.prepacked.sweep)  # what it had not kept yet
        for suffix in (".beat", ".log"):
            self._run_path(key, suffix).unlink(missing_ok=True)

    # Small things

    def _run_path(self, key: Key, suffix: str = "") -> Path:
        """The run folder, which the worker makes and removes, or a file beside it."""
        return self._home.run / f"{key.deployment}-{key.epoch}{suffix}"

    def _due(self, key: Key) -> bool:
        """Whether a progress report of `key` may go out now; the coordinator ends a stream that says too much."""
        now_s = time.monotonic()
        if now_s - self._reported_s.get(key, 0.0) < PROGRESS_S:
            return False
        self._reported_s[key] = now_s
        return True

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the supervisor failed by a defect", exc_info=task.exception())

    def refuse(self, deployment: str, epoch: int, error: GanglionError) -> None:
        """Tell the coordinator that an order cannot be carried out."""
        self._handle(Refused(Key(deployment[:128], epoch), error))


@contextlib.contextmanager
def _reported(supervisor: Supervisor, deployment: str, epoch: int) -> Iterator[None]:
    """What an order's reading raises becomes its FAILED status."""
    try:
        yield
    except GanglionError as error:
        supervisor.refuse(deployment, epoch, error)
