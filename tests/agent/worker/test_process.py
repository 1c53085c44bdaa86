"""The process: JSON lines in and out, and an end that leaves neither a process nor a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator

import pytest

from ganglion.agent import control
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import InvalidDocument
from ganglion.wire.home import Home
from ganglion.wire.identity import Role
from ganglion.wire.nouns import NumericClass, Plan, Range, Share, Stage, digest, to_json
from ganglion.wire.session import SessionClient

DEADLINE_S = 30.0


@contextlib.asynccontextmanager
async def process() -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-m", "ganglion.agent.worker")
    pipe = asyncio.subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    started = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def next_event(started: asyncio.subprocess.Process, kind: type[control.Event]):
    async with asyncio.timeout(DEADLINE_S):
        while True:
            event = control.decode_event(await started.stdout.readline())
            if isinstance(event, kind):
                return event
            assert isinstance(event, control.Loading), event


async def exit_code(started: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(DEADLINE_S):
        return await started.wait()


async def test_load_connect_answer_and_the_end_of_input(world, model, tmp_path):
    cut, identity, gateway = model("llama"), world.node(), world.node(Role.GATEWAY)
    home = Home(tmp_path / "home")
    identity.save(home.identity)
    shutil.copytree(cut.store, home.store, copy_function=os.link, dirs_exist_ok=True)
    geometry = cut.manifest.geometry
    share = Share(
        device=identity.node_id,
        heads=Range(0, geometry.head_groups),
        columns=Range(0, geometry.column_groups),
        vocab=Range(0, geometry.vocab_groups),
    )
    plan = Plan(
        manifest_digest=digest(cut.manifest),
        numeric_class=NumericClass(format="fp32", block=0, exact=True),
        context=64,
        sessions=1,
        kv_tokens=4 * 8192,
        chunk=16,
        stages=(Stage(layers=Range(0, geometry.layers), shares=(share,), topology="mesh"),),
        threads={identity.node_id: 1},
    )
    load = control.Load(
        home=str(home.path),
        deployment="demo",
        epoch=7,
        plan=to_json(plan),
        manifest=to_json(cut.manifest),
        node_id=identity.node_id,
        bind="127.0.0.1",
        beat_path=str(tmp_path / "beat"),
    )
    async with process() as started:
        started.stdin.write(control.encode(load))
        address = f"127.0.0.1:{(await next_event(started, control.Listening)).port}"
        peer = control.PeerEntry(record=identity.record.SerializeToString(), address=address, name="one")
        caller = control.PeerEntry(record=gateway.record.SerializeToString(), address="", name="gateway")
        started.stdin.write(control.encode(control.Connect(peers=(peer,), gateways=(caller,))))
        await next_event(started, control.Connected)
        lead = identity_pb2.Peer(record=identity.record, address=address, name="one")
        client = SessionClient(gateway, lead, "demo", 7)
        prompt = list(range(40, 60))
        found = []
        async with asyncio.timeout(DEADLINE_S):
            async for event in client.run(open_request(prompt, 5)):
                found += [token.id for token in event.tokens.tokens]
        await client.close()
        assert found == cut.runner.greedy(prompt, 5)
        assert list(home.run.iterdir())
        started.stdin.close()
        assert await exit_code(started) == 0
        log = (await started.stderr.read()).decode()
    assert not list(home.run.iterdir())
    assert "Traceback" not in log


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"type":"load"}\n', b'{"type":"gateways","gateways":[]}\n'])
async def test_a_command_that_cannot_be_is_said_and_ends_it(line):
    async with process() as started:
        started.stdin.write(line)
        failed = await next_event(started, control.Failed)
        assert failed.error.code in (InvalidDocument.code, "protocol_violation")
        assert await exit_code(started) != 0
        assert b"Traceback" not in await started.stderr.read()


def open_request(prompt, count):
    return lane_pb2.Open(
        prompt=prompt, max_tokens=count, sampling=lane_pb2.Sampling(temperature=0.0, top_p=1.0, top_logprobs=-1)
    )
