"""Prepacked parts: made once, opened by whoever needs the same, made again when not whole, never in the way."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from checkpoints import make_llama
from reference_runner import cut_evenly

from ganglion.agent.executor import prepacked as parts
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.executor.prepacked import Prepacked, Sources
from ganglion.agent.store import ManifestShelf, PieceStore
from ganglion.agent.store.gc import remove_model
from ganglion.agent.store.prepacked import sample
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.wire.nouns import Range, Share, Stage


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A model in a store; `load` gives the first MLP's numbers, `written` counts weights put together."""
    path = make_llama(tmp_path / "checkpoint")
    store = PieceStore(tmp_path / "store")
    manifest = partition(path, store, name="m", numeric_class=numeric_class(path, "int4"))
    ManifestShelf(store.path).put(manifest)
    start_runtime(1)
    made = SimpleNamespace(store=store, manifest=manifest, read=0)

    graphs = {piece.digest for pieces in manifest.graphs.values() for piece in pieces}

    def open_piece(digest: str) -> memoryview:
        made.read += digest not in graphs
        return store.open(digest)

    def load(weights: tuple[int, ...] = (1,), store: PieceStore = store) -> tuple[np.ndarray, Prepacked]:
        prepacked, cut = Prepacked(store, least_bytes=0), cut_evenly(manifest, weights)[0]
        share = Share(device="a" * 26, heads=cut.heads, columns=cut.columns, vocab=cut.vocab)
        stage = Stage(layers=Range(0, manifest.geometry.layers), shares=(share,), topology="mesh")
        made.read, run = 0, tmp_path / "run"
        shard = load_shard(
            manifest, stage, share, open_piece=open_piece, folder=run, progress=lambda *_: None, prepacked=prepacked
        )
        assert not any(run.iterdir()) if run.exists() else True
        prepacked.keep()
        session = next(one.sessions[0] for one in shard.segments if one.segment.axis == "columns")
        hidden = manifest.geometry.hidden
        rows = np.random.default_rng(1).standard_normal((3, hidden))
        return session.run(["partial"], {"res": rows.astype(np.float32), "delta": rows})[0], prepacked

    made.load = load
    return made


def parts_of(model: Any) -> list[Path]:
    return sorted(path for path in (model.store.path / "prepacked").iterdir() if not path.name.startswith("."))


def test_a_second_load_reads_no_weights_and_gives_the_same_bits(model):
    first, one = model.load()
    assert model.read
    assert len(parts_of(model)) == 3 * model.manifest.geometry.layers + 1  # of attention, what is before it and after
    assert {path.stat().st_mode & 0o777 for path in parts_of(model)} == {0o700}
    second, two = model.load()  # beside the first, which still has them open
    assert not model.read
    assert np.array_equal(first, second)
    one.close()
    two.close()


def test_a_key_is_of_all_that_a_part_depends_on(model, monkeypatch):
    segment = model.manifest.layers[0].segments[1]
    graph = model.manifest.graphs[f"{segment.kind}/{segment.groups}"][0]
    whole = Sources(graph, segment, Range(0, segment.groups), 1)
    other = model.manifest.layers[1].segments[1]
    keys = [
        whole.key("family"),
        whole.key("family of another ONNX Runtime"),
        Sources(graph, segment, Range(0, 1), 1).key("family"),
        Sources(graph, segment, Range(1, 2), 1).key("family"),
        Sources(graph, other, Range(0, segment.groups), 1).key("family"),
        Sources(model.manifest.graphs[f"{model.manifest.head.kind}/1"][0], segment, whole.share, 1).key("family"),
    ]
    monkeypatch.setattr(parts, "FORMAT", "later")
    keys.append(whole.key("family"))
    assert len(set(keys)) == len(keys)


def test_another_share_or_kernel_family_is_another_part(model, monkeypatch):
    _, prepacked = model.load()
    prepacked.close()
    model.load((1, 1))[1].close()
    assert model.read
    monkeypatch.setattr(parts, "kernel_family", lambda: "another")
    model.load()[1].close()
    assert model.read


@pytest.mark.parametrize("harm", ["cut", "flipped", "foreign file", "link", "record", "graph"])
def test_a_part_that_is_not_whole_is_made_again(model, tmp_path, caplog, harm):
    expected, prepacked = model.load()
    prepacked.close()
    part = max(parts_of(model), key=lambda path: (path / "weights.bin").stat().st_size)
    weights, record, graph = part / "weights.bin", part / "part.json", part / "graph.onnx"
    before = graph.read_bytes()
    match harm:
        case "cut":
            with weights.open("r+b") as file:
                file.truncate(weights.stat().st_size - 1)
        case "flipped":
            with weights.open("r+b") as file:
                file.write(bytes([weights.read_bytes()[0] ^ 1]))
        case "foreign file":
            (part / "other.bin").write_bytes(b"x")
        case "link":
            weights.rename(tmp_path / "elsewhere")
            weights.symlink_to(tmp_path / "elsewhere")
        case "record":
            record.write_bytes(json.dumps({"sizes": {}}).encode())
        case "graph":  # as whole as its record says, and yet nothing that opens
            document = json.loads(record.read_bytes())
            graph.write_bytes(b"\xff" * len(before))
            document["sample"] = sample([graph, weights])
            record.write_bytes(json.dumps(document).encode())
    with caplog.at_level(logging.WARNING):
        found, prepacked = model.load()
    prepacked.close()
    assert "made again" in caplog.text
    assert np.array_equal(found, expected)
    assert model.read
    assert graph.read_bytes() == before
    model.load()[1].close()
    assert not model.read


@contextlib.contextmanager
def file_limit(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_parts_takes_no_deployment_down(model, caplog):
    expected, prepacked = model.load()
    prepacked.close()
    largest = max((path / "weights.bin").stat().st_size for path in parts_of(model))
    model.store.prepacked.shrink(1 << 40)
    # As on a full disk the weights still go on it (run folder), and the larger file of the prepacked ones does not.
    with caplog.at_level(logging.WARNING), file_limit(largest - 1):
        found, prepacked = model.load()
    prepacked.close()
    assert np.array_equal(found, expected)
    assert caplog.text.count("into memory") == 1
    assert not any(".new-" in path.name for path in (model.store.path / "prepacked").iterdir())


def test_a_budget_holds_pieces_first_and_parts_that_nobody_uses_give_way(model, caplog):
    pieces = model.store.used_bytes()
    expected, prepacked = model.load()
    parts_bytes = model.store.prepacked.used_bytes()
    tight = PieceStore(model.store.path, pieces + parts_bytes)
    assert not tight.prepacked.shrink(1)  # all are in use
    prepacked.close()
    tight.put(bytes(parts_bytes // 2))
    assert tight.used_bytes() + tight.prepacked.used_bytes() <= tight.budget_bytes
    left = parts_of(model)
    assert left
    with caplog.at_level(logging.WARNING):
        found, prepacked = model.load(store=tight)
    prepacked.close()
    assert "into memory" in caplog.text
    assert np.array_equal(found, expected)
    assert tight.used_bytes() + tight.prepacked.used_bytes() <= tight.budget_bytes


def test_the_least_recently_used_goes_first(model):
    model.load()[1].close()
    first, second, *rest = parts_of(model)
    lock = model.store.prepacked.open(first.name)[1]

    os.close(lock)
    for path in rest:
        os.utime(path / "part.json", ns=(5, 5))
    os.utime(second / "part.json", ns=(1, 1))
    model.store.prepacked.shrink(1)
    assert parts_of(model) == [first, *rest]
    model.store.prepacked.shrink(sum(file.stat().st_size for path in rest for file in path.iterdir()))
    assert parts_of(model) == [first]


def test_removing_a_model_removes_its_parts(model):
    model.load()[1].close()
    [name] = ManifestShelf(model.store.path).digests()
    removed = remove_model(model.store, ManifestShelf(model.store.path), name)
    assert not parts_of(model)
    assert removed.size_bytes > sum(piece.size for piece in model.manifest.embedding.pieces)
    assert not model.store.used_bytes()


def test_what_a_killed_process_left_is_swept(model):
    left = model.store.path / "prepacked" / ".new-999999999-00000000-aa"
    left.mkdir(parents=True)
    model.store.sweep()
    assert not left.exists()
