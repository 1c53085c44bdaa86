"""A gateway and a fleet that changes: readiness, new plans, lost coordinators, foreign leads and bytes, start, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from ganglion.gateway import run_gateway
from ganglion.gateway.deployments import Deployments, Phase
from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.errors import Conflict, InvalidRequest, NotFound, PermissionDenied, Unavailable
from ganglion.wire.home import Home
from ganglion.wire.identity import Role, TrustLabel, verify_record

ASK: list[Any] = [{"role": "user", "content": "hi"}]


def client(fleet: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=fleet.url, api_key="unused", max_retries=0)


async def ask(fleet: Any, model: str = "tiny") -> str | None:
    async with client(fleet) as ai:
        return (await ai.chat.completions.create(model=model, messages=ASK)).choices[0].message.content


# --- the table of routes


async def test_routing_table(fleet: Any) -> None:
    table = Deployments(lambda record: verify_record(record, fleet.world.owner.public_key))
    with pytest.raises(Unavailable, match="not heard"):
        table.find("tiny")
    assert table.update(admin_pb2.Fleetwide()) == frozenset()
    with pytest.raises(NotFound, match="none; deploy"):
        table.find("tiny")
    first, second = fleet.state(sessions=2), fleet.state(deployment="other", sessions=1)
    table.update(admin_pb2.Fleetwide(deployments=[first, second]))
    assert table.find("tiny").deployment == "other"
    second.epoch = 2
    assert table.update(admin_pb2.Fleetwide(deployments=[first, second])) == {("other", 1)}
    second.phase = admin_pb2.DEPLOYMENT_PHASE_REPLANNING
    assert table.update(admin_pb2.Fleetwide(deployments=[first, second])) == {("other", 2)}
    assert table.find("tiny").deployment == "d-tiny"
    assert table.update(admin_pb2.Fleetwide(deployments=[second])) == {("d-tiny", 1)}
    with pytest.raises(Unavailable, match=r"planned again after a device was lost \(epoch 2\)"):
        table.find("tiny")
    second.phase = admin_pb2.DEPLOYMENT_PHASE_STOPPED
    table.update(admin_pb2.Fleetwide(deployments=[second]))
    with pytest.raises(NotFound):
        table.find("tiny")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lead": None}, "named no lead"),
        ({"plan": None}, "no manifest or no plan"),
        ({"manifest": None}, "no manifest or no plan"),
        ({"manifest": b"{"}, "Manifest"),
        ({"plan": b"[]"}, "Plan"),
        ({"manifest_digest": "0" * 64}, "digest"),
    ],
)
async def test_states_that_are_not_used(fleet: Any, changes: dict[str, Any], words: str) -> None:
    table = Deployments(lambda record: verify_record(record, fleet.world.owner.public_key))
    table.update(admin_pb2.Fleetwide(deployments=[fleet.state(**changes)]))
    with pytest.raises(Unavailable, match=words):
        table.find("tiny")
    assert table.routes[0].phase is Phase.READY


async def test_leads_that_the_owner_does_not_vouch_for(fleet: Any, make_world: Any) -> None:
    """Promise 6: a dishonest coordinator cannot put its own device in front of the text."""
    table = Deployments(lambda record: verify_record(record, fleet.world.owner.public_key))
    foreign = make_world().node(Role.AGENT)
    friend = fleet.world.node(Role.AGENT, label=TrustLabel.FRIEND)
    gateway = fleet.world.node(Role.GATEWAY)
    broken = identity_pb2.SignedRecord()
    broken.CopyFrom(fleet.agent.identity.record)
    broken.record += b"\0"
    for record, words in (
        (foreign.record, "signature"),
        (friend.record, "labelled friend"),
        (gateway.record, "not an agent"),
        (broken, "signature"),
        (identity_pb2.SignedRecord(), "record"),
    ):
        lead = identity_pb2.Peer(record=record, address="127.0.0.1:1", name="x")
        table.update(admin_pb2.Fleetwide(deployments=[fleet.state(lead=lead)]))
        with pytest.raises(Unavailable, match=words):
            table.find("tiny")


# --- readiness and changes


async def test_readiness(fleet: Any) -> None:
    await fleet.start(coordinator="127.0.0.1:1")
    body = await fleet.readyz(503)
    assert body["coordinator"]["connected"] is False
    with pytest.raises(openai.InternalServerError, match="not heard from the coordinator"):
        await ask(fleet)
    await fleet.stop()
    fleet.coordinator.say(fleet.state(phase=admin_pb2.DEPLOYMENT_PHASE_PREPARING, message="laptop: 10 of 20 MB"))
    await fleet.start()
    body = await fleet.readyz(503, lambda found: found["deployments"])
    assert body["deployments"][0]["phase"] == "preparing"
    assert "10 of 20 MB" in body["deployments"][0]["message"]
    with pytest.raises(openai.InternalServerError, match=r"preparing.*10 of 20 MB") as raised:
        await ask(fleet)
    assert raised.value.status_code == 503
    assert raised.value.response.headers["retry-after"] == "1"
    fleet.coordinator.say(fleet.state())
    body = await fleet.readyz(200)
    assert body["ready"] is True
    assert await ask(fleet) == "hello"
    fleet.coordinator.say()
    await fleet.readyz(200, lambda found: not found["deployments"])


async def test_new_plan_ends_the_sessions_of_the_old_one(fleet: Any) -> None:
    """The lead says nothing any more (a frozen device): the client hears of it as soon as the coordinator says so."""
    fleet.coordinator.say(fleet.state())
    await fleet.start()
    await fleet.readyz(200)
    fleet.agent.script = fleet.scripts["stalling"](b"hel")
    async with client(fleet) as ai:
        stream = await ai.chat.completions.create(model="tiny", messages=ASK, stream=True)
        whole = asyncio.create_task(ask(fleet))
        await fleet.until(lambda: fleet.agent.open == 2)
        fleet.coordinator.say(fleet.state(phase=admin_pb2.DEPLOYMENT_PHASE_REPLANNING, message="desk lost"))
        with pytest.raises(openai.APIError, match="planned anew") as raised:
            async for _ in stream:
                pass
        assert raised.value.code == "device_lost"
        with pytest.raises(openai.InternalServerError, match="planned anew"):
            await whole
        await fleet.until(lambda: fleet.agent.open == 0)
        body = await fleet.readyz(503)
        assert body["deployments"][0]["phase"] == "replanning"
        with pytest.raises(openai.InternalServerError, match=r"planned again after a device was lost.*desk lost"):
            await ask(fleet)
    fleet.agent.script = fleet.scripts["saying"]("again")
    fleet.coordinator.say(fleet.state(epoch=2))
    await fleet.readyz(200)
    assert await ask(fleet) == "again"


async def test_coordinator_away_and_back(fleet: Any) -> None:
    fleet.coordinator.say(fleet.state())
    await fleet.start()
    await fleet.readyz(200)
    await fleet.coordinator.stop()
    body = await fleet.readyz(200, lambda found: not found["coordinator"]["connected"])
    assert str(fleet.coordinator.port) in body["coordinator"]["message"]
    assert await ask(fleet) == "hello"
    fleet.coordinator.say(fleet.state("org/bare"))
    await fleet.coordinator.start()
    body = await fleet.readyz(200, lambda found: found["coordinator"]["connected"])
    assert [row["model"] for row in body["deployments"]] == ["org/bare"]


async def test_lead_that_cannot_be_reached(fleet: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    lead = identity_pb2.Peer(record=fleet.agent.identity.record, address=f"127.0.0.1:{port}", name="gone")
    fleet.coordinator.say(fleet.state(lead=lead))
    await fleet.start()
    await fleet.readyz(200)
    with pytest.raises(openai.InternalServerError, match=str(port)) as raised:
        await ask(fleet)
    assert raised.value.status_code == 503


# --- tokenizer files


async def test_tokenizer_is_kept(fleet: Any) -> None:
    fleet.coordinator.say(fleet.state())
    await fleet.start()
    await fleet.readyz(200)
    fetched = fleet.agent.fetches
    assert fetched == 2
    await fleet.stop()
    kept = sorted(path.name for path in (fleet.home.path / "tokenizers").glob("*/*"))
    assert kept == ["tokenizer.json", "tokenizer_config.json", "tried-1"]
    file = next((fleet.home.path / "tokenizers").glob("*/tokenizer.json"))
    file.write_bytes(file.read_bytes() + b" ")  # bit rot
    await fleet.start()
    await fleet.readyz(200)
    assert fleet.agent.fetches == fetched + 1
    assert await ask(fleet) == "hello"


async def test_foreign_bytes_are_not_a_tokenizer(fleet: Any) -> None:
    right = dict(fleet.agent.pieces)
    for change in (lambda content: content[:-1], lambda content: content + b" ", lambda content: b"x" * len(content)):
        fleet.agent.pieces.update({name: change(content) for name, content in right.items()})
        fleet.coordinator.say(fleet.state())
        await fleet.start()
        with pytest.raises(openai.InternalServerError, match=r"cannot be fetched.*not tokenizer\.json"):
            await ask_when_known(fleet)
        await fleet.readyz(503, lambda found: "tokenizer" in found["deployments"][0]["message"])
        await fleet.stop()
    assert not list((fleet.home.path / "tokenizers").glob("*/*"))
    fleet.agent.pieces.update(right)
    fleet.coordinator.say(fleet.state())
    await fleet.start()
    await fleet.readyz(200)


async def ask_when_known(fleet: Any) -> None:
    await fleet.readyz(503, lambda found: found["deployments"])
    await ask(fleet)


# --- start and end


async def test_port_in_use(fleet: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Conflict, match=rf"{port}.*--port"):
            await fleet.start(port=port)
    with pytest.raises(InvalidRequest, match="--port"):
        await fleet.start(port=70000)


async def test_home_in_use_and_not_enrolled(fleet: Any, tmp_path: Path) -> None:
    await fleet.start()
    with pytest.raises(Conflict, match=str(os.getpid())):
        await run_gateway(fleet.home, port=0)
    with pytest.raises(NotFound):
        await run_gateway(Home(tmp_path / "empty"), port=0)
    agent = Home(tmp_path / "agent")
    fleet.world.node(Role.AGENT).save(agent.identity)
    with pytest.raises(PermissionDenied, match="role gateway"):
        await run_gateway(agent, port=0)


async def test_stop_lets_answers_finish_and_leaves_nothing(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ganglion.gateway.serve.DRAIN_S", 0.5)
    fleet.coordinator.say(fleet.state())
    listening = await fleet.start()
    await fleet.readyz(200)
    assert await ask(fleet) == "hello"
    fleet.agent.script = fleet.scripts["stalling"](b"hel")
    async with client(fleet) as ai:
        stream = await ai.chat.completions.create(model="tiny", messages=ASK, stream=True)
        stopping = asyncio.create_task(fleet.stop())
        with pytest.raises(openai.APIError, match="stopping"):
            async for _ in stream:
                pass
    await stopping
    with pytest.raises(ConnectionRefusedError), contextlib.closing(socket.socket()) as probe:
        probe.connect(("127.0.0.1", listening.port))
    await fleet.until(lambda: fleet.agent.open == 0)
    # the shared gateway's child, when it runs, is the only one
    assert sum("template_child" in " ".join(child.cmdline()) for child in psutil.Process().children()) <= 1
    with fleet.home.lock():
        pass


# --- what is seen from outside


async def test_metrics(api: Any) -> None:
    assert await ask(api) == "hello"
    async with httpx.AsyncClient() as http:
        await http.get(f"{api.base}/nothing/{'x' * 50}")
        answer = await http.get(f"{api.base}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    for line in (
        'ganglion_gateway_requests_total{code="200",route="/v1/chat/completions"}',
        'ganglion_gateway_requests_total{code="404",route="other"}',
        "ganglion_gateway_completion_tokens_total",
        "ganglion_gateway_prompt_tokens_total",
        "ganglion_gateway_ttft_seconds_bucket",
        "ganglion_gateway_tpot_seconds_count",
        "ganglion_gateway_sessions 0.0",
        'http_body_bytes="8388608"',
    ):
        assert line in text
    assert "xxxxx" not in text


async def test_c5_slow_reader_is_cut(api: Any) -> None:
    """A client that never reads: its generation is cancelled once 256 events wait for it."""
    api.agent.script = api.scripts["talking_for_ever"](16, b"01", top=20)
    body = b'{"model": "tiny", "prompt": "x", "stream": true, "max_tokens": 200, "logprobs": 20}'
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{api.listening.port}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", api.listening.port))
        await loop.sock_sendall(slow, head.encode() + body)
        await api.next_end()
        assert api.agent.open == 0
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(f"{api.base}/metrics")).text
    assert 'ganglion_gateway_sessions_cancelled_total{reason="left"}' in metrics


async def test_no_text_in_logs(api: Any, caplog: pytest.LogCaptureFixture) -> None:
    """At every level, on success and on every kind of failure; and the log is not simply off."""
    canary, answer = "canary-of-a-prompt-7351", "canary-of-an-answer-1537"
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.INFO)
    async with client(api) as ai:
        caplog.clear()
        api.agent.script = api.scripts["saying"](answer)
        talk = [{"role": "user", "content": canary}]
        await ai.chat.completions.create(model="tiny", messages=talk)  # type: ignore[arg-type]
        bodies: list[dict[str, Any]] = [
            {"model": "tiny", "messages": talk, "stream": True},
            {"model": "tiny", "messages": talk, "n": 2},
            {"model": canary, "messages": talk},
            {"model": "tiny", "messages": [{"role": canary, "content": canary}]},
            {"model": "tiny", "messages": [{"role": "user", "content": canary * 100}]},
            {"model": "tiny", "messages": talk, canary: 1},
        ]
        async with httpx.AsyncClient() as http:
            for body in bodies:
                await http.post(f"{api.url}/chat/completions", json=body)
            content = f'{{"model": "{canary}", '.encode()
            await http.post(f"{api.url}/completions", content=content, headers={"content-type": "application/json"})
            api.agent.script = api.scripts["failing"](RuntimeError("broken"), answer.encode())
            await http.post(f"{api.url}/chat/completions", json=bodies[0])
            await http.get(f"{api.base}/{canary}")
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))]
    assert any(record.name.startswith("ganglion.gateway") for record in ours)
    seen = "\n".join(logging.Formatter("%(message)s").format(record) for record in ours)
    assert canary not in seen
    assert answer not in seen


async def test_defects_are_logged_without_their_text(
    api: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)

    def broken(*_: Any) -> None:
        raise RuntimeError("-".join(("canary", "7351")))  # the line of code itself may be logged

    monkeypatch.setattr("ganglion.gateway.preparing.chat_variables", broken)
    with pytest.raises(openai.InternalServerError, match="internal error"):
        await ask(api)
    seen = "\n".join(logging.Formatter("%(message)s").format(record) for record in caplog.records)
    assert "RuntimeError" in seen
    assert "preparing.py" in seen
    assert "canary-7351" not in seen
