"""A gateway before a fake fleet: a coordinator that says what a test wants, and a lead that plays a script.

Between them are the real mutual TLS, signed records, piece service and sealed sessions of `ganglion.wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from ganglion.gateway import Listening, run_gateway
from ganglion.proto import admin_pb2, admin_pb2_grpc, identity_pb2, lane_pb2, pieces_pb2, pieces_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.certificates import COORDINATOR_NAME, certificate_names
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity, NodeKeys, OwnerKey, Role, TrustLabel, make_record, verify_record
from ganglion.wire.nouns import (
    Embedding,
    Geometry,
    Manifest,
    NumericClass,
    PieceRef,
    Plan,
    Range,
    Segment,
    Share,
    Stage,
    digest,
    to_json,
)
from ganglion.wire.session_serving import Said, SessionServicer

DER = serialization.Encoding.DER
DAY = datetime.timedelta(days=1)
DEADLINE_S = 15.0
CONTEXT = 256
BOS, EOS = 256, 257
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HERE = Path(__file__).parent
Script = Callable[[lane_pb2.Open], AsyncGenerator[lane_pb2.SessionEvent, None]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every asynchronous test of this folder shares the loop in which the shared gateway lives."""
    for item in items:
        if item.path.is_relative_to(HERE) and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


# --- identities


@dataclass
class World:
    """An owner and an authority that issues to anyone."""

    owner: OwnerKey = field(default_factory=OwnerKey.generate)
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ganglion authority")])
        basic = x509.BasicConstraints(ca=True, path_length=0)
        self.authority = self._builder(self.name, self.key.public_key()).add_extension(basic, critical=True)
        self.authority = self.authority.sign(self.key, hashes.SHA256())

    def _builder(self, subject: x509.Name, public_key: Any) -> Any:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
        )

    def node(self, role: Role, *, label: TrustLabel = TrustLabel.OWNER, coordinator: str = "127.0.0.1:1") -> Identity:
        keys = NodeKeys.generate()
        names = certificate_names(keys.node_id, role)
        if role is Role.COORDINATOR:
            names = tuple(dict.fromkeys((*names, COORDINATOR_NAME)))
        alternative = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
        certificate = self._builder(subject, keys.tls_private_key.public_key())
        certificate = certificate.add_extension(alternative, critical=False).sign(self.key, hashes.SHA256())
        return Identity.of_der(
            keys,
            self.owner.sign_record(make_record(keys, role, label)),
            self.owner.public_key,
            certificate=certificate.public_bytes(DER),
            authority=self.authority.public_bytes(DER),
            name=f"{role}-node",
            coordinator=coordinator,
        )


# --- a model of bytes


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes; `<s>` (256) is put in front of texts, `</s>` is 257; 258 and 259 are two bytes each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)
    vocabulary = {character: at for at, character in enumerate(alphabet)}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "ab": 258, "cd": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("c", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def _byte_of(character: str) -> int:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return table[character]


def tokenizer_files(*, template: str | None = TEMPLATE) -> dict[str, bytes]:
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    if template is not None:
        config["chat_template"] = template
    return {"tokenizer.json": byte_tokenizer().to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def piece(content: bytes) -> PieceRef:
    return PieceRef(hashlib.sha256(content).hexdigest(), len(content))


NUMERIC = NumericClass(format="fp32", block=0, exact=True)


def manifest_of(name: str, files: dict[str, bytes], *, vocab: int = 260, context: int = CONTEXT) -> Manifest:
    nothing = piece(b"")
    geometry = Geometry(
        hidden=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        intermediate=16,
        vocab=vocab,
        context=context,
        head_groups=1,
        column_groups=1,
        vocab_groups=1,
        vocab_group_rows=vocab,
    )
    return Manifest(
        format_version=3,
        name=name,
        family="llama",
        source_digest=nothing.digest,
        numeric_class=NUMERIC,
        opset=21,
        geometry=geometry,
        layers=(),
        head=Segment(kind="head", axis="columns", groups=1, slots=()),
        embedding=Embedding(dtype="float32", pieces=()),
        ropes={},
        handover="sum",
        graphs={},
        tokenizer={file: piece(content) for file, content in files.items()},
        bos_id=BOS,
        eos_ids=(EOS,),
        parameters=1,
    )


# --- scripts of a lead


def accepted() -> lane_pb2.SessionEvent:
    return lane_pb2.SessionEvent(accepted=lane_pb2.Accepted(numeric_class="fp32-exact on test"))


def tokens(*ids: int, logprobs: bool = False) -> lane_pb2.SessionEvent:
    made = []
    for token in ids:
        top = [lane_pb2.TokenLogprob(id=token, logprob=-0.5), lane_pb2.TokenLogprob(id=(token + 1) % 256, logprob=-1.5)]
        made.append(lane_pb2.Token(id=token, logprob=-0.5, top=top) if logprobs else lane_pb2.Token(id=token))
    return lane_pb2.SessionEvent(tokens=lane_pb2.Tokens(tokens=made))


def finished(
    request: lane_pb2.Open, drawn: int, reason: int = lane_pb2.FINISH_REASON_STOP, cached: int = 0
) -> lane_pb2.SessionEvent:
    done = lane_pb2.Finished(
        reason=reason,  # type: ignore[arg-type]
        prompt_tokens=len(request.prompt),
        completion_tokens=drawn,
        cached_tokens=cached,
    )
    return lane_pb2.SessionEvent(finished=done)


def saying(text: str | bytes, *, a_time: int = 1) -> Script:
    """A lead that says `text`, byte by byte, then its stop id; max_tokens is obeyed."""
    content = text.encode() if isinstance(text, str) else text

    async def script(request: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        yield accepted()
        said = list(content)[: request.max_tokens]
        for at in range(0, len(said), a_time):
            yield tokens(*said[at : at + a_time], logprobs=request.sampling.top_logprobs >= 0)
        if len(said) < len(content):
            yield finished(request, len(said), lane_pb2.FINISH_REASON_LENGTH)
        else:
            yield tokens(EOS)
            yield finished(request, len(said) + 1)

    return script


def talking_for_ever(a_time: int = 1, text: bytes = b"x", top: int = 0) -> Script:
    """Without end; with `top` alternatives a token, which make large events."""
    said = tokens(*(text * a_time))
    for token in said.tokens.tokens if top else ():
        token.logprob = -1.0
        token.top.extend(lane_pb2.TokenLogprob(id=other, logprob=-1.0 / 3) for other in range(65, 65 + top))

    async def script(_: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        yield accepted()
        while True:
            yield said
            await asyncio.sleep(0)

    return script


def stalling(after: bytes = b"") -> Script:
    async def script(_: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        yield accepted()
        if after:
            yield tokens(*after)
        await asyncio.Event().wait()

    return script


def failing(error: Exception, after: bytes | None = None) -> Script:
    """Fails before anything (None), or after some tokens."""

    async def script(_: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        if after is not None:
            yield accepted()
            yield tokens(*after)
        raise error

    return script


SCRIPTS = {
    "saying": saying,
    "talking_for_ever": talking_for_ever,
    "stalling": stalling,
    "failing": failing,
}


# --- the fleet


class Agent(pieces_pb2_grpc.PiecesServicer):
    """Lead and holder in one: plays `script`, serves `pieces`."""

    def __init__(self, identity: Identity, gateway: Identity, pieces: dict[str, bytes]) -> None:
        self.identity = identity
        self.pieces = pieces
        self.fetches = 0
        self.script: Script = saying("hello")
        self.requests: list[lane_pb2.Open] = []
        self.open = 0
        self.ended: asyncio.Queue[str] = asyncio.Queue()  # request ids of sessions that are over, however
        self.key = ("d1", 1)
        record = verify_record(gateway.record, identity.owner_public_key)
        agents = frozenset({Role.GATEWAY})
        names = ("Session/Run", "Pieces/Greet", "Pieces/Fetch")
        self.bound = rpc.server(
            identity,
            bind="127.0.0.1",
            port=0,
            what="port",
            knob="none",
            allowed={f"/ganglion.v1.{name}": agents for name in names},
        )
        SessionServicer(identity, lambda *_: record, self._session).add_to(self.bound.server)
        pieces_pb2_grpc.add_PiecesServicer_to_server(self, self.bound.server)

    @property
    def peer(self) -> identity_pb2.Peer:
        return identity_pb2.Peer(record=self.identity.record, address=self.bound.address, name="fake-lead")

    async def _session(
        self, request: lane_pb2.Open, _gateway: str, _said: Said
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        self.requests.append(request)
        self.open += 1
        try:
            async with contextlib.aclosing(self.script(request)) as events:
                async for event in events:
                    yield event
        finally:
            self.open -= 1
            self.ended.put_nowait(request.request_id)

    async def Greet(self, *_: Any) -> identity_pb2.Hello:  # noqa: N802
        return rpc.hello()

    async def Fetch(  # noqa: N802
        self, request: pieces_pb2.FetchRequest, _: Any
    ) -> AsyncIterator[pieces_pb2.Chunk]:
        self.fetches += 1
        content = self.pieces[request.digest]
        for at in range(0, len(content), 1 << 20):
            yield pieces_pb2.Chunk(data=content[at : at + (1 << 20)])


class Coordinator(admin_pb2_grpc.AdminServicer):
    """Says `fleet` to whoever watches, again at every `say`."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.fleet = admin_pb2.Fleetwide()
        self._watchers: set[asyncio.Queue[admin_pb2.Fleetwide]] = set()
        self.selecting: Callable[[admin_pb2.Budget], admin_pb2.Selection] = lambda _: admin_pb2.Selection()
        self.asked: list[admin_pb2.Budget] = []
        self.reports: list[admin_pb2.OutcomeReport] = []
        self.port = 0
        self.bound: rpc.BoundServer | None = None

    async def start(self) -> None:
        names = ("Admin/Greet", "Admin/Watch", "Admin/Select", "Admin/Report")
        roles = frozenset({Role.GATEWAY})
        self.bound = rpc.server(
            self.identity,
            bind="127.0.0.1",
            port=self.port,
            what="port",
            knob="none",
            allowed={f"/ganglion.v1.{name}": roles for name in names},
        )
        self.port = self.bound.port
        admin_pb2_grpc.add_AdminServicer_to_server(self, self.bound.server)
        await self.bound.start()

    async def stop(self) -> None:
        assert self.bound is not None
        await self.bound.stop()

    def say(self, *states: admin_pb2.DeploymentState, **more: Any) -> None:
        self.fleet = admin_pb2.Fleetwide(deployments=states, **more)
        for watcher in self._watchers:
            watcher.put_nowait(self.fleet)

    async def Greet(self, *_: Any) -> identity_pb2.Hello:  # noqa: N802
        return rpc.hello()

    async def Select(self, request: admin_pb2.SelectRequest, _: Any) -> admin_pb2.Selection:  # noqa: N802
        self.asked.append(request.budget)
        return self.selecting(request.budget)

    async def Report(self, request: admin_pb2.OutcomeReport, _: Any) -> admin_pb2.ReportReply:  # noqa: N802
        self.reports.append(request)
        return admin_pb2.ReportReply()

    async def Watch(self, *_: Any) -> AsyncIterator[admin_pb2.Fleetwide]:  # noqa: N802
        queue: asyncio.Queue[admin_pb2.Fleetwide] = asyncio.Queue()
        queue.put_nowait(self.fleet)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)


@dataclass
class Fleet:
    """Everything around a gateway, and the gateway when `start` was called."""

    world: World
    home: Home
    coordinator: Coordinator
    agent: Agent
    manifests: dict[str, Manifest]
    scripts: dict[str, Any] = field(default_factory=lambda: SCRIPTS)
    accepted = staticmethod(accepted)
    tokens = staticmethod(tokens)
    finished = staticmethod(finished)
    listening: Listening | None = None
    running: asyncio.Task[None] | None = None

    def add_model(self, name: str, files: dict[str, bytes], *, vocab: int, context: int) -> None:
        self.agent.pieces |= {piece(content).digest: content for content in files.values()}
        self.manifests[name] = manifest_of(name, files, vocab=vocab, context=context)

    def state(self, model: str = "tiny", **changes: Any) -> admin_pb2.DeploymentState:
        manifest = self.manifests[model]
        node = self.agent.identity.node_id
        share = Share(device=node, heads=Range(0, 1), columns=Range(0, 1), vocab=Range(0, 1))
        plan = Plan(
            manifest_digest=digest(manifest),
            numeric_class=NUMERIC,
            context=manifest.geometry.context,
            sessions=4,
            kv_tokens=4 * 8192,
            chunk=64,
            stages=(Stage(layers=Range(0, 1), shares=(share,), topology="mesh"),),
            threads={node: 1},
        )
        state = admin_pb2.DeploymentState(
            deployment=f"d-{model}",
            model=model,
            manifest_digest=digest(manifest),
            epoch=1,
            phase=admin_pb2.DEPLOYMENT_PHASE_READY,
            plan=to_json(plan),
            manifest=to_json(manifest),
            lead=self.agent.peer,
            holders=[self.agent.peer],
        )
        for name, value in changes.items():
            if value is None:
                state.ClearField(name)  # type: ignore[arg-type]
            elif name == "lead":
                state.lead.CopyFrom(value)
            else:
                setattr(state, name, value)
        return state

    @property
    def url(self) -> str:
        assert self.listening is not None
        return self.listening.url

    @property
    def base(self) -> str:
        return self.url.removesuffix("/v1")

    async def start(self, **options: Any) -> Listening:
        opened: asyncio.Future[Listening] = asyncio.get_running_loop().create_future()
        options = {"port": 0, "coordinator": f"127.0.0.1:{self.coordinator.port}"} | options
        self.running = asyncio.create_task(run_gateway(self.home, ready=opened.set_result, **options))
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.wait({opened, self.running}, return_when=asyncio.FIRST_COMPLETED)
            if not opened.done():
                await self.running
        self.listening = replace(opened.result())
        return self.listening

    async def stop(self) -> None:
        if self.running is not None:
            self.running.cancel()
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.gather(self.running, return_exceptions=True)
            self.running = None

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def readyz(self, status: int, condition: Callable[[dict[str, Any]], Any] = lambda _: True) -> dict[str, Any]:
        """What /readyz says once its status is `status` and `condition` holds of it."""
        async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient() as client:
            while True:
                answer = await client.get(f"{self.base}/readyz")
                found: dict[str, Any] = answer.json()
                if answer.status_code == status and condition(found):
                    return found
                await asyncio.sleep(0.02)

    async def next_end(self) -> str:
        async with asyncio.timeout(DEADLINE_S):
            return await self.agent.ended.get()

    async def quiet(self) -> None:
        """No session is open at the lead; ends that were seen are forgotten."""
        await self.until(lambda: self.agent.open == 0)
        while not self.agent.ended.empty():
            self.agent.ended.get_nowait()
        self.agent.requests.clear()


@contextlib.asynccontextmanager
async def fleet_in(folder: Path) -> AsyncIterator[Fleet]:
    world = World()
    coordinator = Coordinator(world.node(Role.COORDINATOR))
    gateway = world.node(Role.GATEWAY)
    home = Home(folder / "gateway")
    gateway.save(home.identity)
    plain, bare = tokenizer_files(), tokenizer_files(template=None)
    pieces = {piece(content).digest: content for files in (plain, bare) for content in files.values()}
    agent = Agent(world.node(Role.AGENT), gateway, pieces)
    manifests = {"tiny": manifest_of("tiny", plain), "org/bare": manifest_of("org/bare", bare)}
    fleet = Fleet(world, home, coordinator, agent, manifests)
    await coordinator.start()
    await agent.bound.start()
    try:
        yield fleet
    finally:
        await fleet.stop()
        await agent.bound.stop()
        await coordinator.stop()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One ready gateway for every test of the HTTP surface."""
    async with fleet_in(tmp_path_factory.mktemp("shared")) as fleet:
        fleet.coordinator.say(fleet.state("tiny"), fleet.state("org/bare"))
        await fleet.start()
        await fleet.readyz(200)
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def api(shared: Fleet) -> AsyncIterator[Fleet]:
    """The shared gateway, quiet before and after."""
    await shared.quiet()
    shared.agent.script = saying("hello")
    yield shared
    await shared.quiet()


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A fleet of a test's own; its gateway is not started."""
    async with fleet_in(tmp_path) as made:
        yield made


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_world() -> Callable[[], World]:
    return World


@pytest.fixture(scope="session")
def make_fleet() -> Callable[[Path], contextlib.AbstractAsyncContextManager[Fleet]]:
    return fleet_in
