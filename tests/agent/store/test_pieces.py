"""Pieces on disk: named by digest, whole or not there, within a budget, and honest about a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
import threading

import pytest

from ganglion.agent.store import ManifestShelf, PieceStore, all_pieces, needed_pieces
from ganglion.wire.errors import Corrupt, Exhausted, InvalidDocument, InvalidRequest, NotFound
from ganglion.wire.nouns import (
    Embedding,
    Geometry,
    Layer,
    Manifest,
    NumericClass,
    PieceRef,
    Plan,
    Range,
    RopeTable,
    Segment,
    Share,
    Slot,
    Stage,
    digest,
)


def files(store: PieceStore) -> list[str]:
    return sorted(path.name for path in (store.path / "pieces").rglob("*") if path.is_file())


def test_put_is_named_by_sha256_and_idempotent(tmp_path):
    store = PieceStore(tmp_path)
    ref = store.put(b"neurons")
    assert ref == PieceRef(hashlib.sha256(b"neurons").hexdigest(), 7)
    assert store.put(memoryview(b"neurons")) == ref
    assert files(store) == [ref.digest]
    assert (tmp_path / "pieces" / ref.digest[:2] / ref.digest).read_bytes() == b"neurons"
    assert store.has(ref.digest, 7)
    assert not store.has(ref.digest, 8)
    assert list(store.digests()) == [ref.digest]
    with store.open(ref.digest) as view:
        assert bytes(view) == b"neurons"
        assert view.readonly
    assert store.used_bytes() == 7
    assert store.remove(ref.digest)
    assert not store.remove(ref.digest)
    with pytest.raises(NotFound, match=ref.digest[:12]):
        store.open(ref.digest)


def test_an_empty_piece_and_a_name_that_is_none(tmp_path):
    store = PieceStore(tmp_path)
    assert bytes(store.open(store.put(b"").digest)) == b""
    for name in ("../../etc/passwd", "A" * 64, "", "0" * 63):
        with pytest.raises(InvalidRequest, match="64 lower-case"):
            store.open(name)


def test_an_open_piece_outlives_its_removal(tmp_path):
    store = PieceStore(tmp_path)
    view = store.open(store.put(b"x" * 5000).digest)
    store.remove(hashlib.sha256(b"x" * 5000).hexdigest())
    assert bytes(view) == b"x" * 5000


def test_two_threads_put_the_same_piece(tmp_path):
    store, body = PieceStore(tmp_path), os.urandom(1 << 20)
    threads = [threading.Thread(target=store.put, args=(body,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files(store) == [hashlib.sha256(body).hexdigest()]


def test_a_piece_that_rotted_is_removed_and_named(tmp_path):
    store = PieceStore(tmp_path)
    ref = store.put(b"sound")
    store.verify(ref.digest)
    store.path_of(ref.digest).write_bytes(b"rotte")
    with pytest.raises(Corrupt, match="fetch it again"):
        store.verify(ref.digest)
    assert not store.has(ref.digest)


def test_the_budget_names_its_figure_and_knob(tmp_path):
    store = PieceStore(tmp_path, budget_bytes=100)
    first = store.put(b"a" * 60)
    with pytest.raises(Exhausted, match=r"holds 60 bytes and 50 more.*budget is 100.*store budget"):
        store.put(b"b" * 50)
    store.put(b"a" * 60)  # already held: nothing more is needed
    PieceStore(tmp_path).remove(first.digest)  # by another process
    store.put(b"b" * 50)
    assert store.used_bytes() == 50


def test_a_full_disk_is_an_error_of_the_tree_and_leaves_nothing(tmp_path):
    # The limit on file sizes of a process of its own stands in for a disk that is full (EFBIG instead of ENOSPC).
    script = (
        "import sys, resource, signal; from pathlib import Path\n"
        "from ganglion.agent.store import PieceStore\n"
        "from ganglion.wire.errors import Exhausted\n"
        "from ganglion.wire.nouns import PieceRef\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "store = PieceStore(Path(sys.argv[1]))\n"
        "for attempt in range(2):\n"
        "    try: store.put(b'x' * 100_000)\n"
        "    except Exhausted as error: print('put', error.message)\n"
        "part = store.partial(PieceRef('0' * 64, 100_000))\n"
        "part.write(b'y' * 4000)\n"
        "try: part.write(b'z' * 4000)\n"
        "except Exhausted as error: print('part', part.received_bytes, error.message)\n"
        "part.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["put", "put", "part"]
    assert "the disk of" in lines[0]
    assert "--home" in lines[0]
    assert lines[2].startswith("part 4000 ")
    store = PieceStore(tmp_path)
    assert files(store) == ["0" * 64 + ".part"]
    assert store.partial(PieceRef("0" * 64, 100_000)).received_bytes == 4000
    assert errno.EFBIG
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_a_transfer_is_continued_and_visible_only_when_whole(tmp_path):
    store, body = PieceStore(tmp_path), os.urandom(10_000)
    ref = PieceRef(hashlib.sha256(body).hexdigest(), len(body))
    with store.partial(ref) as part:
        part.write(body[:4000])
    assert not store.has(ref.digest)
    with store.partial(ref) as part:
        assert part.received_bytes == 4000
        part.write(body[4000:])
        assert not store.has(ref.digest)
        part.finish()
    assert files(store) == [ref.digest]
    assert bytes(store.open(ref.digest)) == body


def test_a_transfer_of_wrong_bytes_is_never_visible(tmp_path):
    store, body = PieceStore(tmp_path), b"right" * 100
    ref = PieceRef(hashlib.sha256(body).hexdigest(), len(body))
    with store.partial(ref) as part:
        part.write(b"wrong" * 100)
        with pytest.raises(Corrupt, match="expected 500 bytes"):
            part.finish()
        assert part.received_bytes == 0
        part.write(body[:-1])
        with pytest.raises(Corrupt, match="more than the 500 bytes"):
            part.write(b"too long")
    assert files(store) == []


# Manifests and what a share needs.


def tiny() -> tuple[Manifest, Plan]:
    def ref(name: str) -> PieceRef:
        return PieceRef(hashlib.sha256(name.encode()).hexdigest(), 10)

    def slots(tag: str, groups: int) -> tuple[Slot, ...]:
        grouped = tuple(ref(f"{tag}-{group}") for group in range(groups))
        return (
            Slot(name="norm", join="whole", rows=1, pieces=(ref(f"{tag}-norm"),)),
            Slot(name="w", join="rows", rows=1, pieces=grouped),
        )

    def layer(number: int) -> Layer:
        return Layer(
            segments=(
                Segment(kind="attention", axis="heads", groups=2, slots=slots(f"a{number}", 2)),
                Segment(kind="mlp", axis="columns", groups=4, slots=slots(f"m{number}", 4)),
            )
        )

    graphs = {f"attention/{n}": (ref(f"ga{n}"),) for n in (0, 1, 2)} | {f"mlp/{n}": (ref(f"gm{n}"),) for n in range(5)}
    graphs |= {f"head/{n}": (ref(f"gh{n}"),) for n in (1, 2)}
    numeric = NumericClass(format="fp32", block=0, exact=True)
    manifest = Manifest(
        format_version=3,
        name="tiny",
        family="llama",
        source_digest="1" * 64,
        numeric_class=numeric,
        opset=21,
        geometry=Geometry(
            hidden=8,
            layers=2,
            heads=2,
            kv_heads=2,
            head_dim=4,
            intermediate=16,
            vocab=16,
            context=64,
            head_groups=2,
            column_groups=4,
            vocab_groups=2,
            vocab_group_rows=8,
        ),
        layers=(layer(0), layer(1)),
        head=Segment(kind="head", axis="columns", groups=2, slots=slots("h", 2)),
        embedding=Embedding(dtype="float32", pieces=(ref("e0"), ref("e1"))),
        ropes={"default": (RopeTable(context=64, cos=ref("cos"), sin=ref("sin")),)},
        handover="sum",
        graphs=graphs,
        tokenizer={"tokenizer.json": ref("tok")},
        bos_id=None,
        eos_ids=(),
        parameters=1,
    )
    lead, other = "a" * 26, "b" * 26
    plan = Plan(
        manifest_digest=digest(manifest),
        numeric_class=numeric,
        context=64,
        sessions=1,
        kv_tokens=4 * 8192,
        chunk=16,
        stages=(
            Stage(
                layers=Range(0, 2),
                shares=(
                    Share(device=lead, heads=Range(0, 2), columns=Range(0, 3), vocab=Range(0, 0)),
                    Share(device=other, heads=Range(2, 2), columns=Range(3, 4), vocab=Range(0, 2)),
                ),
                topology="mesh",
            ),
        ),
        threads={lead: 1, other: 1},
    )
    return manifest, plan


def names(*parts: str) -> set[str]:
    return {hashlib.sha256(part.encode()).hexdigest() for part in parts}


def test_needed_pieces_are_those_of_the_share_and_its_graphs():
    manifest, plan = tiny()
    lead = {piece.digest for piece in needed_pieces(manifest, plan, "a" * 26)}
    layers = [f"{kind}{n}-{part}" for n in (0, 1) for kind, parts in (("a", "01"), ("m", "012")) for part in parts]
    norms = [f"{kind}{n}-norm" for n in (0, 1) for kind in "am"]
    assert lead == names("e0", "e1", "tok", "cos", "sin", "ga2", "gm3", *layers, *norms)
    other = {piece.digest for piece in needed_pieces(manifest, plan, "b" * 26)}
    kept = ("ga0", "a0-norm", "a1-norm")  # without heads it still keeps the residual
    columns = ("gm1", "m0-norm", "m0-3", "m1-norm", "m1-3")
    assert other == names("cos", "sin", *kept, *columns, "gh2", "h-norm", "h-0", "h-1")
    assert lead | other <= {piece.digest for piece in all_pieces(manifest)}
    with pytest.raises(NotFound, match="no share for device"):
        needed_pieces(manifest, plan, "c" * 26)


def test_a_plan_beyond_its_manifest_is_refused():
    manifest, plan = tiny()
    stage = plan.stages[0]
    beyond = Stage(layers=Range(0, 3), shares=stage.shares, topology="mesh")
    with pytest.raises(InvalidDocument, match=r"layers 0\.\.3"):
        needed_pieces(manifest, _with(plan, beyond), "a" * 26)
    wide = Share(device="a" * 26, heads=Range(0, 2), columns=Range(2, 6), vocab=Range(0, 2))
    with pytest.raises(InvalidDocument):
        needed_pieces(manifest, _with(plan, Stage(layers=Range(0, 2), shares=(wide,), topology="mesh")), "a" * 26)


def _with(plan: Plan, stage: Stage) -> Plan:
    return Plan(
        manifest_digest=plan.manifest_digest,
        numeric_class=plan.numeric_class,
        context=plan.context,
        sessions=plan.sessions,
        kv_tokens=plan.kv_tokens,
        chunk=plan.chunk,
        stages=(stage,),
        threads=plan.threads,
    )


def test_the_shelf_keeps_manifests_by_digest(tmp_path):
    shelf, (manifest, _) = ManifestShelf(tmp_path), tiny()
    before = shelf.changed()
    name = shelf.put(manifest)
    assert name == digest(manifest)
    assert shelf.changed() != before
    assert shelf.put(manifest) == name
    assert shelf.digests() == (name,)
    assert shelf.get(name) == manifest
    other = "0" * 64
    (tmp_path / "manifests" / f"{other}.json").write_bytes((tmp_path / "manifests" / f"{name}.json").read_bytes())
    with pytest.raises(Corrupt):
        shelf.get(other)
    assert shelf.remove(name)
    with pytest.raises(NotFound):
        shelf.get(name)
    with pytest.raises(InvalidRequest):
        shelf.get("../x")
