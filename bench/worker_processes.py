"""Workers as processes of their own, on plans that are made by hand: what is measured is lanes and compute alone."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from ganglion.agent import control  # noqa: E402
from ganglion.proto import identity_pb2, lane_pb2  # noqa: E402
from ganglion.wire.home import Home  # noqa: E402
from ganglion.wire.identity import Identity, Role  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, to_json  # noqa: E402
from ganglion.wire.session import SessionClient  # noqa: E402

LIMIT_S = 300.0


def new_world() -> Any:
    """An owner and an authority, as the tests have them."""
    spec = importlib.util.spec_from_file_location("world", ROOT / "tests" / "wire" / "conftest.py")
    if spec is None or spec.loader is None:
        raise SystemExit("tests/wire/conftest.py is missing")
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    return module.World()


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: its ids, seconds to the first token and of each later one, bytes on the lead's lanes both ways."""

    ids: tuple[int, ...]
    first_s: float
    each_s: float
    bytes: int


class Workers:
    """The workers of one plan; `close` ends them."""

    def __init__(self, processes: Sequence[asyncio.subprocess.Process], client: SessionClient) -> None:
        self._processes = processes
        self._client = client

    @classmethod
    async def start(
        cls, world: Any, folder: Path, store: Path, manifest: Manifest, plan: Plan, nodes: Sequence[Identity], lane: str
    ) -> Workers:
        """Processes that have loaded their shares of the pieces in `store` and are connected by lanes of a kind."""
        gateway = world.node(Role.GATEWAY)
        command = (sys.executable, "-m", "ganglion.agent.worker")
        pipe = asyncio.subprocess.PIPE
        processes, ports = [], []
        for rank, identity in enumerate(nodes):
            home = Home(folder / str(rank))
            identity.save(home.identity)
            shutil.copytree(store, home.path / "store", copy_function=os.link, dirs_exist_ok=True)
            (home.path / "store").chmod(0o700)
            log = (folder / f"{rank}.log").open("wb")
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=log)
            processes.append(process)
            await _tell(
                process,
                control.Load(
                    home=str(home.path),
                    deployment="bench",
                    epoch=1,
                    plan=to_json(plan),
                    manifest=to_json(manifest),
                    node_id=identity.node_id,
                    bind="127.0.0.1",
                    beat_path=str(folder / f"{rank}.beat"),
                    lanes=lane,  # type: ignore[arg-type]
                ),
            )
            ports.append((await _heard(process, control.Listening)).port)
        peers = tuple(
            control.PeerEntry(record=one.record.SerializeToString(), address=f"127.0.0.1:{port}", name=str(rank))
            for rank, (one, port) in enumerate(zip(nodes, ports, strict=True))
        )
        caller = control.PeerEntry(record=gateway.record.SerializeToString(), address="", name="gateway")
        for process in processes:
            await _tell(process, control.Connect(peers=peers, gateways=(caller,)))
        for process in processes:
            await _heard(process, control.Connected)
        lead = identity_pb2.Peer(record=nodes[0].record, address=peers[0].address, name="0")
        return cls(processes, SessionClient(gateway, lead, "bench", 1))

    async def answer(self, prompt: Sequence[int], count: int) -> Answered:
        """A greedy answer of `count` tokens."""
        request = lane_pb2.Open(prompt=prompt, max_tokens=count)
        request.sampling.top_p = 1.0
        request.sampling.top_logprobs = -1
        ids, times, travelled = list[int](), list[float](), 0
        began = time.perf_counter()
        async with asyncio.timeout(LIMIT_S), aclosing(self._client.run(request)) as events:
            async for event in events:
                if event.tokens.tokens:
                    times.append(time.perf_counter())
                    ids += [token.id for token in event.tokens.tokens]
                if event.HasField("finished"):
                    timings = event.finished.timings
                    travelled = timings.sent_bytes + timings.received_bytes
        each_s = (times[-1] - times[0]) / max(1, len(ids) - 1)
        return Answered(tuple(ids), times[0] - began, each_s, travelled)

    async def close(self) -> None:
        """End the processes."""
        await self._client.close()
        for process in self._processes:
            if process.stdin is not None:
                process.stdin.close()
        await asyncio.gather(*(process.wait() for process in self._processes))


async def _tell(process: asyncio.subprocess.Process, command: control.Command) -> None:
    if process.stdin is None:
        raise SystemExit("a worker without an input")
    process.stdin.write(control.encode(command))
    await process.stdin.drain()


async def _heard(process: asyncio.subprocess.Process, kind: type[Any]) -> Any:
    if process.stdout is None:
        raise SystemExit("a worker without an output")
    async with asyncio.timeout(LIMIT_S):
        while line := await process.stdout.readline():
            event = control.decode_event(line)
            if isinstance(event, kind):
                return event
            if isinstance(event, control.Failed):
                raise SystemExit(f"a worker failed: {event.error.message}")
    raise SystemExit("a worker ended")
