"""What a coordinator sees, what a lost device does, and how bad input is refused: on one running cluster."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from cluster import reference
from cluster.conftest import start_three
from cluster.detector import ID_ENCODINGS, TOLERANCE, encode_ids, leaks
from cluster.harness import Cluster, until
from openai import OpenAI

from ganglion.cli import views
from ganglion.cli.admin import admin
from ganglion.proto import identity_pb2
from ganglion.wire import rpc
from ganglion.wire.address import join_address
from ganglion.wire.hello import hello
from ganglion.wire.identity import Identity
from ganglion.wire.rpc import read_recording

PROMPT = "The quick brown fox keeps a secret from the coordinator"
TOKENS = 24


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file to which the coordinator's interceptor appends every message after TLS."""
    return tmp_path_factory.mktemp("recording") / "messages"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, recording: Path, checkpoint: Path) -> Iterator[Cluster]:
    """Three devices, the model `tiny` tensor parallel over two or three of them."""
    with Cluster(tmp_path_factory.mktemp("faults") / "cluster") as made:
        start_three(made, "--record", str(recording))
        made.cli("run", str(checkpoint), "--name", "tiny", "--mode", "tensor")
        yield made


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> reference.Answer:
    """The greedy answer of transformers."""
    return reference.answer(checkpoint, PROMPT, TOKENS)


def client_of(cluster: Cluster) -> OpenAI:
    return OpenAI(base_url=f"{cluster.api}/v1", api_key="none", max_retries=0)


def messages_since(recording: Path, count: int) -> list[tuple[str, str, bytes]]:
    return read_recording(recording)[count:]


def found_in(messages: list[tuple[str, str, bytes]], expected: reference.Answer) -> list[str]:
    data = b"\0\0".join(message for _, _, message in messages)
    return leaks(data, text=[PROMPT, expected.text], ids=[expected.prompt_ids, expected.ids], rows=expected.hidden)


def test_the_coordinator_sees_neither_text_nor_ids_nor_activations(
    running: Cluster, recording: Path, expected: reference.Answer
) -> None:
    before = len(read_recording(recording))
    with client_of(running) as client:
        done = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    assert done.choices[0].text == expected.text
    # Heartbeats after the request: what it left behind would be told in them.
    until("messages during the request", lambda: len(read_recording(recording)) > before + 12)
    messages = messages_since(recording, before)
    assert {direction for direction, _, _ in messages} >= {"in"}
    assert found_in(messages, expected) == []
    assert found_in(read_recording(recording), expected) == []


def test_a_variant_that_leaks_is_caught(running: Cluster, recording: Path, expected: reference.Answer) -> None:
    row = expected.hidden[len(expected.hidden) // 2]
    payloads = {"text": PROMPT[5:40].encode()}
    payloads |= {encoding: encode_ids(expected.ids[3:15], encoding) for encoding in ID_ENCODINGS}
    payloads |= {dtype: row.astype(dtype).tobytes() for dtype in TOLERANCE}
    for kind, payload in payloads.items():
        before = len(read_recording(recording))
        asyncio.run(leak_as_gateway(running, payload))
        caught = found_in(messages_since(recording, before), expected)
        assert kind in caught, f"{kind} leaked unseen"


async def leak_as_gateway(cluster: Cluster, payload: bytes) -> None:
    """Greet the coordinator with the gateway's certificate, the payload in a field that nobody knows."""
    identity = Identity.load(cluster.home / "gateway" / "identity")
    about = cluster.roles["coordinator"].about
    address = join_address("127.0.0.1", int(about["fleet_port"]))
    unknown = bytes([15 << 3 | 2]) + encode_ids([len(payload)], "varint") + payload
    async with rpc.channel(address, identity, peer="coordinator") as channel:
        greet: Any = channel.unary_unary(
            "/ganglion.v1.Admin/Greet",
            request_serializer=None,
            response_deserializer=identity_pb2.Hello.FromString,
        )
        await greet(hello().SerializeToString() + unknown, timeout=10)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_detector_knows_an_activation_from_another(dtype: str) -> None:
    rows = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    inside = b"abc" + rows[2].astype(dtype).tobytes() + b"x"
    assert leaks(inside, text=["nothing of this"], ids=[list(range(300, 320))], rows=rows) == [dtype]
    other = np.random.default_rng(2).standard_normal(64).astype(dtype).tobytes()
    assert leaks(other, text=["nothing of this"], ids=[list(range(300, 320))], rows=rows) == []


def test_an_unknown_model_is_named_with_those_there_are(running: Cluster) -> None:
    with client_of(running) as client, pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="absent", prompt="x")
    assert raised.value.code == "not_found"
    assert "tiny" in str(raised.value)
    done = running.run("run", "absent", "x")
    assert (done.returncode, done.stdout) == (3, "")
    assert "absent" in done.stderr
    assert "tiny" in done.stderr


def test_a_prompt_beyond_the_context_is_refused_with_its_figures(running: Cluster) -> None:
    with client_of(running) as client, pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="tiny", prompt="x" * 5000, max_tokens=5)
    assert raised.value.code == "context_length_exceeded"
    assert "4096" in str(raised.value)


def test_a_port_in_use_is_named_with_its_knob(running: Cluster, tmp_path: Path) -> None:
    about = running.roles["coordinator"].about
    other = ["--home", str(tmp_path / "other")]
    running.cli("owner", "init", *other)
    ports = ["--bind", "127.0.0.1", "--no-mdns", "--enrolment-port", "0", "--fleet-port", str(about["fleet_port"])]
    done = running.run("serve", "coordinator", *ports, *other)
    assert done.returncode == 5
    assert str(about["fleet_port"]) in done.stderr
    assert "--fleet-port" in done.stderr

    token = running.cli("token", "create", "--role", "gateway").strip()
    port = running.api.rsplit(":", 1)[1]
    done = running.run("serve", "gateway", "--token", token, "--port", port, *other)
    assert done.returncode == 5, done.stderr
    assert port in done.stderr
    assert "--port" in done.stderr


def test_a_coordinator_that_is_not_there_is_named_with_what_to_check(running: Cluster, tmp_path: Path) -> None:
    done = running.run("join", "--coordinator", "127.0.0.1:9", "--home", str(tmp_path / "elsewhere"))
    assert done.returncode == 7
    assert "127.0.0.1:9" in done.stderr
    assert "firewall" in done.stderr


def test_a_token_works_once_and_a_changed_one_not_at_all(running: Cluster, tmp_path: Path) -> None:
    used = next(row for row in running.json("token", "ls") if row["role"] == "agent" and row["state"] == "used")
    assert used["used"] == used["uses"] == 1
    token = running.cli("token", "create").strip()
    running.cli("token", "revoke", token)
    done = running.run("join", token, "--name", "late", "--home", str(tmp_path / "late"))
    assert done.returncode == 4, done.stderr
    middle = len(token) // 2
    changed = token[:middle] + ("A" if token[middle] != "A" else "B") + token[middle + 1 :]
    done = running.run("join", changed, "--name", "late", "--home", str(tmp_path / "late"))
    assert done.returncode == 2
    assert "damaged" in done.stderr


def test_ctrl_c_ends_an_answer_and_the_work_behind_it(running: Cluster) -> None:
    asking = running.begin("asking", "run", "tiny", "a", "--max-tokens", "4000", "--temperature", "0.7")
    until("the answer has begun", lambda: asking.log.stat().st_size > 0)
    until("the work is seen", lambda: running.deployment("tiny")["sessions"] == 1)
    asking.process.send_signal(signal.SIGINT)
    assert asking.process.wait(10) == 130
    assert "Traceback" not in asking.log.read_text(errors="replace")
    until("no session is left", lambda: running.deployment("tiny")["sessions"] == 0, timeout_s=5)


def test_a_device_without_a_token_waits_for_the_owner_and_can_be_shut_out(running: Cluster, tmp_path: Path) -> None:
    address = f"127.0.0.1:{running.roles['coordinator'].about['enrolment_port']}"
    elsewhere = ["--home", str(tmp_path / "elsewhere"), "--bind", "127.0.0.1", "--threads", "1"]
    guest = running.begin("guest", "join", "--coordinator", address, "--name", "guest", *elsewhere)

    def state() -> str:
        return next((str(row["state"]) for row in running.json("device", "ls") if row["name"] == "guest"), "absent")

    until("guest waits", lambda: state() == "pending")
    until("guest shows its fingerprint", lambda: "fingerprint of this device" in guest.log.read_text())
    shown = guest.log.read_text().split("fingerprint of this device")[1].splitlines()[0].strip()
    refused = running.run("device", "approve", "guest", "--fingerprint", "0000 " + shown[5:])
    assert refused.returncode == 4
    assert state() == "pending"

    running.cli("device", "approve", "guest", "--label", "friend", "--fingerprint", shown)
    until("guest is alive", lambda: state() == "alive")
    again = running.run("device", "approve", "guest")
    assert again.returncode == 5
    running.cli("device", "rename", "guest", "visitor")
    running.cli("device", "trust", "visitor", "stranger")
    row = next(row for row in running.json("device", "ls") if row["name"] == "visitor")
    assert row["label"] == "stranger"

    running.cli("device", "revoke", "visitor")
    assert until("the agent ends", lambda: guest.process.poll() is not None and str(guest.process.returncode)) == "4"
    assert "error:" in guest.log.read_text()
    until("visitor is out", lambda: "visitor" not in running.alive())


class Observer:
    """Everything that /readyz and the coordinator's watch (which `ps` shows) say while the block runs."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self.statuses: list[int] = []
        self.phases: list[str] = []
        self._cluster, self._model = cluster, model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Observer:
        self._thread.start()
        self._watching = [asyncio.run_coroutine_threadsafe(each, self._loop) for each in (self._poll(), self._watch())]
        until("the first look", lambda: self.statuses and self.phases)
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._watching:
            each.cancel()
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.1), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _poll(self) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                self.statuses.append((await client.get(f"{self._cluster.api}/readyz")).status_code)
                await asyncio.sleep(0.02)

    async def _watch(self) -> None:
        async with admin(self._cluster.home) as line, contextlib.aclosing(line.watch()) as states:
            async for state in states:
                self.phases += [views.phase(each.phase) for each in state.deployments if each.model == self._model]


def test_a_killed_device_ends_the_request_and_the_survivors_answer_the_next(
    running: Cluster, expected: reference.Answer
) -> None:
    deployed = running.deployment("tiny")
    # Any device but "one", where the model was cut: of its pieces there is no second copy. Often the lead.
    victim = next(shard["device"] for shard in deployed["shards"] if shard["device"] != "one")

    def answered() -> str | None:
        try:
            with client_of(running) as again:
                done = again.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
        except openai.APIError:
            return None
        return done.choices[0].text

    with Observer(running, "tiny") as observer, client_of(running) as client:
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 4000, "temperature": 0.7, "seed": 1}
        chunks = client.completions.create(**asked, stream=True)
        next(iter(chunks))
        running.roles[victim].kill()
        killed_s = time.monotonic()
        with pytest.raises(openai.APIError) as raised:  # fails when the answer is finished: then nothing was lost in it
            list(chunks)
        assert time.monotonic() - killed_s < 3.0
        assert until("an answer of the survivors", answered, timeout_s=60.0) == expected.text
        until("ready again", lambda: observer.statuses[-1] == 200 and observer.phases[-1] == "ready")
    body = raised.value.body
    assert isinstance(body, dict)
    assert body["code"] == "device_lost"
    assert body["message"]
    for said, fine in ((observer.statuses, 200), (observer.phases, "ready")):
        assert said[0] == said[-1] == fine
        assert set(said) != {fine}, "nobody was told that the deployment was not ready"
    assert 503 in observer.statuses
    assert "replanning" in observer.phases
    survivors = {shard["device"] for shard in running.deployment("tiny")["shards"]}
    assert survivors
    assert victim not in survivors


def test_a_record_that_the_owner_did_not_sign_is_refused_by_the_devices(running: Cluster, checkpoint: Path) -> None:
    """The last of this file: the coordinator is replaced by a dishonest one on the same ports and registry."""
    alive = running.alive()
    about = running.roles["coordinator"].about
    assert running.roles["coordinator"].stop() == 0
    running.forge_coordinator(int(about["fleet_port"]), int(about["enrolment_port"]))
    until("devices back", lambda: running.alive() == alive)
    names = ",".join(alive[:2])
    split = ["--mode", "tensor", "--devices", names, "--context", "64"]
    done = running.run("run", str(checkpoint), "--name", "forged", *split)
    assert done.returncode == 4, done.stderr + running.logs()
    assert "signature" in done.stderr
    assert running.deployment("forged")["phase"] != "ready"
