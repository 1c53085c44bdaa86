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
    ProtocolViolation,
    Unauthenticated,
    Unreachable,
)
from ganglion.wire.identity import Identity, OwnerKey, Role, TrustLabel, VerifiedRecord, make_record
from ganglion.wire.lane import stale_epoch
from ganglion.wire.limits import DRAFTS_BYTES, DRAFTS_WAITING
from ganglion.wire.session import METHOD, REQUEST, Opened, SessionClient
from ganglion.wire.session_serving import ROLES, Said, SessionServicer, check_client

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
    many: asyncio.Event = field(default_factory=asyncio.Event)  # 50 messages of drafts have come
    stuck: asyncio.Event = field(default_factory=asyncio.Event)  # an event is not taken
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    heard: list[lane_pb2.Drafts] = field(default_factory=list)
    chosen: list[lane_pb2.Choose | lane_pb2.Ask] = field(default_factory=list)

    def accept(self, node_id: str, deployment: str, epoch: int) -> VerifiedRecord:
        assert deployment == "demo"
        if epoch != 3:
            raise stale_epoch(deployment, epoch, 3)
        if node_id not in self.gateways:
            raise PermissionDenied("not a gateway of this deployment")
        return self.gateways[node_id]

    async def on_session(
        self, request: lane_pb2.Open, gateway: str, said: Said
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        assert gateway in self.gateways
        came: asyncio.Queue[lane_pb2.Drafts] = asyncio.Queue()
        choices: asyncio.Queue[lane_pb2.Choose | lane_pb2.Ask] = asyncio.Queue()

        def take(drafts: lane_pb2.Drafts) -> None:
            self.heard.append(drafts)
            if len(self.heard) == 50:
                self.many.set()
            if drafts.branches[0].tokens[0] >= 100:
                raise ProtocolViolation("token 100 of 100", param="vocabulary")
            came.put_nowait(drafts)

        try:
            if request.request_id.startswith("late"):
                await self.go_on.wait()
            if request.request_id == "chosen":
                said.on_choice = choices.put_nowait
            if "drafted" in request.request_id:
                said.on_drafts = take
            yield lane_pb2.SessionEvent(accepted=lane_pb2.Accepted(numeric_class="fp32"))
            match request.request_id:
                case "echo":
                    for token in request.prompt:
                        yield tokens(token)
                    yield finished()
                case "chosen":
                    yield lane_pb2.SessionEvent(scored=lane_pb2.Scored(position=1))
                    while isinstance(choice := await choices.get(), lane_pb2.Ask) or choice.tokens:
                        self.chosen.append(choice)
                        asked = isinstance(choice, lane_pb2.Ask)
                        yield lane_pb2.SessionEvent(scored=lane_pb2.Scored(position=choice.position, asked=asked))
                    yield finished()
                case "endless":
                    yield tokens(1)
                    await asyncio.Event().wait()
                case "drafted" | "late drafted":
                    while (drafts := await came.get()).branches[0].tokens[0]:
                        yield tokens(*drafts.branches[0].tokens)
                    yield finished()
                case "drafted flood":
                    while True:
                        stuck = asyncio.get_running_loop().call_later(0.1, self.stuck.set)
                        yield tokens(*[1] * 1000)
                        stuck.cancel()
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
    bound = rpc.server(lead, bind="127.0.0.1", port=0, what="the port", knob="--bind", allowed={METHOD: ROLES})
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


async def test_an_agent_that_is_not_admitted_is_refused(setting: Fixture, world: Any) -> None:
    agent = world.node(Role.AGENT)
    async with _closing(setting.client(identity=agent)) as client:
        with pytest.raises(PermissionDenied, match="of this deployment"):
            await _all(client.run(lane_pb2.Open(request_id="echo")))
        setting.lead.gateways[agent.node_id] = agent.verified
        assert len(await _all(client.run(lane_pb2.Open(request_id="echo", prompt=[1])))) == 3


async def test_no_other_role_may_open_a_session(setting: Fixture, world: Any) -> None:
    async with _closing(setting.client(identity=world.node(Role.OWNER))) as client:
        with pytest.raises(PermissionDenied, match="not allowed"):
            await _all(client.run(lane_pb2.Open(request_id="echo")))


def test_who_may_be_admitted(world: Any) -> None:
    for role in ROLES:
        check_client(world.node(role).verified, "it")
    check_client(world.node(Role.GATEWAY, label=TrustLabel.FRIEND).verified, "it")
    for label in (TrustLabel.FRIEND, TrustLabel.STRANGER):
        with pytest.raises(PermissionDenied, match=f"labelled {label}"):
            check_client(world.node(Role.AGENT, label=label).verified, "it")
    with pytest.raises(PermissionDenied, match="enrolled as owner"):
        check_client(world.node(Role.OWNER).verified, "it")


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


# Drafts.


def drafts(*ids: int, sent: int = 0) -> lane_pb2.Drafts:
    return lane_pb2.Drafts(round=sent, branches=[lane_pb2.Branch(parent=b"12345678", tokens=ids)])


async def _all(events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> list[lane_pb2.SessionEvent]:
    async with contextlib.aclosing(events):
        return [event async for event in events]


async def _drafted(client: SessionClient, request_id: str = "drafted") -> Opened:
    return await client.open(lane_pb2.Open(request_id=request_id, contract=lane_pb2.Contract(vocab=100)))


async def test_drafts_arrive_in_order_while_the_answer_runs(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client)
        events = opened.events()
        assert (await anext(events)).WhichOneof("body") == "accepted"
        await opened.send_drafts(drafts(7, 8))
        assert (await anext(events)) == tokens(7, 8)
        await asyncio.gather(*(opened.send_drafts(drafts(number)) for number in range(1, 40)))
        assert [await anext(events) for _ in range(1, 40)] == [tokens(number) for number in range(1, 40)]
        await opened.send_drafts(drafts(0))
        assert [event.WhichOneof("body") for event in await _all(events)] == ["finished"]
        await opened.send_drafts(drafts(1))  # after its end: nothing
        await opened.close()
        assert len(setting.lead.heard) == 41


async def test_a_client_chooses_while_it_reads(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await client.open(lane_pb2.Open(request_id="chosen"))
        events = opened.events()
        assert [(await anext(events)).WhichOneof("body") for _ in range(2)] == ["accepted", "scored"]
        await opened.ask(1, (7, 9))
        assert (await anext(events)).scored.asked
        await opened.choose(1, (5, 6))
        assert not (await anext(events)).scored.asked
        with pytest.raises(Exhausted, match=str(DRAFTS_BYTES)):
            await opened.choose(2, [1 << 30] * DRAFTS_BYTES)
        await opened.choose(2, ())
        assert [event.WhichOneof("body") async for event in events] == ["finished"]
        await opened.choose(3, (1,))  # after its end: nothing
        chosen = lane_pb2.Choose(position=1, tokens=[5, 6])
        assert setting.lead.chosen == [lane_pb2.Ask(position=1, ids=[7, 9]), chosen]


async def test_who_may_not_choose_is_cut_off(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        for name in ("endless", "drafted", "late drafted"):  # the lead draws; and before a session has begun
            opened = await client.open(lane_pb2.Open(request_id=name))
            await opened.choose(1, (5,))
            with pytest.raises(ProtocolViolation):
                async for _ in opened.events():
                    pass


async def test_bytes_are_counted_before_sealing(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        request = lane_pb2.Open(request_id="drafted", prompt=[1] * 100)
        opened = await client.open(request)
        sent = lane_pb2.SessionRequest(open=request).ByteSize()
        assert (opened.sent_bytes, opened.received_bytes) == (sent, 0)
        received = 0
        for message in (drafts(5), drafts(6, 7, 8, 9), drafts(0)):
            await opened.send_drafts(message)
            sent += lane_pb2.SessionRequest(drafts=message).ByteSize()
        async for event in opened.events():
            received += event.ByteSize()
            assert opened.received_bytes == received
        assert received > 0
        assert opened.sent_bytes == sent


async def test_drafts_before_the_lead_is_ready_wait(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client, "late drafted")
        for number in (3, 2, 1, 0):
            await opened.send_drafts(drafts(number))
        reading = asyncio.create_task(_all(opened.events()))
        assert setting.lead.heard == []
        setting.lead.go_on.set()
        events = await asyncio.wait_for(reading, DEADLINE_S)
        assert [token.id for event in events for token in event.tokens.tokens] == [3, 2, 1]


async def test_no_more_drafts_wait_than_are_kept(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client, "late drafted")
        for _ in range(DRAFTS_WAITING + 1):
            await opened.send_drafts(drafts(1))
        with pytest.raises(ProtocolViolation, match=f"{DRAFTS_WAITING} messages"):
            await asyncio.wait_for(_all(opened.events()), DEADLINE_S)
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "late drafted"


@pytest.mark.parametrize("when", ["drafted", "late drafted"])
async def test_a_violation_ends_its_own_session_only(setting: Fixture, when: str) -> None:
    async with _closing(setting.client()) as client:
        other = await _drafted(client)
        others = other.events()
        await anext(others)
        bad = await _drafted(client, when)
        await bad.send_drafts(drafts(1))
        await bad.send_drafts(drafts(100))
        setting.lead.go_on.set()
        with pytest.raises(ProtocolViolation, match="token 100 of 100") as caught:
            await asyncio.wait_for(_all(bad.events()), DEADLINE_S)
        assert caught.value.param == "vocabulary"
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == when
        await bad.send_drafts(drafts(1))
        await other.send_drafts(drafts(9))
        assert await anext(others) == tokens(9)
        await others.aclose()
        assert len(setting.lead.heard) == 3


@pytest.mark.parametrize("reading", [True, False])
async def test_a_violation_ends_a_lead_in_the_middle_of_its_words(setting: Fixture, reading: bool) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client, "drafted flood")
        events = opened.events()
        taking = asyncio.create_task(_all(events)) if reading else None
        if not reading:  # until no more fits between them
            await anext(events)
            await asyncio.wait_for(setting.lead.stuck.wait(), DEADLINE_S)
        await opened.send_drafts(drafts(100))
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "drafted flood"
        with pytest.raises(ProtocolViolation, match="token 100 of 100"):
            await asyncio.wait_for(taking or _all(events), DEADLINE_S)


async def test_drafts_without_a_contract_are_a_violation(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client, "endless")
        await opened.send_drafts(drafts(1))
        with pytest.raises(ProtocolViolation, match="no contract"):
            await asyncio.wait_for(_all(opened.events()), DEADLINE_S)
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "endless"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (lane_pb2.SessionRequest(open=lane_pb2.Open()).SerializeToString(), "open in a session that runs"),
        (b"", "an empty request"),
        (b"\xff", "does not parse"),
        (bytes(DRAFTS_BYTES + 1), "after Open"),
    ],
)
async def test_what_else_a_client_may_not_say(setting: Fixture, body: bytes, text: str) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client)
        await opened._end.send(REQUEST, body)
        with pytest.raises(ProtocolViolation, match=text):
            await asyncio.wait_for(_all(opened.events()), DEADLINE_S)
        assert await asyncio.wait_for(setting.lead.freed.get(), DEADLINE_S) == "drafted"


async def test_drafts_beyond_one_message_are_refused_here(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client)
        with pytest.raises(Exhausted, match=f"at most {DRAFTS_BYTES}"):
            await opened.send_drafts(drafts(*[1] * DRAFTS_BYTES))
        await opened.send_drafts(drafts(0))
        assert [event.WhichOneof("body") for event in await _all(opened.events())] == ["accepted", "finished"]


@pytest.mark.parametrize("reading", [True, False])
async def test_cancel_while_drafts_and_tokens_fly(setting: Fixture, reading: bool) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client, "drafted flood")
        events = opened.events()
        await anext(events)

        async def send() -> None:
            while not opened._over:
                await opened.send_drafts(drafts(1))

        flying = [asyncio.create_task(send()) for _ in range(3)]
        taking = asyncio.create_task(_all(events)) if reading else None
        async with asyncio.timeout(DEADLINE_S):
            await setting.lead.many.wait()
            await opened.close()
            await asyncio.gather(*flying)
            assert await setting.lead.freed.get() == "drafted flood"
            if taking is not None:
                assert await taking  # ends without an error: it was closed here
        await opened.close()


async def test_a_lead_that_vanishes_ends_events_and_drops_drafts(setting: Fixture) -> None:
    async with _closing(setting.client()) as client:
        opened = await _drafted(client)
        events = opened.events()
        await anext(events)
        await setting.bound.stop()
        with pytest.raises(DeviceLost):
            await asyncio.wait_for(anext(events), DEADLINE_S)
        await opened.send_drafts(drafts(1))
