"""Replicas under a real Ray Serve: rounds are sticky, and a replica that is killed in the middle costs no token."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed here: deploy/ray/README.md says how it is")
serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed here")

from checkpoints import make_llama  # noqa: E402
from verifier_replicas import Device  # noqa: E402

from ganglion.agent.speculation.http.client import Timeouts  # noqa: E402
from ganglion.agent.speculation.http.replica import Replica, ReplicaOptions  # noqa: E402
from ganglion.agent.speculation.http.rounds import RoundVerifier  # noqa: E402
from ganglion.agent.store import ManifestShelf, PieceStore  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.proto import lane_pb2  # noqa: E402
from ganglion.wire.nouns import Manifest  # noqa: E402

APP = Path(__file__).parents[3] / "deploy" / "ray"
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
COUNT = 48
SAMPLING: dict[str, Any] = {"temperature": 0.8, "seed": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("ray")
    path = make_llama(folder / "checkpoint", num_key_value_heads=4, max_position_embeddings=512)
    pieces = PieceStore(folder / "store")
    manifest = partition(path, pieces, name="tiny", numeric_class=numeric_class(path, "fp32"))
    ManifestShelf(folder / "store").put(manifest)
    return folder / "store", manifest


@pytest.fixture(scope="module")
def cluster(store: tuple[Path, Manifest]) -> Iterator[tuple[str, Any]]:
    """The address of two replicas behind Serve's proxy, and their handle."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sys.path.insert(0, str(APP))
    try:
        import app

        path = os.pathsep.join([str(APP), *(one for one in sys.path if one)])
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            configure_logging=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        built = app.build({"store": str(store[0]), "model": "tiny", "replicas": "2", "sessions": "4"})
        handle = serve.run(built, name="verifier", route_prefix="/verifier")
        yield f"http://127.0.0.1:{port}/verifier", handle
    finally:
        sys.path.remove(str(APP))
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def true(store: tuple[Path, Manifest]) -> list[int]:
    """What the model draws by itself."""

    async def alone() -> list[int]:
        replica = Replica(ReplicaOptions(store=store[0], model="tiny", threads=1))
        replica.start()
        described = {"top_p": 1.0, "top_logprobs": -1} | SAMPLING
        wanted = lane_pb2.Open(prompt=PROMPT, max_tokens=COUNT, sampling=lane_pb2.Sampling(**described))
        said = replica._lead.serve(wanted, "alone", None)  # type: ignore[arg-type]
        found = [token.id async for event in said for token in event.tokens.tokens]
        await replica.close()
        return found

    return asyncio.run(alone())


async def pids(handle: Any, wanted: int) -> dict[str, int]:
    """Process ids by replica's name, when so many have been met."""
    found: dict[str, int] = {}
    async with asyncio.timeout(60):
        while len(found) < wanted:
            name, pid = await handle.pid.remote()
            found[name] = pid
    return found


@pytest.mark.timeout(300)
async def test_rounds_are_sticky_and_exact(cluster, store, true):
    url, _ = cluster
    verifier = RoundVerifier(url, timeouts=Timeouts(answer_s=30.0))
    device = Device(store[1], true)
    met: set[str] = set()
    for _ in range(16):  # by a hash: that one replica gets none of their sessions is one in 2 ** 31
        answers = await asyncio.gather(*(device.tokens(verifier, PROMPT, **SAMPLING) for _ in range(2)))
        assert [found for found, _, _ in answers] == [true] * 2
        assert all(len(stream.travelled.replicas) == 1 for _, _, stream in answers)
        met.update(*(stream.travelled.replicas for _, _, stream in answers))
        if len(met) == 2:
            break
    await verifier.close()
    assert len(met) == 2


@pytest.mark.timeout(300)
async def test_a_killed_replica_costs_no_token(cluster, store, true):
    url, handle = cluster
    verifier = RoundVerifier(url, timeouts=Timeouts(answer_s=30.0), patience_s=60.0)
    processes = await pids(handle, 2)
    killed: list[str] = []

    async def kill(found: int, stream: Any) -> None:
        if found > COUNT // 3 and not killed:
            (name,) = stream.travelled.replicas
            killed.append(name)
            os.kill(processes[name], signal.SIGKILL)

    found, finished, stream = await Device(store[1], true).tokens(verifier, PROMPT, kill, **SAMPLING)
    await verifier.close()
    assert found == true
    assert finished.completion_tokens == COUNT
    first, second, *_ = stream.travelled.replicas
    assert first == killed[0] != second
    assert stream.travelled.begun >= 2
    # Serve puts another in its place.
    async with asyncio.timeout(120):
        while killed[0] in (there := await pids(handle, 2)):
            pass
    assert second in there
