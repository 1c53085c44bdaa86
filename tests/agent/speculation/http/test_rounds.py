"""The dialect of rounds: tokens are the model's own whatever is drafted, repeated, forgotten or killed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_llama
from verifier_replicas import Device, Process, Router

from ganglion.agent.speculation.contract import draws_as, tokenizer_digest
from ganglion.agent.speculation.guesser import Lookup
from ganglion.agent.speculation.http.client import Timeouts
from ganglion.agent.speculation.http.replica import Replica, ReplicaOptions
from ganglion.agent.speculation.http.rounds import RoundVerifier, round_base
from ganglion.agent.speculation.hybrid import Hybrid, Policy, Target
from ganglion.agent.speculation.pilot import MODES
from ganglion.agent.store import ManifestShelf, PieceStore
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.proto import lane_pb2
from ganglion.wire.errors import Exhausted, InvalidRequest, ProtocolViolation, Unauthenticated, Unavailable, Unsupported
from ganglion.wire.nouns import Manifest, digest
from ganglion.wire.prefixes import Prefix

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
COUNT = 40
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.0, "seed": 4, "top_p": 0.9, "presence_penalty": 0.6, "top_logprobs": 2},
]


@pytest.fixture(autouse=True)
def _wide_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pays is another test's subject: here windows are as long as they may be."""
    monkeypatch.setattr("ganglion.agent.speculation.window.best_window", lambda *_, most, **__: most)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verifier")
    path = make_llama(folder / "checkpoint", num_key_value_heads=4, max_position_embeddings=512)
    pieces = PieceStore(folder / "store")
    manifest = partition(path, pieces, name="tiny", numeric_class=numeric_class(path, "fp32"))
    ManifestShelf(folder / "store").put(manifest)
    return folder / "store"


@pytest.fixture(scope="module")
def manifest(store: Path) -> Manifest:
    shelf = ManifestShelf(store)
    (name,) = shelf.digests()
    return shelf.get(name)


@pytest.fixture
async def replica(store: Path) -> AsyncIterator[Replica]:
    made = await asyncio.to_thread(Replica, ReplicaOptions(store=store, model="tiny", threads=1, sessions=2))
    made.start()
    yield made
    await made.close()


async def alone(replica: Replica, prompt: list[int], **sampling: Any) -> list[int]:
    """What the model draws by itself: no contract, no windows."""
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
    wanted = lane_pb2.Open(prompt=prompt, max_tokens=COUNT, sampling=lane_pb2.Sampling(**described))
    said = replica._lead.serve(wanted, "alone", None)  # type: ignore[arg-type]
    return [token.id async for event in said for token in event.tokens.tokens]


class Wire:
    """A `HttpClient` in front of a `RoundServer` of the same process; `before` may lose a request or its answer."""

    where = "the wire"

    def __init__(self, server: Any, before: Callable[[dict[str, Any]], str] = lambda document: "") -> None:
        self.server, self.before = server, before
        self.sent_bytes = self.received_bytes = 0
        self.facts: list[str] = []  # where they were asked

    async def get(self, path: str, **_: Any) -> Any:
        self.facts.append(path)
        if self.server is None:
            raise Unavailable("the request was lost")
        status, answer = self.server.facts("Bearer secret")
        assert status == 200
        return json.loads(answer)

    async def post(self, path: str, document: dict[str, Any], **_: Any) -> Any:
        what = self.before(document)
        if what == "request":
            raise Unavailable("the request was lost")
        body = json.dumps(document).encode()
        status, answer = await self.server.answer(body, "Bearer secret")
        self.sent_bytes, self.received_bytes = self.sent_bytes + len(body), self.received_bytes + len(answer)
        if what == "answer":
            raise Unavailable("the answer was lost")
        if status != 200:
            kinds = {400: InvalidRequest, 401: Unauthenticated, 429: Exhausted, 502: ProtocolViolation}
            raise kinds.get(status, Unavailable)(json.loads(answer)["error"]["message"])
        return json.loads(answer)


def verifier_of(wire: Any, patience_s: float = 5.0) -> RoundVerifier:
    verifier = RoundVerifier("http://127.0.0.1:1", patience_s=patience_s)
    verifier._client = wire
    return verifier


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("wrong", [0, 3])
async def test_tokens_are_the_models_own(replica, manifest, sampling, wrong):
    true = await alone(replica, PROMPT, **sampling)
    assert len(set(true)) > 5
    wire = Wire(replica.rounds)
    found, finished, stream = await Device(manifest, true, wrong).tokens(verifier_of(wire), PROMPT, **sampling)
    assert found == true
    spoken = finished.speculation
    assert (finished.completion_tokens, finished.prompt_tokens) == (COUNT, len(PROMPT))
    assert spoken.accepted == COUNT - spoken.passes > COUNT // 2
    assert sum(spoken.accepted_counts) == spoken.passes
    assert (stream.travelled.begun, stream.travelled.replicas) == (1, (replica.name,))
    assert spoken.sent_bytes > 0


async def test_without_drafts_it_is_one_token_a_round(replica, manifest):
    true = await alone(replica, PROMPT)
    verifier = verifier_of(Wire(replica.rounds))
    device = Device(manifest, true)
    device._drafts = lambda round_, prefix, at: lane_pb2.Drafts(round=round_, miss=lane_pb2.MISS_RUN)  # type: ignore[method-assign]
    found, finished, _ = await device.tokens(verifier, PROMPT)
    assert found == true
    assert finished.speculation.drafted == 0


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_rounds_may_be_lost_and_repeated(replica, manifest, lost):
    true = await alone(replica, PROMPT, temperature=0.9, seed=1)
    rounds = 0

    def before(document: dict[str, Any]) -> str:
        nonlocal rounds
        rounds += 1
        return lost if rounds % 3 == 0 else ""

    found, _, stream = await Device(manifest, true).tokens(
        verifier_of(Wire(replica.rounds, before)), PROMPT, temperature=0.9, seed=1
    )
    assert found == true
    assert stream.travelled.lost >= 3


async def test_the_same_round_twice_side_by_side(replica, manifest):
    true = await alone(replica, PROMPT)
    wire = Wire(replica.rounds)
    post = wire.post

    async def twice(path: str, document: dict[str, Any], **more: Any) -> Any:
        first, second = await asyncio.gather(
            post(path, document, **more), post(path, document, **more), return_exceptions=True
        )
        found = second if isinstance(first, BaseException) else first
        if isinstance(found, BaseException):
            raise found
        return found

    wire.post = twice  # type: ignore[method-assign]
    found, _, _ = await Device(manifest, true).tokens(verifier_of(wire), PROMPT)
    assert found == true
    assert replica.rounds.sessions <= 1
    assert len(replica._lead._sessions) <= 1


async def test_more_sessions_than_are_kept_wait_for_one_another(replica, manifest):
    true = await alone(replica, PROMPT)
    verifier, device = verifier_of(Wire(replica.rounds), patience_s=30.0), Device(manifest, true)
    assert [found for found, _, _ in await asyncio.gather(*(device.tokens(verifier, PROMPT) for _ in range(7)))] == (
        [true] * 7
    )


async def test_torch_verifies_too(store, manifest, replica):
    true = await alone(replica, PROMPT, temperature=0.7, seed=2)
    options = ReplicaOptions(store=store, model=manifest.name, executor="torch:cpu:fp32", threads=1)
    kept = await asyncio.to_thread(Replica, options)
    kept.start()
    try:
        found, _, stream = await Device(manifest, true).tokens(
            verifier_of(Wire(kept.rounds)), PROMPT, temperature=0.7, seed=2
        )
    finally:
        await kept.close()
    assert found == true
    assert stream.accepted.numeric_class == "fp32-fast@torch-cpu-fp32"


@pytest.mark.parametrize("executor", ["ort", "torch:cpu:fp32"])
async def test_a_device_that_knows_only_the_url(store, manifest, replica, executor):
    true = await alone(replica, PROMPT, temperature=0.8, seed=2)
    kept = await asyncio.to_thread(Replica, ReplicaOptions(store=store, model="tiny", executor=executor, threads=1))
    kept.start()
    geometry = manifest.geometry
    target = Target("big", "", "", tokenizer_digest(manifest), geometry.vocab, geometry.context)
    verifier = verifier_of(Wire(kept.rounds))
    hybrid = Hybrid(Lookup(), lambda: verifier, None, target, Policy(mode="sync"))
    sampling = lane_pb2.Sampling(temperature=0.8, seed=2, top_p=1.0, top_logprobs=-1)
    wanted = lane_pb2.Open(request_id="r", prompt=PROMPT, max_tokens=COUNT, sampling=sampling)
    try:
        events = [event async for event in hybrid.serve(wanted, "gateway")]
    finally:
        await hybrid.close()
        await kept.close()
    assert [token.id for event in events for token in event.tokens.tokens] == true
    assert events[0].accepted.numeric_class == kept.numeric_class
    assert kept.numeric_class.endswith("@torch-cpu-fp32") == (executor != "ort")


@pytest.mark.parametrize(("executor", "mode"), [*(("ort", mode) for mode in MODES), ("torch:cpu:fp32", None)])
async def test_a_device_drafts_in_every_mode(store, manifest, replica, mode, executor):
    true = await alone(replica, PROMPT, temperature=0.7, seed=2)
    options = ReplicaOptions(store=store, model=manifest.name, executor=executor, threads=1)
    kept = await asyncio.to_thread(Replica, options)
    kept.start()
    numeric, geometry = manifest.numeric_class.name, manifest.geometry
    target = Target("tiny", digest(manifest), numeric, tokenizer_digest(manifest), geometry.vocab, geometry.context)
    verifier = verifier_of(Wire(kept.rounds))
    hybrid = Hybrid(Lookup(), lambda: verifier, None, target, Policy(mode=mode))
    sampling = lane_pb2.Sampling(temperature=0.7, seed=2, top_p=1.0, top_logprobs=-1)
    wanted = lane_pb2.Open(request_id="r", prompt=PROMPT, max_tokens=COUNT, sampling=sampling)
    try:
        events = [event async for event in hybrid.serve(wanted, "gateway")]
    finally:
        await hybrid.close()
        await kept.close()
    assert [token.id for event in events for token in event.tokens.tokens] == true
    assert events[0].accepted.numeric_class == kept.numeric_class
    assert events[-1].finished.completion_tokens == COUNT


async def test_a_session_that_was_closed_for_others_goes_on(replica, manifest):
    true = await alone(replica, PROMPT)
    verifier = verifier_of(Wire(replica.rounds))
    device = Device(manifest, true)
    answers = await asyncio.gather(*(device.tokens(verifier, PROMPT) for _ in range(4)))  # it keeps two
    assert [found for found, _, _ in answers] == [true] * 4
    assert max(stream.travelled.begun for _, _, stream in answers) > 1
    assert replica.rounds.sessions <= 2


async def test_idle_sessions_are_forgotten(replica, manifest):
    now = 0.0
    replica.rounds._clock = lambda: now
    true = await alone(replica, PROMPT)

    async def later(found: int, stream: Any) -> None:
        nonlocal now
        now += 1000.0

    found, _, stream = await Device(manifest, true).tokens(verifier_of(Wire(replica.rounds)), PROMPT, later)
    assert found == true
    assert stream.travelled.begun >= stream._counts.passes


async def test_what_is_refused(replica, manifest):
    answer = replica.rounds.answer
    name = Prefix.of(PROMPT).name.hex()
    for body, said in (
        (b"{", "does not parse"),
        (b'{"session":"a","at":1,"prefix":"xyz"}', "prefix"),
        (b'{"session":"a","at":1,"prefix":"%s","more":1}' % name.encode(), "more"),
        (b'{"session":"a","at":21,"prefix":"%s","begin":{"prompt":"x"}}' % name.encode(), "begin is no Open"),
        (b'{"session":"a","at":21,"prefix":"%s","begin":{"prompt":[1]}}' % name.encode(), "no contract"),
    ):
        status, answered = await answer(body)
        assert status == 400
        assert said in json.loads(answered)["error"]["message"]
    status, answered = await answer(b'{"session":"a","at":21,"prefix":"%s","window":[]}' % name.encode())
    assert (status, json.loads(answered)["unknown"]) == (200, True)
    other = Device(manifest, [1] * COUNT)

    def changed(document: dict[str, Any]) -> str:
        document["begin"]["contract"]["vocab"] += 1
        return ""

    with pytest.raises(InvalidRequest, match="the device drafts for vocab"):
        await other.tokens(verifier_of(Wire(replica.rounds, changed)), PROMPT)


async def test_what_a_verifier_says_of_itself(replica, manifest):
    status, body = replica.rounds.facts()
    assert (status, json.loads(body)) == (
        200,
        {
            "model": "tiny",
            "manifest_digest": digest(manifest),
            "numeric_class": manifest.numeric_class.name,
            "tokenizer_digest": tokenizer_digest(manifest).hex(),
            "vocab": manifest.geometry.vocab,
            "context": 512,
            "eos_ids": list(manifest.eos_ids),
        },
    )


async def test_facts_are_asked_for_once_and_after_it_was_away(replica, manifest):
    true = await alone(replica, PROMPT)
    lost: list[str] = []
    wire = Wire(replica.rounds, lambda document: lost.pop() if lost else "")
    verifier, device = verifier_of(wire), Device(manifest, true)
    for _ in range(2):
        await device.tokens(verifier, PROMPT)
    assert wire.facts == ["/verify"]
    assert verifier.name == "tiny at the wire"

    async def lose(found: int, stream: Any) -> None:
        if found < COUNT // 2:
            lost[:] = ["request"]

    assert (await device.tokens(verifier, PROMPT, lose))[0] == true
    assert len(wire.facts) == 1
    await device.tokens(verifier, PROMPT)
    assert len(wire.facts) == 2


@pytest.mark.parametrize("field", ["vocab", "tokenizer_digest"])
async def test_ids_that_mean_something_else_are_refused_here(replica, manifest, field):
    wire = Wire(replica.rounds, lambda document: pytest.fail("a round was asked"))
    contract = lane_pb2.Contract(tokenizer_digest=tokenizer_digest(manifest), vocab=manifest.geometry.vocab)
    setattr(contract, field, manifest.geometry.vocab + 1 if field == "vocab" else bytes(32))
    with pytest.raises(Unsupported, match=f"drafts for {field} .*, the verifier tiny at the wire has") as refused:
        await verifier_of(wire).open(lane_pb2.Open(prompt=PROMPT, max_tokens=4, contract=contract))
    assert refused.value.param == f"contract.{field}"


async def test_another_model_than_is_meant_is_refused_there(replica, manifest):
    contract = lane_pb2.Contract(
        manifest_digest="0" * 64, tokenizer_digest=tokenizer_digest(manifest), vocab=manifest.geometry.vocab
    )
    with pytest.raises(InvalidRequest, match="drafts for manifest_digest 0000"):
        await verifier_of(Wire(replica.rounds)).open(lane_pb2.Open(prompt=PROMPT, max_tokens=4, contract=contract))


async def test_what_are_no_facts(replica):
    wire = Wire(replica.rounds)

    async def get(path: str, **_: Any) -> Any:
        return {"model": "tiny"}

    wire.get = get  # type: ignore[method-assign]
    with pytest.raises(ProtocolViolation, match=r"the wire: its answer is no Facts: .*manifest_digest"):
        await verifier_of(wire).facts()


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://127.0.0.1:8000/verify", "http://127.0.0.1:8000"),
        ("https://host/verifier/verify/", "https://host/verifier"),
        ("http://host:8000/v1", None),
        ("http://verify", None),
        ("http://host/prove?a=/verify", None),
        ("http://[/verify", None),
        ("", None),
    ],
)
def test_urls_of_rounds(url, base):
    assert round_base(url) == base


async def test_a_key_is_asked_for(store, manifest):
    kept = await asyncio.to_thread(Replica, ReplicaOptions(store=store, model="tiny", threads=1, key="secret"))
    kept.start()
    try:
        assert (await kept.rounds.answer(b"{}", "Bearer other"))[0] == 401
        assert (await kept.rounds.answer(b"{}", ""))[0] == 401
        assert (await kept.rounds.answer(b"{}", "Bearer secret"))[0] == 400
        assert [kept.rounds.facts(said)[0] for said in ("Bearer other", "", "Bearer secret")] == [401, 401, 200]
    finally:
        await kept.close()
    with pytest.raises(InvalidRequest, match=r"0 models of .* are 'other'; name one by its digest: tiny"):
        Replica(ReplicaOptions(store=store, model="other"))


async def test_a_verifier_that_stays_away_is_said(manifest):
    wire = Wire(None, lambda document: "request")
    with pytest.raises(Unavailable, match="the request was lost"):
        await Device(manifest, [1] * COUNT).tokens(verifier_of(wire, patience_s=0.3), PROMPT)


async def test_a_replica_is_killed_in_the_middle_of_an_answer(store, manifest, replica):
    true = await alone(replica, PROMPT, temperature=0.7, seed=9)
    replicas = await asyncio.gather(*(Process.start(store, "tiny") for _ in range(2)))
    try:
        async with Router(replicas) as router:
            verifier = RoundVerifier(f"http://127.0.0.1:{router.port}", timeouts=Timeouts(answer_s=20.0))
            killed: list[int] = []

            async def kill(found: int, stream: Any) -> None:
                if found > COUNT // 2 and not killed:
                    victim = router.chosen(stream._session)
                    killed.append(victim.port)
                    victim.process.kill()

            found, finished, stream = await Device(manifest, true).tokens(
                verifier, PROMPT, kill, temperature=0.7, seed=9
            )
            await verifier.close()
    finally:
        await asyncio.gather(*(one.end() for one in replicas))
    assert found == true
    assert finished.completion_tokens == COUNT
    (ports,) = router.seen.values()
    assert len(killed) == 1
    # Sticky: all rounds before the loss went to one replica, all after it to the other.
    changes = [port for port, before in zip(ports[1:], ports, strict=False) if port != before]
    assert ports[0] == killed[0]
    assert len(changes) == 1
    assert len(stream.travelled.replicas) == 2
    assert stream.travelled.begun >= 2


def test_classes_of_other_kernels():
    assert draws_as("int4-32-exact", "int4-32-exact")
    assert draws_as("int4-32-fast@torch-cuda-bf16", "int4-32-exact")
    assert draws_as("int4-32-fast@torch-cuda-bf16", "int4-32-fast")
    assert draws_as("int4-32-exact", "")
    assert not draws_as("int4-32-fast", "int4-32-exact")
    assert not draws_as("int4-64-fast@torch-cuda-bf16", "int4-32-fast")
