"""A lane that breaks ends the epoch at once, and everyone names the device that was lost."""

from __future__ import annotations

import contextlib
import time

import pytest

from ganglion.agent import control
from ganglion.agent.supervisor_worker import read_beat
from ganglion.agent.worker_beat import Beat, LongestRun
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import DeviceLost, PermissionDenied
from ganglion.wire.frames import Kind
from ganglion.wire.identity import NodeKeys, OwnerKey, Role, TrustLabel, make_record
from ganglion.wire.session import SessionClient

PROMPT = list(range(65, 85))


@pytest.mark.parametrize(
    ("layout", "topology", "victim"),
    [([[1, 1]], "mesh", 1), ([[1, 1, 1]], "mesh", 1), ([[1, 1, 1]], "star", 2), ([[1], [1, 1]], "mesh", 2)],
    ids=str,
)
async def test_a_device_killed_while_it_answers(cluster, model, layout, topology, victim):
    running = await cluster(model("llama"), layout, topology, context=4096)
    async with contextlib.aclosing(running.open_long(PROMPT)) as events:
        tokens = 0
        while tokens < 3:
            tokens += len((await anext(events)).tokens.tokens)
        await running.kill(victim)
        killed = time.monotonic()
        with pytest.raises(DeviceLost, match=f"device-{victim}"):
            await running.drain(events)
    assert time.monotonic() - killed < 2.0
    lost = await running.heard(0, control.PeerLost)
    assert lost.node_id == running.plan.devices[victim]
    with pytest.raises(DeviceLost, match=f"device-{victim}"):
        await running.tokens(PROMPT, 3)


async def test_a_device_lost_while_nobody_asks(cluster, model):
    running = await cluster(model("llama"), [[1, 1, 1]])
    await running.tokens(PROMPT, 2)
    await running.kill(2)
    for rank in (0, 1):
        assert (await running.heard(rank, control.PeerLost)).node_id == running.plan.devices[2]
    with pytest.raises(DeviceLost, match="device-2"):
        await running.tokens(PROMPT, 2)


async def test_a_follower_that_breaks_the_contract_is_named(cluster, model):
    running = await cluster(model("llama"), [[1, 1]])
    await running.lanes(1)[0].send_message(Kind.CANDIDATES, 99, b"nonsense")
    with pytest.raises(DeviceLost, match="device-1"):
        await running.tokens(PROMPT, 2)
    assert (await running.heard(0, control.PeerLost)).node_id == running.plan.devices[1]


async def test_a_step_that_cannot_be_is_the_leads_fault(cluster, model):
    running = await cluster(model("llama"), [[1, 1]])
    step = lane_pb2.Step(step=1, entries=[lane_pb2.StepEntry(session=4, start=9, count=1)])
    await running.lanes(0)[1].send_message(Kind.STEP, 1, step.SerializeToString())
    assert (await running.heard(1, control.PeerLost)).node_id == running.plan.devices[0]


async def test_who_may_open_a_session(cluster, model):
    running = await cluster(model("llama"), [[1]])
    await running.workers[0].handle(control.Gateways(gateways=()))
    with pytest.raises(PermissionDenied):
        await running.tokens(PROMPT, 2)


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.AGENT])
async def test_who_is_not_the_owners_is_left_out(cluster, model, role):
    running = await cluster(model("llama"), [[1]])
    forged = OwnerKey.generate().sign_record(make_record(NodeKeys.generate(), role, TrustLabel.OWNER))
    entry = control.PeerEntry(record=forged.SerializeToString(), address="", name="forged")
    await running.workers[0].handle(control.Gateways(gateways=(entry,)))
    assert running.workers[0]._clients == {}


async def test_a_stale_epoch_is_refused(cluster, model):
    running = await cluster(model("llama"), [[1]])
    old = running.client
    running.client = SessionClient(old._identity, _peer(running), "demo", 6)
    try:
        with pytest.raises(Exception, match="epoch"):
            await running.tokens(PROMPT, 2)
    finally:
        await running.client.close()
        running.client = old


def _peer(running):
    loaded = running.workers[0]._loaded
    return identity_pb2.Peer(record=loaded.identity.record, address=f"127.0.0.1:{loaded.server.port}", name="lead")


def test_the_longest_run_rises_at_once_and_falls_slowly():
    longest = LongestRun(1_000_000_000)
    first = longest.announce(256)
    longest.finished(256, 2.56)
    assert 1.0 < longest.announce(256) < first
    before = longest.announce(1)
    longest.finished(1, 0.5)
    assert longest.announce(1) > before + 1.0
    longest.finished(1, 0.01)
    assert longest.announce(1) > before + 1.0


def test_the_beat_is_what_the_supervisor_reads(tmp_path):
    beat = Beat(tmp_path / "beat")
    assert read_beat(tmp_path / "beat") == (0, 0, 0, 0.0)
    beat.begin(2.5, 3, 4096)
    assert read_beat(tmp_path / "beat") == (0, 3, 4096, 2.5)
    beat.end(2, 1024)
    assert read_beat(tmp_path / "beat") == (1, 2, 1024, 0.0)
    beat.close()


async def test_a_link_between_two_followers_is_told_to_the_lead(cluster, model):
    running = await cluster(model("llama"), [[1, 1, 1]])
    await running.tokens(PROMPT, 2)
    await running.lanes(1)[2]._shut()
    lost = [await running.heard(rank, control.PeerLost) for rank in (1, 2)]
    assert {one.node_id for one in lost} == set(running.plan.devices[1:])
    with pytest.raises(DeviceLost, match=r"device-[12]"):
        await running.tokens(PROMPT, 2)
    assert (await running.heard(0, control.PeerLost)).node_id in running.plan.devices[1:]
