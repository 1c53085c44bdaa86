"""Sessions over real mutual TLS on loopback."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire import rpc
from ganglion.wire.errors import (
    Conflict,
    ContextExceeded,
    DeviceLost,
    Exhausted,
    Internal,
    PermissionDenied,
    Unauthenticated,
    Unreachable,
)
from ganglion.wire.identity import Identity, OwnerKey, Role, TrustLabel, VerifiedRecord, make_record
from ganglion.wire.lane import stale_epoch
from ganglion.wire.session import METHOD, SessionClient, SessionServicer

DEADLINE_S = 10.0


def tokens(*ids: int) -> lane_pb2.SessionEvent:
    return lane_pb2.SessionEvent(tokens=lane_pb2.Tokens(tokens=[lane_pb2.Token(id=number) for number in ids]))


def finished() -> lane_pb2.SessionEvent:
    return lane_pb2.SessionEvent(finished=lane_pb2.Finished(reason=lane_pb2.FINISH_REASON_LENGTH))


@dataclass
class Lead:
    """A lead whose sessions a test scripts by the request id."""

    identity: Identity
    gateways: dict[str, VerifiedRecord]
    freed: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    def accept(self, node_id: str, deployment: str, epoch: int) -> VerifiedRecord:
        assert deployment == "demo"
        if epoch != 3:
            raise stale_epoch(deployment, epoch, 3)
        if node_id not in self.gateways:
            raise PermissionDenied("not a gateway of this deployment")
        return self.gateways[node_id]

    async def on_session(self, request: lane_pb2.Open, gateway: str) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        assert gateway in self.gateways
        try:
            yield lane_pb2.SessionEvent(accepted=lane_pb2.Accepted(numeric_class="fp32"))
            match request.request_id:
                case "echo":
                    for token in request.prompt:
                        yield tokens(token)
                    yield finished()
                case "endless":
                    yield tokens(1)
                    await asyncio.Event().wait()
                case "too long":
                    raise ContextExceeded("9 tokens, 8 fit")
                case "defect":
                    raise KeyError("secret text")
        finally:
            self.freed.put_nowait(request.request_id)


@dataclass
class Fixture:
    bound: rpc.BoundServer
    lead: Lead
    gateway: Identity

    def client(self, *, epoch: int = 3, identity: Identity | None = None) -> SessionClient:
        peer = identity_pb2.Peer(record=self.lead.identity.record, address=self.bound.address)
        return SessionClient(identity or self.gateway, peer, "demo", epoch)


@pytest.fixture
async def setting(world: Any) -> AsyncIterator[Fixture]:
    lead, gateway = world.node(), world.node(Role.GATEWAY)
    server = Lead(lead, {gateway.node_id: gateway.verified})
    bound = rpc.server(
        lead, bind="127.0.0.1", port=0, what="the port", knob="--bind", allowed={METHOD: frozenset({Role.GATEWAY})}
    )
    SessionServicer(lead, server.accept, server.on_session).add_to(bound.server)
    await bound.start()
    try:
        async with asyncio.timeout(60):
            yield Fixture(bound, server, gateway)
    finally:
        await bound.stop()


async def test_a_session_and_another_on_the_same_channel(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        for prompt in ([1, 2, 3], [4]):
            events = [event async for event in client.run(lane_pb2.Open(request_id="echo", prompt=prompt))]
            assert [event.WhichOneof("body") for event in events] == ["accepted", *["tokens"] * len(prompt), "finished"]
            assert [token.id for event in events for token in event.tokens.tokens] == prompt
            assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "echo"


@contextlib.asynccontextmanager
async def _closing(client: SessionClient) -> AsyncIterator[SessionClient]:
    try:
        yield client
    finally:
        await client.close()


async def test_many_sessions_at_once(setting: Fixture) -> None:
    async def one(client: SessionClient, number: int) -> list[int]:
        request = lane_pb2.Open(request_id="echo", prompt=[number] * 5)
        return [token.id async for event in client.run(request) for token in event.tokens.tokens]

    async with _closing(setting.client()) as client:
        assert await asyncio.gather(*(one(client, number) for number in range(16))) == [[n] * 5 for n in range(16)]


async def test_D16_closing_the_generator_cancels_at_the_lead(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        events = client.run(lane_pb2.Open(request_id="endless"))
        await anext(events)
        assert (await anext(events)).tokens.tokens[0].id == 1
        assert setting.lead.freed.empty()
        await events.aclose()
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "endless"


async def test_D16_a_client_that_vanishes_cancels_at_the_lead(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        events = client.run(lane_pb2.Open(request_id="endless"))
        await anext(events)
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await client.close()
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "endless"
        with pytest.raises(DeviceLost):
            await waiting


async def test_D1_a_lead_that_vanishes_surfaces_at_once(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        events = client.run(lane_pb2.Open(request_id="endless"))
        await anext(events)
        await anext(events)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await setting.bound.stop()
        with pytest.raises(DeviceLost):
            await asyncio.wait_for(waiting, DEADLINE_S)
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "endless"


async def test_an_error_of_the_lead_arrives_as_itself(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        with pytest.raises(ContextExceeded, match="9 tokens, 8 fit"):
            [event async for event in client.run(lane_pb2.Open(request_id="too long"))]


async def test_a_defect_of_the_lead_arrives_without_its_text(
    setting: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    async with _closing(setting.client()) as client:
        with pytest.raises(Internal) as caught:
            [event async for event in client.run(lane_pb2.Open(request_id="defect"))]
    assert "secret text" not in caught.value.message
    assert "defect" in caplog.text


async def test_a_prompt_beyond_one_message_is_refused_here(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        with pytest.raises(Exhausted):
            [event async for event in client.run(lane_pb2.Open(request_id="echo", prompt=[1 << 30] * (1 << 20)))]


async def test_D2_a_stale_epoch_is_refused(setting: Fixture) -> None:
    async with _closing(setting.client(epoch=2)) as client:
        with pytest.raises(Conflict, match="epoch 2 is refused"):
            [event async for event in client.run(lane_pb2.Open(request_id="echo"))]


async def test_a_gateway_that_is_not_of_the_deployment_is_refused(setting: Fixture, world: Any) -> None:
    async with _closing(setting.client(identity=world.node(Role.GATEWAY))) as client:
        with pytest.raises(PermissionDenied):
            [event async for event in client.run(lane_pb2.Open(request_id="echo"))]


async def test_an_agent_may_not_open_a_session(setting: Fixture, world: Any) -> None:
    async with _closing(setting.client(identity=world.node(Role.AGENT))) as client:
        with pytest.raises(PermissionDenied, match="not allowed"):
            [event async for event in client.run(lane_pb2.Open(request_id="echo"))]


async def test_a_lead_whose_record_the_owner_did_not_sign(setting: Fixture) -> None:
    forged = OwnerKey.generate().sign_record(make_record(setting.lead.identity.keys, Role.AGENT, TrustLabel.OWNER))
    peer = identity_pb2.Peer(record=forged, address=setting.bound.address)
    with pytest.raises(Unauthenticated):
        SessionClient(setting.gateway, peer, "demo", 3)


async def test_a_lead_that_does_not_answer(setting: Fixture) -> None:
    address = setting.bound.address
    await setting.bound.stop()
    async with _closing(setting.client()) as client:
        with pytest.raises(Unreachable, match=address):
            [event async for event in client.run(lane_pb2.Open(request_id="echo"))]
