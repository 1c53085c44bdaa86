# ruff: noqa: N802 - the ids of faults in names of tests are upper case
"""Deployments over real gRPC with scripted agents: the walk, losses, returns, revocation, restarts."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.errors import Conflict, InvalidDocument, NotFound, PermissionDenied, Unavailable
from ganglion.wire.identity import Role, TrustLabel, verify_record
from ganglion.wire.nouns import Manifest as ManifestNoun
from ganglion.wire.nouns import Plan, PlanOptions, PlanReport, digest, from_json, to_json

READY = admin_pb2.DEPLOYMENT_PHASE_READY
FAILED = admin_pb2.DEPLOYMENT_PHASE_FAILED


def phases(events) -> list[str]:
    names = [admin_pb2.DeploymentPhase.Name(event.phase).removeprefix("DEPLOYMENT_PHASE_") for event in events]
    return list(dict.fromkeys(names))


async def test_the_walk_to_ready(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    gateway = await world.enrol("web", Role.GATEWAY)
    watcher = await world.watch(Role.GATEWAY)
    events = await world.deploy(a)
    assert phases(events)[-1] == "READY"
    assert set(phases(events)) <= {"PLANNING", "PREPARING", "CONNECTING", "READY"}

    (assign,) = b.got("assign")
    manifest = from_json(ManifestNoun, assign.manifest, limit_bytes=1 << 20)
    plan = from_json(Plan, assign.plan, limit_bytes=1 << 20)
    assert digest(manifest) == plan.manifest_digest
    assert plan.devices == (a.node_id, b.node_id)
    assert [(holder.name, holder.address) for holder in assign.holders] == [("a", "127.0.0.1:7777")]
    assert a.got("assign")[0].holders == []
    gateways = {verify_record(peer.record, world.owner.public_key).node_id for peer in assign.gateways}
    assert gateways == {gateway.node_id, watcher_node(world)}
    (connect,) = a.got("connect")
    assert connect.epoch == assign.epoch == 1
    assert [(peer.name, peer.address) for peer in connect.peers] == [("a", "127.0.0.1:7778"), ("b", "127.0.0.1:7778")]

    state = await watcher.until("READY")
    assert state.lead.name == "a"
    assert state.lead.address == "127.0.0.1:7778"
    assert verify_record(state.lead.record, world.owner.public_key).node_id == a.node_id
    assert from_json(Plan, state.plan, limit_bytes=1 << 20) == plan
    assert digest(from_json(ManifestNoun, state.manifest, limit_bytes=1 << 20)) == state.manifest_digest


def watcher_node(world) -> str:
    from ganglion.wire.home import Home
    from ganglion.wire.identity import Identity

    return Identity.load(Home(world.path / "by-gateway").identity).node_id


async def test_deploying_the_same_again_is_the_same_deployment(world, tools):
    a = await world.agent("a")
    first, again = await world.deploy(a), await world.deploy(a)
    assert len(again) == 1
    assert again[0] == first[-1]
    other = await world.deploy(a, options=PlanOptions(sessions=2))
    assert other[-1].phase == READY
    assert other[-1].deployment != first[-1].deployment
    await tools.until(lambda: any(each.deployment == first[-1].deployment for each in a.got("release")))
    watcher = await world.watch()
    assert [each.deployment for each in watcher.states[-1].deployments] == [other[-1].deployment]


async def test_D1_a_killed_agent_is_replanned_on_the_survivors(world, tools):
    may_plan = threading.Event()
    may_plan.set()

    def gated(*asked):
        may_plan.wait(10)
        return tools.plan_all(*asked)

    await world.stop()
    await world.start(planner=gated)
    a, b = await world.agent("a"), await world.agent("b")
    watcher = await world.watch()
    await world.deploy(a)
    await watcher.until("READY")
    may_plan.clear()
    await b.stop()
    assert (await watcher.until("REPLANNING")).message.startswith("b was lost")
    may_plan.set()
    await tools.until(lambda: watcher.deployment().epoch == 2)
    state = await watcher.until("READY")
    assert from_json(Plan, state.plan, limit_bytes=1 << 20).devices == (a.node_id,)
    assert [each.epoch for each in a.got("release")] == [1]
    assert watcher.device("b").state == "dead"


async def test_D2_a_silent_agent_is_noticed_within_a_second_and_fenced_when_it_comes_back(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    watcher = await world.watch()
    deployment = (await world.deploy(a))[-1].deployment
    await asyncio.sleep(0)
    b.beats = False
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    await tools.until(lambda: watcher.deployment() is not None and watcher.deployment().epoch == 2)
    assert 0.7 < loop.time() - start_s < 6
    await watcher.until("READY")
    assert watcher.device("b").state == "suspect"
    b.beat_workers = [beat(deployment, 1)]
    b.beats = True
    await tools.until(lambda: [each.epoch for each in b.got("release")][:1] == [1])
    await tools.until(lambda: watcher.device("b").state == "alive")
    assert watcher.deployment().epoch == 2  # a device that returns does not disturb what serves


def beat(deployment: str, epoch: int, sessions: int = 0):
    from ganglion.proto import fleet_pb2

    return fleet_pb2.WorkerBeat(deployment=deployment, epoch=epoch, steps=1, sessions=sessions)


async def test_beats_carry_the_sessions_of_the_lead(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    watcher = await world.watch()
    deployment = (await world.deploy(a))[-1].deployment
    a.beat_workers, b.beat_workers = [beat(deployment, 1, 3)], [beat(deployment, 1, 9)]
    await tools.until(lambda: watcher.deployment().sessions == 3)
    assert a.got("release") == b.got("release") == []


async def test_a_plan_that_does_not_fit_says_so_and_is_tried_when_a_device_joins(world, tools):
    a = await world.agent("a", profile=tools.profile(tools.model_bytes // 2))
    events = await world.deploy(a)
    assert events[-1].phase == FAILED
    assert events[-1].error_code == tools.does_not_fit
    assert "524288 bytes are missing" in events[-1].message
    watcher = await world.watch()
    await world.agent("b", profile=tools.profile(tools.model_bytes // 2))
    state = await watcher.until("READY")
    assert len(from_json(Plan, state.plan, limit_bytes=1 << 20).devices) == 2


async def test_memory_is_planned_once(world, tools):
    a = await world.agent("a", profile=tools.profile(tools.model_bytes * 3 // 2))
    assert (await world.deploy(a))[-1].phase == READY
    other = await world.deploy(a, tools.manifest("other"))
    assert other[-1].phase == FAILED
    assert "524288 bytes are missing" in other[-1].message
    admin = await world.admin()
    watcher = await world.watch()
    await world.call(admin.Stop(admin_pb2.StopRequest(deployment="tiny")))
    await watcher.until("READY", "other")
    with pytest.raises(NotFound, match="there are: other"):
        await world.call(admin.Stop(admin_pb2.StopRequest(deployment="tiny")))


async def test_a_lost_holder_is_named_and_waited_for(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    watcher = await world.watch()
    await world.deploy(a)
    await a.stop()
    state = await watcher.until("FAILED")
    assert "a held them" in state.message
    await tools.until(lambda: watcher.device("a").state == "dead")
    manifest_digest = digest(tools.manifest())
    from ganglion.proto import fleet_pb2

    await b.say(held=fleet_pb2.HeldModels(manifest_digests=[manifest_digest]))
    state = await watcher.until("READY")
    assert [holder.name for holder in state.holders] == ["b"]


async def test_a_failing_worker_is_reported_with_its_reason(world, tools):
    a = await world.agent("a")
    a.works = False
    deploying = asyncio.create_task(world.deploy(a))
    await tools.until(lambda: a.got("assign"))
    order = a.got("assign")[0]
    await a.status(order.deployment, order.epoch, "FAILED", error_code="unsupported", error_message="opset 99")
    events = await deploying
    assert events[-1].phase == FAILED
    assert events[-1].error_code == "unsupported"
    assert events[-1].message.startswith("a: opset 99")


async def test_no_connect_before_all_listen_and_stale_statuses_change_nothing(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    b.works = False
    events: list[admin_pb2.DeployEvent] = []
    call = (await world.admin()).Deploy(tools.request(a.node_id))
    deploying = asyncio.create_task(gather_into(events, call))
    await tools.until(lambda: b.got("assign"))
    order = b.got("assign")[0]
    watcher = await world.watch()
    await b.status(order.deployment, order.epoch + 1, "LISTENING", lane_address="0.0.0.0:1")
    await b.status(order.deployment, order.epoch, "LOADING", done_bytes=7, total_bytes=9)
    await tools.until(lambda: any(each.done_bytes == 7 for event in events for each in event.devices))
    assert a.got("connect") == []
    await watcher.until("PREPARING")
    await b.status(order.deployment, order.epoch, "LISTENING", lane_address="0.0.0.0:1")
    await tools.until(lambda: b.got("connect"))
    assert not deploying.done()
    await b.status(order.deployment, order.epoch, "CONNECTED")
    await tools.within(deploying)
    assert events[-1].phase == READY
    assert any(each.done_bytes == 7 and each.phase == "loading" for event in events for each in event.devices)


async def gather_into(found: list, call) -> None:
    async for each in call:
        found.append(each)  # noqa: PERF401 - each is to be seen when it comes


async def test_B4_revoking_a_device_cuts_its_stream_and_replans(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    watcher = await world.watch()
    await world.deploy(a)
    admin = await world.admin()
    state = await world.call(admin.Revoke(admin_pb2.RevokeRequest(node_id=b.node_id)))
    assert state.state == "revoked"
    await tools.within(b.ended.wait())
    assert isinstance(b.error, PermissionDenied)
    await tools.until(lambda: watcher.deployment().epoch == 2)
    await watcher.until("READY")
    back = await world.again(b, say_hello=False)
    await tools.within(back.ended.wait())
    assert isinstance(back.error, PermissionDenied)


async def test_B4_a_revoked_gateway_loses_its_watch_and_its_sessions(world, tools):
    a = await world.agent("a")
    await world.deploy(a)
    assert a.got("connect")[-1].gateways == []
    watcher = await world.watch(Role.GATEWAY)
    await tools.until(lambda: [peer.name for peer in a.got("connect")[-1].gateways] == ["by-gateway"])
    admin = await world.admin()
    await world.call(admin.Revoke(admin_pb2.RevokeRequest(node_id=watcher_node(world))))
    await tools.within(watcher.task)
    assert isinstance(watcher.error, PermissionDenied)
    await tools.until(lambda: a.got("connect")[-1].gateways == [])
    assert {each.epoch for each in a.got("connect")} == {1}


async def test_a_label_that_the_owner_lowers_ends_a_plan_and_only_the_owner_can(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    watcher = await world.watch()
    await world.deploy(a)
    admin = await world.admin()
    record = identity_pb2.DeviceRecord.FromString(b.identity.record.record)
    record.label = TrustLabel.STRANGER.number
    state = await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=world.owner.sign_record(record))))
    assert state.label == TrustLabel.STRANGER.number
    await tools.until(lambda: watcher.deployment().epoch == 2)
    record.issued_unix_s -= 10
    with pytest.raises(Conflict, match="10 s before"):
        await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=world.owner.sign_record(record))))
    record.sealing_public_key = bytes(32)
    with pytest.raises(Conflict, match="its keys"):
        await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=world.owner.sign_record(record))))
    with pytest.raises(PermissionDenied, match="owner's key itself"):
        await world.call(admin.PutRecord(admin_pb2.PutRecordRequest(record=b.identity.record)))


async def test_D6_a_restart_keeps_the_registry_and_plans_anew(world, tools):
    a, b = await world.agent("a"), await world.agent("b")
    deployment = (await world.deploy(a))[-1].deployment
    before = await world.watch()
    names = {device.name: device.node_id for device in before.states[-1].devices}
    await world.stop()
    await tools.within(a.ended.wait())
    assert isinstance(a.error, Unavailable)
    await world.start()
    watcher = await world.watch()
    assert {device.name: device.node_id for device in watcher.states[-1].devices} == names
    assert watcher.deployment().message.startswith("the coordinator restarted")
    back = await world.again(a)
    back.beat_workers = [beat(deployment, 1)]
    await world.again(b)
    state = await watcher.until("READY")
    assert (state.deployment, state.epoch) == (deployment, 2)
    assert len(from_json(Plan, state.plan, limit_bytes=1 << 20).devices) == 2
    assert 1 in {each.epoch for each in back.got("release")}  # what still ran of the old epoch


async def test_explain_plans_without_deploying(world, tools):
    a = await world.agent("a")
    admin = await world.admin()
    reply = await world.call(admin.Explain(tools.request("")))
    report = from_json(PlanReport, reply.report, limit_bytes=1 << 21)
    assert report.plan is not None
    assert report.plan.lead == a.node_id
    watcher = await world.watch()
    assert watcher.deployment() is None
    assert a.got("assign") == []


async def test_the_real_planner_is_asked_by_default(world, tools):
    from ganglion.partitioner.placement import place

    await world.stop()
    await world.start(planner=place)
    a = await world.agent("a", profile=tools.profile(1 << 30))
    await world.agent("b", profile=tools.profile(1 << 30))
    events = await world.deploy(a)
    assert events[-1].phase == READY
    both = await world.deploy(a, options=PlanOptions(mode="tensor", devices=("a", "b")))
    assert both[-1].phase == READY
    assert len(both[-1].devices) == 2
    gone = await world.deploy(a, options=PlanOptions(devices=("z",)))
    assert (gone[-1].phase, gone[-1].error_code) == (FAILED, "not_found")


async def test_bad_requests_name_what_is_wrong(world, tools):
    a = await world.agent("a")
    admin = await world.admin()
    good = tools.request(a.node_id)
    cases = [
        (admin_pb2.DeployRequest(manifest=b"{", options=b"{}", holder=a.node_id), InvalidDocument, "Manifest"),
        (
            admin_pb2.DeployRequest(manifest=good.manifest, options=b'{"mode":"x"}', holder=a.node_id),
            InvalidDocument,
            "x",
        ),
        (tools.request("nobody"), Unavailable, "control stream"),
    ]
    for request, kind, text in cases:
        with pytest.raises(kind, match=text):
            await world.call(tools.collect(admin.Deploy(request)))
    assert to_json(PlanOptions()) == good.options


async def test_a_deployment_of_another_release_is_dropped_and_the_rest_goes_on(world, tools):
    import sqlite3

    a = await world.agent("a")
    await world.deploy(a)
    await world.stop()
    with sqlite3.connect(world.home.path / "registry.sqlite3") as database:
        database.execute("UPDATE deployments SET manifest = ?", (b'{"format_version":99}',))
    database.close()
    await world.start()
    watcher = await world.watch()
    assert watcher.states[-1].deployments == []
    await world.again(a)
    await tools.until(lambda: watcher.device("a").state == "alive")
