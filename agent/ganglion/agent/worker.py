"""A worker: one deployment's compute and lanes on this device. `python -m ganglion.agent.worker`, see agent.control.

One event loop does everything in the token path, ONNX Runtime included: handing over between threads costs more than it
gains. Loading runs beside it. The end of standard input ends the process at once, whatever it does.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import re
import shutil
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ganglion.agent.control import (
    Command,
    Connect,
    Connected,
    Event,
    Failed,
    Gateways,
    Listening,
    Load,
    Loading,
    PeerEntry,
    PeerLost,
    Routes,
    decode_command,
    encode,
)
from ganglion.agent.exchange.experts import is_expert_parallel
from ganglion.agent.executor.choice import load_torch, parse_executor
from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Executor
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.executor.port import StepExecutor
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.agent.lead.driver import Lead
from ganglion.agent.lead.grammar import Grammars
from ganglion.agent.lead.routes import RouteRecorder
from ganglion.agent.paging.pager import Pager
from ganglion.agent.store import PieceStore
from ganglion.agent.worker_beat import Beat
from ganglion.agent.worker_drafting import DraftingFor, Guessing, Room, load_guessing, refuse_target
from ganglion.agent.worker_follow import Follower
from ganglion.agent.worker_hold import Holder
from ganglion.agent.worker_lanes import LaneBoard, record_of
from ganglion.agent.worker_stage import StageRunner, vocab_shares
from ganglion.proto import lane_pb2
from ganglion.wire import lane_opening, rpc, session_serving
from ganglion.wire.certificates import Role
from ganglion.wire.errors import (
    DeviceLost,
    GanglionError,
    Internal,
    InvalidDocument,
    PermissionDenied,
    ProtocolViolation,
    Unavailable,
    from_body,
    to_body,
)
from ganglion.wire.frames import Kind
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity, VerifiedRecord
from ganglion.wire.lane import stale_epoch
from ganglion.wire.lane_upgrade import Sockets
from ganglion.wire.limits import MANIFEST_BYTES, NAME_PATTERN, PLAN_BYTES
from ganglion.wire.nouns import Manifest, Plan, Share, Stage, digest, from_json
from ganglion.wire.session import METHOD as SESSION_METHOD

log = logging.getLogger(__name__)

_FAREWELL_S: Final = 0.5


class Worker:
    """A worker without its process: commands in, events out through `emit` (called on the event loop)."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._loaded: _Loaded | None = None
        self._folder: Path | None = None
        self._clients: dict[str, VerifiedRecord] = {}
        self._lead: Lead | None = None
        self._serving: asyncio.Task[None] | None = None
        self._drafting: DraftingFor | None = None

    async def handle(self, command: Command) -> None:
        """Do what the supervisor says; raises what makes the worker useless."""
        if isinstance(command, Load):
            await self._load(command)
        elif self._loaded is None:
            raise ProtocolViolation("the first command must be load")
        elif isinstance(command, Connect):
            await self._connect(self._loaded, command)
        elif isinstance(command, Gateways):
            self._admit(self._loaded, command.gateways)
        elif self._drafting is not None:
            self._drafting.told(command)

    async def _load(self, command: Load) -> None:
        if self._loaded is not None:
            raise ProtocolViolation("this worker has loaded already")
        if not re.fullmatch(NAME_PATTERN, command.deployment):
            raise InvalidDocument(f"deployment {command.deployment[:64]!r} is no name ({NAME_PATTERN})")
        home = Home(Path(command.home))
        self._folder = home.run / f"{command.deployment}-{command.epoch}"
        loop = asyncio.get_running_loop()

        def progress(done_bytes: int, total_bytes: int) -> None:
            loop.call_soon_threadsafe(self._emit, Loading(done_bytes=done_bytes, total_bytes=total_bytes))

        loaded = await asyncio.to_thread(_Loaded, command, home, self._folder, progress)
        bound = loaded.open_port(command.bind)
        board = loaded.board
        lanes = lane_opening.LaneServicer(loaded.identity, board.accept, board.deliver, board.failed, loaded.sockets)
        lanes.add_to(bound.server)
        if loaded.rank == 0:
            sessions = session_serving.SessionServicer(loaded.identity, self._accept_session, self._on_session)
            sessions.add_to(bound.server)
        await bound.start()
        self._loaded = loaded
        self._emit(Listening(port=bound.port))
        threading.Thread(target=loaded.prepacked.keep, name="keep", daemon=True).start()

    async def _connect(self, loaded: _Loaded, command: Connect) -> None:
        if self._serving is not None:
            raise ProtocolViolation("this worker is connected already")
        self._admit(loaded, command.gateways)
        await loaded.board.connect(command.peers)
        lanes = loaded.board.lanes
        if loaded.embedding is not None:
            self._record_routes(loaded)
            runner = StageRunner(loaded.manifest, loaded.plan, loaded.rank, loaded.executor, lanes)
            self._lead = Lead(
                loaded.manifest,
                loaded.plan,
                runner,
                embedding=loaded.embedding,
                lanes=lanes,
                names=loaded.board.names,
                vocab=vocab_shares(loaded.manifest, loaded.plan),
                beat=loaded.beat,
                grammars=loaded.grammars,
                drafter=loaded.drafter,
            )
            if loaded.plan.drafting is not None:
                local = functools.partial(_alone, self._lead)
                self._drafting = DraftingFor(
                    loaded.identity, loaded.manifest, loaded.plan.drafting, loaded.guessing, local
                )
            loop = asyncio.create_task(self._lead.run())
        elif loaded.by_experts:
            holder = Holder(
                loaded.manifest, loaded.plan, loaded.rank, executor=loaded.executor, lane=lanes[0], beat=loaded.beat
            )
            loop = asyncio.create_task(holder.run())
        else:
            runner = StageRunner(loaded.manifest, loaded.plan, loaded.rank, loaded.executor, lanes)
            loop = asyncio.create_task(Follower(runner, lanes[0], loaded.beat).run())
        self._serving = asyncio.create_task(self._serve(loaded, loop))
        self._emit(Connected())

    def _record_routes(self, loaded: _Loaded) -> None:
        """Of a model that is cut by experts, count which ones are chosen here, and report it."""
        if not any(segment.axis == "experts" for layer in loaded.manifest.layers for segment in layer.segments):
            return
        recorder = RouteRecorder(loaded.plan.manifest_digest, len(loaded.manifest.layers))
        loop = asyncio.get_running_loop()

        def record(layer: int, chosen: NDArray[np.int64]) -> None:
            recorder.record(layer, chosen)
            if layer == last and recorder.due and (report := recorder.take()) is not None:
                loop.call_soon_threadsafe(self._emit, Routes(report=report.SerializeToString()))

        here = loaded.manifest.layers[: loaded.plan.stages[0].layers.stop]
        last = max(number for number, layer in enumerate(here) if any(one.axis == "experts" for one in layer.segments))
        loaded.executor.on_routes = record

    # Sessions.

    def _admit(self, loaded: _Loaded, entries: tuple[PeerEntry, ...]) -> None:
        """Gateways and drafting agents, if the owner vouches for them; another is left out, and said in the log."""
        admitted = {}
        for entry in entries:
            try:
                record = record_of(entry, loaded.identity.owner_public_key)
                session_serving.check_client(record, entry.name)
            except GanglionError as error:
                log.warning("%s may open no sessions: %s", entry.name, error.message)
                continue
            admitted[record.node_id] = record
        self._clients = admitted

    def _accept_session(self, node_id: str, deployment: str, epoch: int) -> VerifiedRecord:
        loaded = self._loaded
        if loaded is None or self._lead is None:
            raise Unavailable("the deployment is not connected yet; try again")
        if (deployment, epoch) != (loaded.deployment, loaded.epoch):
            raise stale_epoch(deployment, epoch, loaded.epoch)
        record = self._clients.get(node_id)
        if record is None:
            raise PermissionDenied(f"{node_id} is neither a gateway nor a drafting agent of this deployment")
        return record

    def _on_session(
        self, request: lane_pb2.Open, client: str, said: session_serving.Said
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        if self._lead is None:
            raise Unavailable("the deployment is not connected yet; try again")
        if self._drafting is not None and request.target:
            return self._drafting.serve(request, client)
        refuse_target(request)
        return self._lead.serve(request, client, said)

    # The epoch, until it is over.

    async def _serve(self, loaded: _Loaded, loop: asyncio.Task[None]) -> None:
        watched = {asyncio.create_task(lane.wait_closed()): rank for rank, lane in loaded.board.lanes.items()}
        try:
            await asyncio.wait({loop, *watched}, return_when=asyncio.FIRST_COMPLETED)
            error = loop.exception() if loop.done() else None
            closed = [rank for rank, lane in loaded.board.lanes.items() if lane.closed]
            await self._end(loaded, error, closed)
            # The loop is left where it waits: cancelling a read would cut a lane whose peer is not to blame.
            await asyncio.gather(loop, return_exceptions=True)
        finally:
            for task in (loop, *watched):
                task.cancel()
            await asyncio.gather(loop, *watched, return_exceptions=True)

    async def _end(self, loaded: _Loaded, error: BaseException | None, closed: list[int]) -> None:
        """Say whose fault it is to everyone who waits for it: sessions, peers, the supervisor."""
        rank = closed[0] if closed else None
        if isinstance(error, GanglionError) and error.param in loaded.plan.devices:
            rank = loaded.plan.devices.index(error.param)  # a peer told us who was lost
        elif rank is None and isinstance(error, ProtocolViolation) and loaded.rank != 0:
            rank = 0  # a step that cannot be
        if rank is None or rank == loaded.rank:
            log.error("the worker cannot go on", exc_info=error)
            failure = error if isinstance(error, GanglionError) else Internal(to_body(error or Internal("")).message)
            await self._tell(loaded, failure)
            self._emit(Failed(error=to_body(failure)))
            return
        node_id, name = loaded.plan.devices[rank], loaded.board.names[rank]
        reason = error.message if isinstance(error, GanglionError) else "its lane ended"
        log.warning("device %s (%s) lost: %s", name, node_id, reason)
        lost = DeviceLost(f"device {name} of the deployment was lost: {reason}", param=node_id)
        self._emit(PeerLost(node_id=node_id, reason=reason))
        await self._tell(loaded, lost)

    async def _tell(self, loaded: _Loaded, error: GanglionError) -> None:
        """Fail the sessions, then say why on every lane left; those stay, so that nobody else looks lost."""
        if self._lead is not None:
            self._lead.end(error)
        payload = msgspec.json.encode(to_body(error))
        left = [lane for lane in loaded.board.lanes.values() if not lane.closed]
        sends = [asyncio.create_task(lane.send_message(Kind.ERROR, 0, payload)) for lane in left]
        if sends:
            await asyncio.wait(sends, timeout=_FAREWELL_S)
            for send in sends:
                send.cancel()
            await asyncio.gather(*sends, return_exceptions=True)

    async def close(self) -> None:
        """Close lanes and port and remove the run folder; for whoever runs a worker inside another process."""
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._drafting is not None:
            await self._drafting.close()
        if self._loaded is not None:
            if self._lead is not None:
                self._lead.end(Unavailable("the deployment was released"))
            await self._loaded.board.close()
            await self._loaded.server.stop()
            self._loaded.beat.close()
            if self._loaded.pager is not None:
                self._loaded.pager.close()
            self._loaded.prepacked.close()
        self.remove_files()

    def remove_files(self) -> None:
        """Remove the run folder: graphs and weights are put together anew for every epoch."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Loaded:
    """What `load` leaves: the documents, the shard, an open port."""

    def __init__(self, command: Load, home: Home, folder: Path, progress: Callable[[int, int], None]) -> None:
        self.identity = Identity.load(home.identity)
        self.deployment, self.epoch = command.deployment, command.epoch
        self.plan = from_json(Plan, command.plan, limit_bytes=PLAN_BYTES)
        self.manifest = from_json(Manifest, command.manifest, limit_bytes=MANIFEST_BYTES)
        if digest(self.manifest) != self.plan.manifest_digest:
            raise InvalidDocument("the plan is for another manifest")
        if command.node_id != self.identity.node_id or command.node_id not in self.plan.devices:
            raise InvalidDocument(f"the plan has no share for {self.identity.node_id}")
        self.rank = self.plan.devices.index(command.node_id)
        self.by_experts = is_expert_parallel(self.manifest, self.plan)
        stage, share = _part_of(self.plan, command.node_id)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        store = PieceStore(home.store, command.store_budget_bytes)
        start_runtime(self.plan.threads.get(command.node_id, 1))
        self.prepacked = Prepacked(store)
        choice = parse_executor(command.executor)
        self.executor: StepExecutor
        shard = None  # that a drafter may share
        self.pager: Pager | None = None
        if choice.kind == "torch":
            self.executor = load_torch(
                self.manifest, self.plan, stage, share, choice, open_piece=store.open, progress=progress
            )
        else:
            shard = load_shard(
                self.manifest,
                stage,
                share,
                open_piece=store.open,
                folder=folder,
                progress=progress,
                prepacked=self.prepacked,
            )
            self.pager = shard.pager
            self.executor = Executor(self.manifest, self.plan, shard, store.open)
        self.embedding = EmbeddingTable(self.manifest, store.open) if self.rank == 0 else None
        self.grammars = Grammars(self.manifest, store.open)
        self.guessing = Guessing()
        if self.embedding is not None:
            room = Room(store.open, folder, self.prepacked, progress)
            self.guessing = load_guessing(
                self.manifest, self.plan, shard, self.embedding, drafter_json=command.drafter, room=room
            )
        self.drafter = self.guessing.drafter
        self.beat = Beat(Path(command.beat_path))
        self.sockets = Sockets(command.lanes, command.bind)
        self.board = LaneBoard(self.identity, self.deployment, self.epoch, self.plan, self.rank, sockets=self.sockets)

    def open_port(self, bind: str) -> rpc.BoundServer:
        """A server for lanes and sessions on any free port; to be called on the event loop."""
        allowed = {lane_opening.METHOD: frozenset({Role.AGENT}), SESSION_METHOD: session_serving.ROLES}
        self.server = rpc.server(
            self.identity, bind=bind, port=0, what="the worker's port", knob="--bind", allowed=allowed, kind="tensor"
        )
        return self.server


def _alone(lead: Lead, request: lane_pb2.Open, client: str) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
    return lead.serve(request, client, session_serving.Said())


def _part_of(plan: Plan, node_id: str) -> tuple[Stage, Share]:
    return next((stage, share) for stage in plan.stages for share in stage.shares if share.device == node_id)


# The process.


class _Process:
    """Standard input to commands, events to standard output."""

    def __init__(self) -> None:
        # Nothing that prints may disturb the events: standard output becomes standard error.
        self._events = os.dup(1)
        os.dup2(2, 1)
        self._worker = Worker(self._emit)
        self._commands: asyncio.Queue[Command | GanglionError | int] = asyncio.Queue()

    def _emit(self, event: Event) -> None:
        try:
            os.write(self._events, encode(event))
        except BrokenPipeError:
            self._stop()
        if isinstance(event, Failed):  # whoever says it, the process ends
            self._commands.put_nowait(from_body(event.error).exit_code)

    def _stop(self) -> None:
        self._worker.remove_files()
        os._exit(0)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        """Runs in a thread, so that the end of the input is seen while the loop computes."""
        for line in sys.stdin.buffer:
            try:
                command: Command | GanglionError = decode_command(line)
            except msgspec.DecodeError as error:
                command = InvalidDocument(f"a command that does not parse: {error}")
            loop.call_soon_threadsafe(self._commands.put_nowait, command)
        self._stop()

    async def run(self) -> int:
        """Until the input ends or the worker fails; returns the exit code."""
        threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True).start()
        try:
            while True:
                command = await self._commands.get()
                if isinstance(command, int):
                    return command
                if isinstance(command, GanglionError):
                    raise command
                await self._worker.handle(command)
                gc.collect()
                gc.freeze()  # what is loaded stays: later collections need not look at it
        except Exception as error:
            if not isinstance(error, GanglionError):
                log.error("the worker failed by a defect", exc_info=error)
            self._emit(Failed(error=to_body(error)))
            return error.exit_code if isinstance(error, GanglionError) else Internal.exit_code
        finally:
            self._worker.remove_files()


def main() -> None:
    """Run a worker on standard input and output."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    process = _Process()
    try:
        import uvloop
    except ImportError:  # not on Windows
        code = asyncio.run(process.run())
    else:
        code = uvloop.run(process.run())
    logging.shutdown()
    os._exit(code)  # a thread may still be loading


if __name__ == "__main__":
    main()
