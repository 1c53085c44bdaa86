# ruff: noqa: N802 - the ids of faults in names of tests are upper case
"""The doors: no method without a role, what agents may say, links, streams, ports, locks, addresses."""

from __future__ import annotations

import asyncio
import socket
import threading

import grpc
import pytest

from ganglion.coordinator.addresses import is_loopback, own_host_towards, reachable_address, seen_host
from ganglion.coordinator.admin_service import COALESCE_S, ROLES, fitting_report
from ganglion.coordinator.allowance import Allowance
from ganglion.coordinator.run import announced_addresses
from ganglion.proto import admin_pb2, enrolment_pb2, fleet_pb2, identity_pb2
from ganglion.wire import rpc
from ganglion.wire.errors import (
    Conflict,
    Corrupt,
    GanglionError,
    InvalidDocument,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unreachable,
    Unsupported,
)
from ganglion.wire.hello import hello
from ganglion.wire.identity import Role
from ganglion.wire.limits import REPORT_BYTES
from ganglion.wire.nouns import Candidate, PlanReport, from_json, to_json

# What admin.proto and fleet.proto say in their comments, written down a second time on purpose.
SAID = {
    "Fleet": {"Control": {"agent"}},
    "Admin": {
        "Greet": {"owner", "gateway", "agent"},
        "Deploy": {"owner"},
        "Explain": {"owner"},
        "Stop": {"owner"},
        "Watch": {"owner", "gateway"},
        "ListTokens": {"owner"},
        "RegisterToken": {"owner"},
        "RevokeToken": {"owner"},
        "PutRecord": {"owner"},
        "Rename": {"owner"},
        "Revoke": {"owner"},
        "PutExpert": {"owner"},
        "RemoveExpert": {"owner"},
        "PutBudget": {"owner"},
        "RemoveBudget": {"owner"},
        "Select": {"owner", "gateway"},
        "Report": {"gateway"},
    },
}


def served_methods():
    for file in (fleet_pb2, admin_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield service, method


def test_B1_every_method_has_the_roles_that_the_contract_says():
    found = {f"/{service.full_name}/{method.name}" for service, method in served_methods()}
    assert set(ROLES) == found
    for service, method in served_methods():
        roles = ROLES[f"/{service.full_name}/{method.name}"]
        assert {role.value for role in roles} == SAID[service.name][method.name]


async def test_B1_who_is_not_allowed_is_refused_before_the_handler(world):
    """Every method by every role, over the wire: refused exactly where the contract says, with one text."""
    identities = {
        role: await world.enrol(f"some-{role.value}", role) for role in (Role.AGENT, Role.GATEWAY, Role.OWNER)
    }
    for role, identity in identities.items():
        async with rpc.channel(identity.coordinator, identity, peer="coordinator") as channel:
            for service, method in served_methods():
                error = await outcome(channel, service, method)
                refused = isinstance(error, PermissionDenied)
                assert refused == (role.value not in SAID[service.name][method.name]), (role, method.name, error)
                if refused:
                    assert error.message == "not allowed"


async def outcome(channel, service, method) -> GanglionError | None:
    """How a call with an empty message ends; None when it is answered or goes on."""
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }
    streams_in = method.full_name.endswith("Fleet.Control")
    streams_out = streams_in or method.name in {"Deploy", "Watch"}
    call = kinds[streams_in, streams_out](f"/{service.full_name}/{method.name}")
    try:
        async with asyncio.timeout(8):
            if streams_in:
                made = call()
                await made.write(fleet_pb2.AgentMessage(hello=hello()).SerializeToString())
                await made.read()
                made.cancel()
            elif streams_out:
                made = call(b"")
                await made.read()
                made.cancel()
            else:
                await call(b"")
    except grpc.aio.AioRpcError as error:
        return rpc.to_error(error, "coordinator")
    except (TimeoutError, asyncio.CancelledError, asyncio.InvalidStateError):
        return None
    return None


async def test_B1_without_a_certificate_there_is_no_call(world):
    authority = (world.home.path / "authority.crt").read_bytes()
    options = rpc.client_options("control", "coordinator.ganglion")
    address = f"127.0.0.1:{world.ready.fleet_port}"
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority), options=options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/ganglion.v1.Admin/Greet")(b"", timeout=3)
    assert isinstance(rpc.to_error(refused.value, address), Unreachable | Unauthenticated)


async def test_B5_the_newest_stream_of_a_device_wins(world, tools):
    first = await world.agent("a")
    second = await world.again(first)
    await tools.within(first.ended.wait())
    assert isinstance(first.error, Conflict)
    watcher = await world.watch()
    await tools.until(lambda: watcher.device("a").state == "alive")
    assert not second.ended.is_set()


async def test_control_begins_with_hello(world, tools):
    agent = await world.agent("a", say_hello=False)
    await agent.say(heartbeat=fleet_pb2.Heartbeat())
    await tools.within(agent.ended.wait())
    assert isinstance(agent.error, ProtocolViolation)
    agent = await world.again(agent, say_hello=False)
    await agent.say(hello=identity_pb2.Hello(protocol=99))
    await tools.within(agent.ended.wait())
    assert isinstance(agent.error, Unsupported)


def bad_messages(tools):
    profile = to_json(tools.profile())
    link = fleet_pb2.Link
    other = "a" * 26
    return {
        "a profile that is none": ({"advert": fleet_pb2.Advert(profile=b"{}")}, InvalidDocument),
        "10 TB per nibble": (
            {"advert": fleet_pb2.Advert(profile=profile.replace(b'"cores":2', b'"cores":1000000000'))},
            InvalidDocument,
        ),
        "a negative size": (
            {"advert": fleet_pb2.Advert(profile=profile.replace(b'"memory_bytes":', b'"memory_bytes":-'))},
            InvalidDocument,
        ),
        "an oversize profile": ({"advert": fleet_pb2.Advert(profile=b" " * 20000)}, InvalidDocument),
        "no address": ({"advert": fleet_pb2.Advert(profile=profile, addresses=["http://x/"])}, InvalidRequest),
        "a negative time": ({"links": fleet_pb2.LinkReport(links=[link(node_id=other, rtt_s=-1)])}, ProtocolViolation),
        "no number": (
            {"links": fleet_pb2.LinkReport(links=[link(node_id=other, rtt_s=float("nan"))])},
            ProtocolViolation,
        ),
        "no node": ({"links": fleet_pb2.LinkReport(links=[link(node_id="x")])}, ProtocolViolation),
        "no digest": ({"held": fleet_pb2.HeldModels(manifest_digests=["zz"])}, InvalidDocument),
        "nothing": ({}, ProtocolViolation),
        "a second hello": ({"hello": hello()}, ProtocolViolation),
    }


async def test_C1_what_no_device_can_be_ends_its_stream_and_no_other(world, tools):
    witness = await world.agent("witness")
    agent = await world.agent("liar")
    for what, (body, kind) in bad_messages(tools).items():
        await agent.say(**body)
        await tools.within(agent.ended.wait())
        assert isinstance(agent.error, kind), (what, agent.error)
        agent = await world.again(agent)
    assert not agent.ended.is_set()
    assert not witness.ended.is_set()


async def test_C4_adverts_are_limited(world, tools):
    agent = await world.agent("a")
    for _ in range(4):  # the fifth, with the one at the start
        await agent.advertise(tools.profile())
    await tools.within(agent.ended.wait())
    assert isinstance(agent.error, ProtocolViolation)
    assert "adverts" in agent.error.message


def test_an_allowance_refills():
    allowance = Allowance(2.0, 3)
    for _ in range(3):
        allowance.take(0.0, "things")
    with pytest.raises(ProtocolViolation, match="2 things a second"):
        allowance.take(0.4, "things")
    allowance.take(0.6, "things")


async def test_links_are_ordered_when_a_device_joins_and_reach_the_planner(world, tools):
    seen = []
    asked = threading.Event()

    def planner(manifest, devices, links, options, drafter, routes, soon):
        seen.append(links)
        asked.set()
        return tools.plan_all(manifest, devices, links, options)

    await world.stop()
    await world.start(planner=planner)
    a = await world.agent("a")
    assert a.got("measure_links") == []
    b = await world.agent("b")
    for agent, other in ((a, b), (b, a)):
        await tools.until(lambda agent=agent: agent.got("measure_links"))
        (order,) = agent.got("measure_links")
        assert [(peer.name, peer.address) for peer in order.peers] == [(other.name, "127.0.0.1:7777")]
    stranger = fleet_pb2.Link(node_id="a" * 26, reachable=True, rtt_s=1.0, bytes_per_s=1.0)
    measured = fleet_pb2.Link(node_id=b.node_id, reachable=True, rtt_s=1e-3, bytes_per_s=1e8)
    await a.say(links=fleet_pb2.LinkReport(links=[measured, stranger]))
    await world.deploy(a)
    assert asked.is_set()
    assert {pair: (link.rtt_s, link.bytes_per_s) for pair, link in seen[-1].items()} == {
        (a.node_id, b.node_id): (1e-3, 1e8)
    }


async def test_watch_tells_changes_and_coalesces_them(world, tools):
    watcher = await world.watch()
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    agent = await world.agent("a")
    for cores in (2, 3, 4):
        await agent.advertise(tools.profile(cores=cores))
    await tools.until(lambda: watcher.device("a") is not None and b'"cores":4' in watcher.device("a").profile)
    assert len(watcher.states) <= 2 + (loop.time() - start_s) / COALESCE_S
    state = watcher.device("a")
    assert (state.state, state.address, state.role) == ("alive", "127.0.0.1:7777", identity_pb2.ROLE_AGENT)
    assert state.last_seen_s < 5
    await agent.stop()
    await tools.until(lambda: watcher.device("a").state == "dead")


async def test_tokens_are_listed_counted_and_only_the_owners_are_known(world, tools):
    admin = await world.admin()
    watcher = await world.watch()
    token = world.token(uses=2)
    await world.call(admin.RegisterToken(admin_pb2.RegisterTokenRequest(grant=token.grant)))
    forged = identity_pb2.SignedGrant(grant=token.grant.grant, signature=bytes(64))
    with pytest.raises(Unauthenticated):
        await world.call(admin.RegisterToken(admin_pb2.RegisterTokenRequest(grant=forged)))
    reply = await world.call(admin.ListTokens(admin_pb2.ListTokensRequest()))
    states = {each.grant.token_id: each for each in reply.tokens}
    assert states[token.allows.token_id].used == 0
    await tools.until(lambda: watcher.states[-1].tokens_unused == 1)
    with pytest.raises(NotFound):
        await world.call(admin.RevokeToken(admin_pb2.RevokeTokenRequest(token_id="zz")))


async def test_renaming(world):
    a = await world.enrol("a")
    await world.enrol("b")
    admin = await world.admin()
    state = await world.call(admin.Rename(admin_pb2.RenameRequest(node_id=a.node_id, name="kitchen")))
    assert state.name == "kitchen"
    for name, kind in (("b", Conflict), ("Küche", InvalidRequest), ("x\n", InvalidRequest)):
        with pytest.raises(kind):
            await world.call(admin.Rename(admin_pb2.RenameRequest(node_id=a.node_id, name=name)))


async def test_D7_a_second_coordinator_on_one_home_is_refused(world):
    from ganglion.coordinator import run_coordinator

    with pytest.raises(Conflict, match="in use by process"):
        await run_coordinator(world.home, bind="127.0.0.1", fleet_port=0, enrolment_port=0, discovery=False)


@pytest.mark.parametrize("flag", ["--fleet-port", "--enrolment-port"])
async def test_a_port_in_use_is_named_with_its_flag(world, flag):
    await world.stop()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        world.ready = None
        option = flag.removeprefix("--").replace("-", "_")
        with pytest.raises(Conflict, match=f"{port}.*{flag}"):
            await world.start(**{option: port})
    await world.start()  # nothing stayed behind


async def test_stopping_frees_ports_and_home(world):
    await world.agent("a")
    await world.watch()
    ports = (world.ready.fleet_port, world.ready.enrolment_port)
    await world.stop()
    for port in ports:
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
    with world.home.lock():
        pass


async def test_an_owner_key_that_is_missing_or_cut_is_named(world):
    await world.stop()
    (world.home.path / "owner.pub").write_bytes(b"short")
    with pytest.raises(Corrupt, match="has 5 bytes"):
        await world.start()
    (world.home.path / "owner.pub").unlink()
    with pytest.raises(NotFound, match=r"owner\.pub is missing"):
        await world.start()


async def test_the_recorder_sees_what_both_ports_read_and_write(world, tools, tmp_path):
    await world.stop()
    path = tmp_path / "recording"
    await world.start(recorder=path)
    a = await world.agent("a")
    await world.deploy(a)
    await world.stop()
    seen = {(direction, method.rpartition("/")[2]) for direction, method, _ in rpc.read_recording(path)}
    assert {("in", "Enrol"), ("out", "Enrol"), ("in", "Control"), ("out", "Control"), ("in", "Deploy")} <= seen


def test_no_message_of_the_coordinator_has_room_for_text_ids_or_activations():
    """Fields of the served services, walked: names that would carry what must not come here do not exist."""
    forbidden = {"prompt", "text", "tokens_ids", "ids", "hidden", "activation", "logits", "tensor", "stream_key"}
    todo = [
        each
        for file in (fleet_pb2, admin_pb2, enrolment_pb2)
        for each in file.DESCRIPTOR.message_types_by_name.values()
    ]
    names = {field.name for message in todo for field in message.fields}
    assert names
    assert not names & forbidden


def test_addresses_are_corrected_by_what_is_seen():
    assert seen_host("ipv4:192.0.2.7:51234") == "192.0.2.7"
    assert seen_host("ipv6:%5B2001:db8::1%5D:51234") == "2001:db8::1"
    with pytest.raises(ProtocolViolation):
        seen_host("unix:/tmp/x")
    assert reachable_address(["0.0.0.0:7"], "192.0.2.7", "192.0.2.9") == "192.0.2.7:7"
    assert reachable_address(["[::]:7"], "2001:db8::1", "") == "[2001:db8::1]:7"
    assert reachable_address(["127.0.0.1:7", "10.0.0.5:7"], "192.0.2.7", "192.0.2.9") == "10.0.0.5:7"
    assert reachable_address(["10.0.0.5:7", "192.0.2.7:7"], "192.0.2.7", "192.0.2.9") == "192.0.2.7:7"
    assert reachable_address(["127.0.0.1:7"], "127.0.0.1", "127.0.0.1") == "127.0.0.1:7"
    assert reachable_address([], "192.0.2.7", "192.0.2.9") == ""


def test_a_device_beside_the_coordinator_is_reached_from_elsewhere_at_the_coordinators_address(monkeypatch):
    monkeypatch.setattr("ganglion.coordinator.addresses.own_host_towards", lambda viewer: "192.0.2.1")
    assert reachable_address(["0.0.0.0:7"], "127.0.0.1", "192.0.2.9") == "192.0.2.1:7"
    assert reachable_address(["0.0.0.0:7"], "127.0.0.1", "127.0.0.1") == "127.0.0.1:7"


def test_own_addresses():
    assert own_host_towards("127.0.0.1") == "127.0.0.1"
    assert is_loopback("::1")
    assert not is_loopback("host.example")
    assert announced_addresses("192.0.2.1") == ["192.0.2.1"]
    assert announced_addresses("some.host") == []
    assert not any(map(is_loopback, announced_addresses("0.0.0.0")))


def test_a_report_is_cut_to_what_a_message_holds():
    candidate = Candidate(mode="single", devices=("a",), feasible=False, chosen=False, reason="x" * 10_000)
    whole = PlanReport(model="m", numeric_class="fp32", candidates=(candidate,) * 500, plan=None)
    shown = from_json(PlanReport, fitting_report(whole), limit_bytes=REPORT_BYTES)
    assert 100 < len(shown.candidates) < 500
    assert shown.notes == (f"{500 - len(shown.candidates)} more candidates are left out of this report",)
    small = PlanReport(model="m", numeric_class="fp32", candidates=(candidate,), plan=None)
    assert fitting_report(small) == to_json(small)
