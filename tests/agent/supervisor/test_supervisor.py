"""The whole supervisor against a fleet server with real gRPC, real processes and a worker that computes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces
from ganglion.agent.store.service import ALLOWED, PieceService
from ganglion.agent.supervisor import run_agent
from ganglion.agent.supervisor_messages import Offer
from ganglion.agent.supervisor_orders import read_connect
from ganglion.proto import fleet_pb2, identity_pb2
from ganglion.wire import rpc
from ganglion.wire.certificates import Role, TrustLabel
from ganglion.wire.errors import Conflict, PermissionDenied
from ganglion.wire.hello import DRAFTING, ROUTES
from ganglion.wire.home import Home
from ganglion.wire.identity import OwnerKey
from ganglion.wire.nouns import (
    DeviceProfile,
    Drafter,
    Drafting,
    Embedding,
    FormatRate,
    Geometry,
    Layer,
    Manifest,
    NumericClass,
    Plan,
    Range,
    RopeTable,
    Segment,
    Share,
    Slot,
    Stage,
    digest,
    from_json,
    to_json,
)

HERE = Path(__file__).parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"supervisor_tests_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Fleet = _load("fleet").Fleet


def profile() -> DeviceProfile:
    return DeviceProfile(
        host_id="h",
        hostname="h",
        system="Linux",
        kernel_family="k",
        cores=2,
        threads=2,
        memory_bytes=1 << 30,
        memory_budget_bytes=1 << 20,
        disk_free_bytes=1 << 30,
        disk_read_bytes_per_s=1e9,
        memory_bytes_per_s=1e9,
        rates={"fp32": FormatRate(decode_bytes_per_s=1e9, prefill_flop_per_s=1e9)},
        providers=(),
        version="0",
    )


async def quick_probe(home, *, store, threads, memory_budget_bytes, fresh) -> DeviceProfile:
    return profile()


def model(store: PieceStore) -> Manifest:
    def slots(tag: str) -> tuple[Slot, ...]:
        return (Slot(name="w", join="rows", rows=1, pieces=(store.put(tag.encode() * 1000),)),)

    return Manifest(
        format_version=3,
        name="tiny",
        family="llama",
        source_digest="1" * 64,
        numeric_class=NumericClass(format="fp32", block=0, exact=True),
        opset=21,
        geometry=Geometry(
            hidden=8,
            layers=1,
            heads=1,
            kv_heads=1,
            head_dim=4,
            intermediate=16,
            vocab=16,
            context=64,
            head_groups=1,
            column_groups=1,
            vocab_groups=1,
            vocab_group_rows=16,
        ),
        layers=(
            Layer(
                segments=(
                    Segment(kind="attention", axis="heads", groups=1, slots=slots("a")),
                    Segment(kind="mlp", axis="columns", groups=1, slots=slots("m")),
                )
            ),
        ),
        head=Segment(kind="head", axis="columns", groups=1, slots=slots("h")),
        embedding=Embedding(dtype="float32", pieces=(store.put(b"e" * 512),)),
        ropes={"default": (RopeTable(context=16, cos=store.put(b"c" * 64), sin=store.put(b"s" * 64)),)},
        handover="sum",
        graphs={f"{kind}/1": (store.put(kind.encode()),) for kind in ("attention", "mlp", "head")},
        tokenizer={"tokenizer.json": store.put(b"{}")},
        bos_id=None,
        eos_ids=(),
        parameters=1,
    )


def plan_on(node_id: str, manifest: Manifest, threads: int = 1) -> Plan:
    one = Range(0, 1)
    share = Share(device=node_id, heads=one, columns=one, vocab=one)
    return Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=64,
        sessions=1,
        kv_tokens=4 * 8192,
        chunk=16,
        stages=(Stage(layers=one, shares=(share,), topology="mesh"),),
        threads={node_id: threads},
    )


def peer(identity, address: str = "", name: str = "") -> identity_pb2.Peer:
    return identity_pb2.Peer(record=identity.record, address=address, name=name or identity.name)


class Scene:
    """A fleet server, a holder with a model, an agent that runs."""

    def __init__(self, fleet, home, me, holder, holder_address, manifest, gateway) -> None:
        self.fleet, self.home, self.me, self.holder = fleet, home, me, holder
        self.holder_address, self.manifest, self.gateway = holder_address, manifest, gateway
        self.agent: asyncio.Task | None = None

    def start(self, **options) -> None:
        self.agent = asyncio.create_task(
            run_agent(self.home, bind="127.0.0.1", probe=quick_probe, worker_module="fake_worker", **options)
        )

    def assign(self, epoch: int, *, holder=None, gateways=None, threads: int = 1, deployment: str = "d") -> None:
        self.fleet.send(
            assign=fleet_pb2.Assign(
                deployment=deployment,
                epoch=epoch,
                plan=to_json(plan_on(self.me.node_id, self.manifest, threads)),
                manifest=to_json(self.manifest),
                holders=[peer(holder or self.holder, self.holder_address, "holder")],
                gateways=[peer(gateway) for gateway in (gateways if gateways is not None else [self.gateway])],
            )
        )

    def connect(self, epoch: int, *, peers=None, gateways=None) -> None:
        self.fleet.send(
            connect=fleet_pb2.Connect(
                deployment="d",
                epoch=epoch,
                peers=[peer(one) for one in (peers or [self.me])],
                gateways=[peer(gateway) for gateway in (gateways if gateways is not None else [self.gateway])],
            )
        )

    async def reached(self, epoch: int, phase: str):
        await self.fleet.until(lambda: phase in self.fleet.statuses(epoch), f"{phase} of epoch {epoch}")
        return [status for status in self.fleet.of("status") if status.epoch == epoch][-1]

    def worker_pid(self) -> int:
        return int((self.home.path / "worker.pid").read_text().split()[0])

    async def gone(self, pid: int) -> None:
        await self.fleet.until(lambda: not alive(pid), f"process {pid} to end")


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
async def scene(tmp_path, make_node, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    fleet = Fleet(make_node(Role.COORDINATOR))
    await fleet.bound.start()
    holder, store = make_node(name="holder"), PieceStore(tmp_path / "holder")
    manifest = model(store)
    pieces = rpc.server(
        holder, bind="127.0.0.1", port=0, what="the piece port", knob="--piece-port", allowed=ALLOWED, kind="tensor"
    )
    PieceService(store).add_to(pieces.server)
    await pieces.start()
    me = make_node(name="me", coordinator=fleet.bound.address)
    home = Home(tmp_path / "home")
    me.save(home.identity)
    made = Scene(fleet, home, me, holder, pieces.address, manifest, make_node(Role.GATEWAY, name="gate"))
    made.start()
    try:
        yield made
    finally:
        made.agent.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await made.agent
        await pieces.stop()
        for server in {fleet.bound, made.fleet.bound}:
            await server.stop()
        assert list(home.run.iterdir()) == []


async def test_from_hello_to_connected_to_released(scene):
    fleet = scene.fleet
    advert = (await fleet.until(lambda: fleet.of("advert"), "an advert"))[0]
    assert from_json(DeviceProfile, advert.profile, limit_bytes=1 << 14) == profile()
    assert advert.addresses[0].startswith("127.0.0.1:")
    scene.assign(1)
    listening = await scene.reached(1, "listening")
    assert listening.lane_address == "127.0.0.1:4242"
    scene.connect(1)
    await scene.reached(1, "connected")
    assert fleet.statuses(1) == ["fetching", "loading", "listening", "connected"]
    assert (scene.home.path / "connected").read_text() == "me"
    assert (scene.home.path / "gateways").read_text() == "gate"
    beats = await fleet.until(lambda: [b for b in fleet.of("heartbeat") if b.workers and b.workers[0].steps], "a beat")
    beat = beats[0].workers[0]
    assert (beat.deployment, beat.epoch, beat.steps, beat.sessions, beat.kv_bytes) == ("d", 1, 41, 2, 4096)
    assert beat.longest_run_s == 0.5
    # While something is deployed a beat comes four times a second.
    count, began_s = len(fleet.of("heartbeat")), time.monotonic()
    await fleet.until(lambda: len(fleet.of("heartbeat")) >= count + 4, "four more beats")
    assert time.monotonic() - began_s < 3.0
    # The gateways change: told to the worker that runs.
    scene.connect(1, gateways=[])
    await fleet.until(lambda: (scene.home.path / "gateways").read_text() == "", "no gateway")
    pid = scene.worker_pid()
    fleet.send(release=fleet_pb2.Release(deployment="d", epoch=1, reason="done"))
    await scene.reached(1, "released")
    await scene.gone(pid)


async def test_an_agent_that_drafts_is_told_to_the_worker_beside_the_gateways(scene, make_node):
    scene.assign(1, gateways=[scene.gateway, make_node(name="drafting")])
    await scene.reached(1, "listening")
    scene.connect(1, gateways=[scene.gateway, make_node(name="drafting")])
    await scene.reached(1, "connected")
    assert (scene.home.path / "gateways").read_text() == "gate drafting"


def drafts_with(scene, tmp_path, **changes) -> tuple[fleet_pb2.Assign, Manifest]:
    """An order whose lead guesses with another model, which the holder has too."""
    other = msgspec.structs.replace(scene.manifest, name="small", parameters=7, **changes)
    drafter = Drafter(kind="model", manifest_digest=digest(other), slots=1, context=64)
    plan = msgspec.structs.replace(plan_on(scene.me.node_id, scene.manifest), drafter=drafter)
    order = fleet_pb2.Assign(
        deployment="d",
        epoch=1,
        plan=to_json(plan),
        manifest=to_json(scene.manifest),
        holders=[peer(scene.holder, scene.holder_address, "holder")],
        drafter=to_json(other),
        drafter_holders=[peer(scene.holder, scene.holder_address, "holder")],
    )
    return order, other


async def test_a_drafter_comes_with_the_share_and_goes_to_the_worker(scene, tmp_path):
    store = PieceStore(tmp_path / "holder")
    piece = store.put(b"other weights")
    embedding = Embedding(dtype="float32", pieces=(piece,))
    order, other = drafts_with(scene, tmp_path, embedding=embedding)
    scene.fleet.send(assign=order)
    await scene.reached(1, "listening")
    assert (scene.home.path / "drafter.json").read_bytes() == order.drafter
    assert PieceStore(scene.home.store).has(piece.digest, piece.size)
    assert digest(other) in ManifestShelf(scene.home.store).digests()  # what keeps its pieces


async def test_a_drafter_that_is_not_the_plan_s_is_refused(scene, tmp_path):
    order, _ = drafts_with(scene, tmp_path)
    order.drafter = to_json(scene.manifest)
    scene.fleet.send(assign=order)
    assert "the plan's drafter is" in (await scene.reached(1, "failed")).error_message
    order, _ = drafts_with(scene, tmp_path, tokenizer={})
    order.epoch = 2
    scene.fleet.send(assign=order)
    assert "differ in tokenizer.json" in (await scene.reached(2, "failed")).error_message


async def test_who_verifies_is_told_to_the_worker_if_the_owner_vouches_for_it(scene, make_node):
    scene.assign(1)
    await scene.reached(1, "listening")
    scene.connect(1)
    await scene.reached(1, "connected")
    told = fleet_pb2.Verifier(deployment="d", epoch=1, target="big", lead=peer(make_node(name="cloud"), "h:1"))
    scene.fleet.send(verifier=told)
    said = scene.home.path / "verifier"
    await scene.fleet.until(lambda: said.exists() and said.read_text() == "big cloud", "the verifier")
    told.lead.CopyFrom(peer(make_node(name="forged", signer=OwnerKey.generate()), "h:1"))
    scene.fleet.send(verifier=told)
    await scene.fleet.until(lambda: "signature is not valid" in said.read_text(), "a refusal")
    told.lead.CopyFrom(peer(make_node(name="friend", label=TrustLabel.FRIEND), "h:1"))
    scene.fleet.send(verifier=told)
    await scene.fleet.until(lambda: "labelled friend" in said.read_text(), "a refusal")


async def test_an_offer_to_draft_is_made_to_who_takes_them(scene):
    offer = Offer(b"{}", to_json(Drafting(mode="sync")))
    answers: list[tuple[str, str]] = []
    await scene.fleet.until(lambda: scene.fleet.of("advert"), "an advert")
    assert not scene.fleet.of("draft_offer")  # a coordinator of the release before would end the stream
    scene.agent.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await scene.agent
    scene.fleet.features = (DRAFTING,)
    scene.start(offer=offer, on_answer=lambda *told: answers.append(told))
    (made,) = await scene.fleet.until(lambda: scene.fleet.of("draft_offer"), "an offer")
    assert (made.manifest, made.drafting) == (offer.manifest, offer.drafting)
    scene.fleet.send(draft_answer=fleet_pb2.DraftAnswer(target="big", refused="no"))
    await scene.fleet.until(lambda: answers == [("big", "no")], "the answer")


async def test_routes_are_passed_on_to_who_takes_them(scene):
    scene.fleet.features = (ROUTES,)
    scene.agent.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await scene.agent
    scene.start()
    scene.assign(1)
    await scene.reached(1, "listening")
    scene.connect(1)
    (told,) = await scene.fleet.until(lambda: scene.fleet.of("routes"), "a report of routes")
    assert told.tokens == 600


async def test_a_new_epoch_ends_the_old_worker_and_fences_it(scene):
    scene.assign(1)
    await scene.reached(1, "listening")
    pid = scene.worker_pid()
    scene.assign(2)
    await scene.reached(2, "listening")
    assert not alive(pid)
    assert scene.fleet.statuses(1)[-1] == "released"
    scene.assign(1)
    status = await scene.reached(1, "failed")
    assert status.error_code == Conflict.code
    assert alive(scene.worker_pid())


async def test_forged_records_are_refused_before_they_are_used(scene, make_node):
    stranger = make_node(name="forged", signer=OwnerKey.generate())
    scene.assign(1, holder=stranger)
    status = await scene.reached(1, "failed")
    assert status.error_code == "unauthenticated"
    scene.assign(2, gateways=[make_node(Role.GATEWAY, name="forged", signer=OwnerKey.generate())])
    assert (await scene.reached(2, "failed")).error_code == "unauthenticated"
    scene.assign(3, gateways=[make_node(Role.AGENT, label=TrustLabel.FRIEND, name="no-gateway")])
    assert (await scene.reached(3, "failed")).error_code == "permission_denied"
    assert not (scene.home.path / "worker.pid").exists()
    scene.assign(4)
    await scene.reached(4, "listening")
    scene.connect(4, peers=[make_node(signer=OwnerKey.generate())])
    assert (await scene.reached(4, "failed")).error_code == "unauthenticated"
    assert not (scene.home.path / "connected").exists()
    scene.assign(5)
    await scene.reached(5, "listening")
    scene.connect(5, peers=[make_node(name="another")])
    assert (await scene.reached(5, "failed")).error_code == "invalid_document"


async def test_orders_that_do_not_fit_are_refused_by_name(scene):
    scene.assign(1, threads=64)
    status = await scene.reached(1, "failed")
    assert "--threads" in status.error_message
    scene.assign(2, deployment="../../etc")
    assert (await scene.reached(2, "failed")).error_code == "invalid_document"
    scene.fleet.send(assign=fleet_pb2.Assign(deployment="d", epoch=3, plan=b"{", manifest=b"{}"))
    assert (await scene.reached(3, "failed")).error_code == "invalid_document"
    scene.connect(9)
    assert (await scene.reached(9, "failed")).error_code == Conflict.code
    assert not scene.agent.done()


async def test_a_worker_that_exits_is_reported_with_its_code_and_last_words(scene):
    (scene.home.path / "behavior").write_text("exit")
    scene.assign(1)
    status = await scene.reached(1, "failed")
    assert "exited with code 3 while loading" in status.error_message
    assert "the op MatMulNBits failed" in status.error_message
    (scene.home.path / "behavior").write_text("garbage")
    scene.assign(2)
    assert "no event of a worker" in (await scene.reached(2, "failed")).error_message
    await scene.gone(scene.worker_pid())


async def test_a_killed_worker_is_noticed(scene):
    scene.assign(1)
    await scene.reached(1, "listening")
    os.kill(scene.worker_pid(), signal.SIGKILL)
    status = await scene.reached(1, "failed")
    assert "signal 9" in status.error_message


async def test_a_worker_that_ignores_its_end_is_killed(scene):
    (scene.home.path / "behavior").write_text("deaf")
    scene.assign(1)
    await scene.reached(1, "listening")
    pid = scene.worker_pid()
    assert alive(pid)
    scene.fleet.send(release=fleet_pb2.Release(deployment="d", epoch=1, reason="done"))
    await scene.gone(pid)


async def test_the_stream_comes_back_and_workers_run_on(scene, make_node):
    scene.assign(1)
    await scene.reached(1, "listening")
    pid, port = scene.worker_pid(), scene.fleet.bound.port
    await scene.fleet.bound.stop()
    again = Fleet(make_node(Role.COORDINATOR), port)
    await again.bound.start()
    scene.fleet = again
    await scene.reached(1, "listening")  # said anew on the new stream
    assert again.of("advert")
    assert alive(pid)
    assert scene.worker_pid() == pid
    scene.connect(1)
    await scene.reached(1, "connected")


async def test_a_failure_while_the_coordinator_is_away_is_told_later(scene, make_node):
    scene.assign(1)
    await scene.reached(1, "listening")
    port, pid = scene.fleet.bound.port, scene.worker_pid()
    await scene.fleet.bound.stop()
    os.kill(pid, signal.SIGKILL)
    again = Fleet(make_node(Role.COORDINATOR), port)
    await scene.fleet.until(lambda: not alive(pid), "the worker's end")
    await again.bound.start()
    scene.fleet = again
    await scene.reached(1, "failed")


async def test_held_models_are_told_when_the_last_piece_and_manifest_are_there(scene, tmp_path):
    fleet = scene.fleet
    assert (await fleet.until(lambda: fleet.of("held"), "what is held"))[0].manifest_digests == []
    mine, theirs = PieceStore(scene.home.store), PieceStore(tmp_path / "holder")
    for piece in all_pieces(scene.manifest):
        mine.put(theirs.open(piece.digest))
    name = ManifestShelf(scene.home.store).put(scene.manifest)
    await fleet.until(lambda: [held for held in fleet.of("held") if held.manifest_digests == [name]], "the model")


async def test_links_are_measured_and_unreachable_ones_named(scene, make_node):
    absent = make_node(name="absent")
    scene.fleet.send(
        measure_links=fleet_pb2.MeasureLinks(
            peers=[peer(scene.holder, scene.holder_address), peer(absent, "127.0.0.1:1"), peer(scene.me, "127.0.0.1:1")]
        )
    )
    links = {
        link.node_id: link for link in (await scene.fleet.until(lambda: scene.fleet.of("links"), "links"))[0].links
    }
    assert set(links) == {scene.holder.node_id, absent.node_id}
    good = links[scene.holder.node_id]
    assert good.reachable
    assert 0 < good.rtt_s < 1
    assert good.bytes_per_s > 1e6
    assert not links[absent.node_id].reachable


async def test_a_probe_on_request_gives_a_new_advert(scene):
    await scene.fleet.until(lambda: scene.fleet.of("advert"), "the first advert")
    scene.fleet.send(reprobe=fleet_pb2.Reprobe())
    await scene.fleet.until(lambda: len(scene.fleet.of("advert")) == 2, "the second advert")


async def test_stopping_ends_workers_and_says_so(scene):
    scene.assign(1)
    await scene.reached(1, "listening")
    pid = scene.worker_pid()
    scene.agent.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.agent
    assert not alive(pid)
    assert scene.fleet.statuses(1)[-1] == "released"
    scene.agent = asyncio.create_task(asyncio.sleep(0))


async def test_a_second_supervisor_on_one_home_is_told_who_has_it(scene):
    await scene.fleet.until(lambda: scene.fleet.of("advert"), "the first one")
    with pytest.raises(Conflict, match=f"in use by process {os.getpid()}"):
        await run_agent(scene.home, bind="127.0.0.1", probe=quick_probe)


async def test_a_device_that_is_shut_out_stops_and_says_why(tmp_path, make_node):
    fleet = Fleet(make_node(Role.COORDINATOR))
    await fleet.bound.start()
    me = make_node(Role.GATEWAY, name="no-agent", coordinator=fleet.bound.address)
    home = Home(tmp_path / "home")
    me.save(home.identity)
    try:
        with pytest.raises(PermissionDenied, match="refuses this device"):
            await run_agent(home, bind="127.0.0.1", probe=quick_probe)
    finally:
        await fleet.bound.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_worker_survives_a_killed_supervisor(tmp_path):
    parent = (
        "import os, signal, subprocess, sys\n"
        "command = [sys.executable, '-m', 'ganglion.agent.launch', str(os.getpid()), 'sleeper']\n"
        "child = subprocess.Popen(command, stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "signal.pause()\n"
    )
    (tmp_path / "sleeper.py").write_text("import signal\nprint('up', flush=True)\nsignal.pause()\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, env=environment) as process:
        child = int(process.stdout.readline())
        assert alive(child)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    deadline_s = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline_s, "the worker outlived its supervisor"
        os.sched_yield()


def test_labels_of_leads_are_checked(make_node):
    friend = make_node(label=TrustLabel.FRIEND, name="friendly")
    plan = Plan(
        manifest_digest="0" * 64,
        numeric_class=NumericClass(format="fp32", block=0, exact=True),
        context=64,
        sessions=1,
        kv_tokens=4 * 8192,
        chunk=16,
        stages=(
            Stage(
                layers=Range(0, 1),
                shares=(Share(device=friend.node_id, heads=Range(0, 1), columns=Range(0, 1), vocab=Range(0, 1)),),
                topology="mesh",
            ),
        ),
        threads={friend.node_id: 1},
    )
    order = fleet_pb2.Connect(deployment="d", epoch=1, peers=[peer(friend)])
    with pytest.raises(PermissionDenied, match="the lead friendly is labelled friend"):
        read_connect(order, plan, make_node())
