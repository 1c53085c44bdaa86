"""Workers of a plan in one process, on real lanes over loopback, and a gateway that opens sessions with the lead."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import make, make_llama, make_qwen3
from family_shapes import SHAPES as FAMILY_SHAPES
from mixture_shapes import SHAPES as MIXTURE_SHAPES
from mixture_shapes import make_mixture
from reference_runner import Cut, Runner, cut_evenly

from ganglion.agent import control
from ganglion.agent.speculation.drafters import Drafter
from ganglion.agent.store import PieceStore
from ganglion.agent.worker import Worker
from ganglion.models import DEMO_NAMES, demo_path
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity, Role
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest, to_json
from ganglion.wire.session import SessionClient

DEADLINE_S = 20.0
SHAPES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama": (make_llama, {"num_key_value_heads": 4, "max_position_embeddings": 4096, "num_hidden_layers": 4}),
    "qwen3": (make_qwen3, {"num_key_value_heads": 2, "dtype": "bfloat16"}),
}
SHAPES |= {
    name: (functools.partial(make, family=shape.family), {"dtype": shape.dtype} | shape.config)
    for name, shape in FAMILY_SHAPES.items()
}
SHAPES |= {name: (functools.partial(make_mixture, shape=shape), {}) for name, shape in MIXTURE_SHAPES.items()}
SHAPES |= {name: (lambda _folder, name=name: demo_path(name), {}) for name in DEMO_NAMES}  # they share a tokenizer
FORMATS = {
    "fp32": ("fp32", False),
    "int4": ("int4", False),
    "int8": ("int8", False),
    "int4-fast": ("int4", True),
    "mixed": ("mixed", False),
}


def _world() -> Any:
    spec = importlib.util.spec_from_file_location("world", Path(__file__).parents[2] / "wire" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    return module.World()


@pytest.fixture(scope="session")
def world() -> Any:
    return _world()


@dataclass
class Model:
    """A cut model: its checkpoint, manifest, pieces and the dumb runner over one share."""

    path: Path
    manifest: Manifest
    store: Path
    folder: Path
    _runner: Runner | None = None

    @property
    def runner(self) -> Runner:
        if self._runner is None:
            cuts = cut_evenly(self.manifest, [1])
            pieces = SimpleNamespace(file=PieceStore(self.store).path_of)
            self._runner = Runner(self.manifest, pieces, self.folder / "reference", cuts)
        return self._runner


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    made: dict[tuple[str, str, str], Model] = {}

    def make(shape: str = "llama", weights: str = "fp32", experts: str = "columns") -> Model:
        if (shape, weights, experts) not in made:
            folder = tmp_path_factory.mktemp(f"{shape}-{weights}")
            builder, options = SHAPES[shape]
            path = builder(folder / "checkpoint", **options)
            kind = numeric_class(path, FORMATS[weights][0], fast=FORMATS[weights][1])
            (folder / "store").mkdir(mode=0o700)
            store = PieceStore(folder / "store")
            manifest = partition(path, store, name=shape, numeric_class=kind, experts=experts)
            made[shape, weights, experts] = Model(path, manifest, folder / "store", folder)
        return made[shape, weights, experts]

    return make


@pytest.fixture(scope="session")
def model_class() -> type[Model]:
    """For models that a test cuts itself."""
    return Model


@dataclass
class Cluster:
    """Workers by rank, what each has said, and a client of the lead."""

    plan: Plan
    workers: list[Worker]
    events: list[list[control.Event]]
    client: SessionClient
    names: list[str]
    beats: list[Path]
    said: asyncio.Event = field(default_factory=asyncio.Event)

    def lanes(self, rank: int) -> dict[int, Any]:
        return self.workers[rank]._loaded.board.lanes

    def kv_bytes(self) -> list[int]:
        return [worker._loaded.executor.kv_bytes for worker in self.workers]

    async def tokens(self, prompt: Sequence[int], count: int = 12, **sampling: Any) -> list[int]:
        return [token.id for token in (await self.answer(prompt, count, **sampling))[0]]

    async def answer(self, prompt: Sequence[int], count: int = 12, stop_ids: Sequence[int] = (), **sampling: Any):
        """(tokens, the Finished event) of one session."""
        found: list[lane_pb2.Token] = []
        async with (
            asyncio.timeout(DEADLINE_S),
            contextlib.aclosing(self.client.run(request(prompt, count, stop_ids, **sampling))) as events,
        ):
            async for event in events:
                found += event.tokens.tokens
                if event.WhichOneof("body") == "finished":
                    return found, event.finished
        raise AssertionError("no finished event")

    def open_long(self, prompt: Sequence[int], count: int = 4000) -> Any:
        """Events of an answer that goes on."""
        return self.client.run(request(prompt, count))

    @staticmethod
    async def drain(events: Any) -> None:
        async for _ in events:
            pass

    async def kill(self, rank: int) -> None:
        """What a killed process looks like from outside: every stream and the port end without a word."""
        worker = self.workers[rank]
        worker._serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker._serving
        for lane in self.lanes(rank).values():
            lane._end()
            await lane._shut()
        await worker._loaded.server.stop()

    async def heard(self, rank: int, kind: type[control.Event]) -> Any:
        """The first event of a kind from a worker, which may be yet to come."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for event in self.events[rank]:
                    if isinstance(event, kind):
                        return event
                self.said.clear()
                await self.said.wait()


def request(prompt: Sequence[int], count: int, stop_ids: Sequence[int] = (), **sampling: Any) -> lane_pb2.Open:
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
    return lane_pb2.Open(
        request_id="r", prompt=prompt, max_tokens=count, sampling=lane_pb2.Sampling(**described), stop_ids=stop_ids
    )


def stages_of(manifest: Manifest, nodes: Sequence[str], layout: Sequence[Sequence[float]], topology: str):
    """Stages with shares by weight: [[1, 1], [2, 1]] is two stages of two devices each."""
    layers, found, at = manifest.geometry.layers, [], 0
    none = Range(0, 0)
    for number, weights in enumerate(layout):
        cuts: list[Cut] = cut_evenly(manifest, weights)
        last = number == len(layout) - 1
        shares = tuple(
            Share(device=nodes[at + index], heads=cut.heads, columns=cut.columns, vocab=cut.vocab if last else none)
            for index, cut in enumerate(cuts)
        )
        at += len(weights)
        first, stop = number * layers // len(layout), (number + 1) * layers // len(layout)
        found.append(Stage(layers=Range(first, stop), shares=shares, topology=topology))
    return tuple(found)


@pytest.fixture
def wide_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pays is another test's subject: here windows are as long as they may be."""
    monkeypatch.setattr("ganglion.agent.speculation.window.best_window", lambda *_, most, **__: most)


@pytest.fixture
async def cluster(tmp_path: Path, world: Any) -> AsyncIterator[Callable[..., Any]]:
    """Call it with a model and a layout; every worker is closed at the end and nothing is left behind."""
    started: list[Cluster] = []

    async def start(
        model: Model,
        layout: Sequence[Sequence[float]],
        topology: str = "mesh",
        *,
        context: int = 128,
        sessions: int = 2,
        chunk: int = 16,
        lanes: str | Sequence[str] = "grpc",
        executors: Sequence[str] = (),
        change: Callable[[Plan], Plan] = lambda plan: plan,
        drafter: Drafter | None = None,
    ) -> Cluster:
        count = sum(len(stage) for stage in layout)
        identities: list[Identity] = [world.node() for _ in range(count)]
        gateway = world.node(Role.GATEWAY)
        root = tmp_path / str(len(started))
        plan = change(
            Plan(
                manifest_digest=digest(model.manifest),
                numeric_class=model.manifest.numeric_class,
                context=context,
                sessions=sessions,
                kv_tokens=4 * 8192,
                chunk=chunk,
                stages=stages_of(model.manifest, [one.node_id for one in identities], layout, topology),
                threads={one.node_id: 1 for one in identities},
            )
        )
        events: list[list[control.Event]] = [[] for _ in identities]
        said = asyncio.Event()

        def emit_to(rank: int) -> Callable[[control.Event], None]:
            def emit(event: control.Event) -> None:
                events[rank].append(event)
                said.set()

            return emit

        workers = [Worker(emit_to(rank)) for rank in range(count)]
        names = [f"device-{rank}" for rank in range(count)]
        beats = []
        for rank, (worker, identity) in enumerate(zip(workers, identities, strict=True)):
            home = Home(root / str(rank))
            identity.save(home.identity)
            shutil.copytree(model.store, home.store, copy_function=os.link, dirs_exist_ok=True)
            beats.append(root / str(rank) / "beat")
            await worker.handle(
                control.Load(
                    home=str(home.path),
                    deployment="demo",
                    epoch=7,
                    plan=to_json(plan),
                    manifest=to_json(model.manifest),
                    node_id=identity.node_id,
                    bind="127.0.0.1",
                    beat_path=str(beats[-1]),
                    lanes=lanes if isinstance(lanes, str) else lanes[rank],
                    executor=executors[rank] if executors else "ort",
                )
            )
        if drafter is not None:
            workers[0]._loaded.drafter = drafter
        ports = [events[rank][-1].port for rank in range(count)]
        peers = tuple(
            control.PeerEntry(record=one.record.SerializeToString(), address=f"127.0.0.1:{port}", name=name)
            for one, port, name in zip(identities, ports, names, strict=True)
        )
        gateways = (control.PeerEntry(record=gateway.record.SerializeToString(), address="", name="gateway"),)
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(
                *(worker.handle(control.Connect(peers=peers, gateways=gateways)) for worker in workers)
            )
        lead = identity_pb2.Peer(record=identities[0].record, address=peers[0].address, name=names[0])
        client = SessionClient(gateway, lead, "demo", 7)
        started.append(Cluster(plan, workers, events, client, names, beats, said))
        return started[-1]

    yield start
    for one in started:
        await one.client.close()
        await asyncio.gather(*(worker.close() for worker in one.workers))
        for rank in range(len(one.workers)):
            assert not list((tmp_path / str(started.index(one)) / str(rank) / "run").iterdir())
