"""Agreeing on a socket inside a sealed lane: who gets one, who does not, and what comes of it."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from lane_pair import Pair, Worker, dial, lane_pair, serving

from ganglion.proto import lane_pb2
from ganglion.wire import lane_upgrade
from ganglion.wire.errors import GanglionError, ProtocolViolation, Unreachable, Unsupported
from ganglion.wire.frames import Expectation, Kind
from ganglion.wire.lane_upgrade import FEATURE, LaneMode, Sockets, is_local
from ganglion.wire.ticket_listener import Ticket, TicketListener


async def works(pair: Pair) -> None:
    await pair.near.send_message(Kind.STEP, 1, b"there")
    assert (await pair.far.receive_any()).payload == b"there"
    await pair.far.send_message(Kind.CANDIDATES, 1, b"back")
    assert await pair.near.receive(Expectation(Kind.CANDIDATES, 1)) == b"back"


@pytest.mark.parametrize(
    ("near", "far", "medium"),
    [("auto", "auto", "socket"), ("auto", "grpc", "grpc"), ("grpc", "auto", "grpc"), ("socket", "auto", "socket")],
)
async def test_what_becomes_of_a_lane_on_loopback(world: Any, near: LaneMode, far: LaneMode, medium: str) -> None:
    async with lane_pair(world, near, far) as pair:
        assert (pair.near.medium, pair.far.medium) == (medium, medium)
        await works(pair)


@pytest.mark.parametrize(("far", "medium"), [("auto", "grpc"), ("socket", "socket")])
async def test_a_lane_to_elsewhere_stays_on_grpc_unless_an_end_must_have_a_socket(
    world: Any, monkeypatch: pytest.MonkeyPatch, far: LaneMode, medium: str
) -> None:
    monkeypatch.setattr(lane_upgrade, "is_local", lambda host: False)
    async with lane_pair(world, "auto", far) as pair:
        assert (pair.near.medium, pair.far.medium) == (medium, medium)
        await works(pair)


async def test_a_peer_without_sockets_is_named_by_a_dialler_that_must_have_one(world: Any) -> None:
    with pytest.raises(Unsupported, match="--lanes auto"):
        async with lane_pair(world, "socket", "grpc"):
            pass


async def test_a_dialler_without_sockets_is_told_and_named_where_one_must_be(world: Any) -> None:
    dialler, accepter = world.node(), world.node()
    worker = Worker(accepter, {dialler.node_id: dialler.verified}, sockets=Sockets("socket", "127.0.0.1"))
    async with serving(worker) as bound, asyncio.timeout(10):
        near = await dial(bound, dialler, accepter.verified, mode="grpc")
        with pytest.raises(Unsupported, match="--lanes auto"):
            await near.receive_any()
        await near.close()
    [(rank, error)] = worker.failures
    assert rank == 0
    assert isinstance(error, Unsupported)
    assert dialler.node_id in error.message


def test_B9_who_never_takes_sockets_is_on_the_wire_like_an_older_release() -> None:
    assert Sockets("grpc", "127.0.0.1").features == ()
    assert Sockets("auto", "127.0.0.1").features == Sockets("socket", "127.0.0.1").features == (FEATURE,)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *(
            (one, True)
            for one in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.7.7", "169.254.1.1")
        ),
        *((one, True) for one in ("169.254.1.1", "::ffff:127.0.0.1")),
        *((one, True) for one in ("::1", "fe80::1", "fe80::1%eth0", "fd12::1", "::ffff:192.168.1.1", "localhost")),
        *((one, False) for one in ("8.8.8.8", "172.32.0.1", "100.64.0.1", "2001:db8::1", "::ffff:8.8.8.8", "nas.lan")),
    ],
)
def test_which_addresses_are_of_the_local_network(host: str, local: bool) -> None:
    assert is_local(host) is local


class Nowhere(TicketListener):
    """Gives tickets for a port where nobody listens, as behind a firewall."""

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        with super().ticket() as ticket:
            with socket.create_server(("127.0.0.1", 0)) as free:
                ticket.port = free.getsockname()[1]
            yield ticket


async def test_a_port_that_cannot_be_reached_leaves_the_lane_on_grpc(
    world: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lane_upgrade, "TicketListener", Nowhere)
    caplog.set_level(logging.INFO)
    async with lane_pair(world, "auto", "auto") as pair:
        assert (pair.near.medium, pair.far.medium) == ("grpc", "grpc")
        await works(pair)
    assert sum("stays on gRPC" in record.message for record in caplog.records) == 2


async def test_a_port_that_cannot_be_reached_is_named_where_a_socket_must_be(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_upgrade, "TicketListener", Nowhere)
    with pytest.raises(Unreachable, match=r"no socket.*firewall.*--lanes auto"):
        async with lane_pair(world, "socket", "auto"):
            pass


async def test_a_port_that_cannot_be_opened_leaves_the_lane_on_grpc(world: Any) -> None:
    elsewhere = Sockets("auto", "192.0.2.1")  # no address of this machine
    async with lane_pair(world, "auto", "auto", far_sockets=elsewhere) as pair:
        assert (pair.near.medium, pair.far.medium) == ("grpc", "grpc")
        await works(pair)


async def test_a_stolen_ticket_opens_nothing(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads the ticket on the way and comes first has the socket, and no key: the lane stays where it was."""
    thefts = []
    connect = Sockets._connect

    async def robbed(self: Sockets, conversation: Any, host: str, offer: Any, *keys: Any) -> Any:
        loop, thief = asyncio.get_running_loop(), socket.socket()
        thief.setblocking(False)
        with thief:
            await loop.sock_connect(thief, (host, offer.port))
            await loop.sock_sendall(thief, offer.ticket + bytes(16))
            thefts.append(await loop.sock_recv(thief, 1))  # closed, without a byte
        return await connect(self, conversation, host, offer, *keys)

    monkeypatch.setattr(Sockets, "_connect", robbed)
    async with lane_pair(world, "auto", "auto") as pair:
        assert (pair.near.medium, pair.far.medium) == ("grpc", "grpc")
        await works(pair)
    assert thefts == [b""]


@pytest.mark.parametrize("change", [{"port": 70000}, {"ticket": b"short"}, {"secret": b"short"}], ids=str)
async def test_an_offer_that_cannot_be_ends_the_lane(
    world: Any, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    say = lane_upgrade._say

    async def lie(stream: Any, conversation: Any, message: Any) -> None:
        if isinstance(message, lane_pb2.SocketOffer):
            for name, value in change.items():
                setattr(message, name, value)
        await say(stream, conversation, message)

    monkeypatch.setattr(lane_upgrade, "_say", lie)
    with pytest.raises(ProtocolViolation, match="cannot be"):
        async with lane_pair(world, "auto", "auto"):
            pass


async def test_a_dialler_that_claims_a_socket_it_has_not_is_shut_out(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_upgrade, "_CONNECT_S", 0.2)

    async def pretend(self: Sockets, conversation: Any, host: str, offer: Any, *keys: Any) -> Any:
        near, far = socket.socketpair()
        far.close()
        near.setblocking(False)
        return lane_upgrade.Upgraded(near, conversation)

    monkeypatch.setattr(Sockets, "_connect", pretend)
    dialler, accepter = world.node(), world.node()
    worker = Worker(accepter, {dialler.node_id: dialler.verified}, sockets=Sockets("auto", "127.0.0.1"))
    async with serving(worker) as bound, asyncio.timeout(10):
        near = await dial(bound, dialler, accepter.verified, mode="auto")
        with pytest.raises(GanglionError):
            await near.receive_any()
        assert worker.lanes.empty()
        await near.close()


def test_keys_are_of_this_secret_epoch_and_pair_alone() -> None:
    opening = lane_pb2.Opening(deployment="demo", epoch=3, source=0, destination=1)
    conversation: Any = SimpleNamespace(opening=opening)
    seen = set()

    def keys(nodes: tuple[str, str] = ("a", "b"), secret: bytes = bytes(32), **changes: Any) -> None:
        changed = lane_pb2.Opening()
        changed.CopyFrom(opening)
        for name, value in changes.items():
            setattr(changed, name, value)
        seen.update(lane_upgrade._keys(SimpleNamespace(opening=changed), nodes, secret))

    assert lane_upgrade._keys(conversation, ("a", "b"), bytes(32)) == lane_upgrade._keys(
        conversation, ("a", "b"), bytes(32)
    )
    keys()
    keys(("b", "a"))
    keys(("a", "c"))
    keys(secret=b"\1" * 32)
    for change in ({"deployment": "other"}, {"epoch": 4}, {"source": 2}, {"destination": 2}):
        keys(**change)
    assert len(seen) == 16
