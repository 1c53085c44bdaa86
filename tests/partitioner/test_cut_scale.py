"""Cutting at scale: threads within a budget, a cut that is killed goes on, pages are dropped, nothing is cut twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from checkpoints import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.store import PieceStore, all_pieces, needed_pieces
from ganglion.partitioner.crew import Job, work
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.journal import FOLDER, Journal
from ganglion.partitioner.pages import drop_pages
from ganglion.partitioner.safetensors import open_safetensors
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Corrupt, Exhausted
from ganglion.wire.nouns import Manifest, PieceRef, Plan, Range, Share, Stage, digest, to_json

CUT_AND_DIE = """
import os, signal, sys
from pathlib import Path
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink

class Doomed(DirectorySink):
    left = int(sys.argv[3])
    def put(self, buffer):
        if Doomed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        Doomed.left -= 1
        return super().put(buffer)

source = Path(sys.argv[1])
partition(source, Doomed(Path(sys.argv[2])), name="m", numeric_class=numeric_class(source, "int4"), threads=1)
"""


class Counting(DirectorySink):
    """Notes what is put."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.put_digests: list[str] = []

    def put(self, buffer: bytes | memoryview, /) -> PieceRef:
        ref = super().put(buffer)
        self.put_digests.append(ref.digest)
        return ref


def cut(source: Path, sink: DirectorySink, weight_format: str = "int4", threads: int = 0) -> Manifest:
    return partition(source, sink, name="m", numeric_class=numeric_class(source, weight_format), threads=threads)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("scale") / "m", dtype="bfloat16", num_hidden_layers=3)


@pytest.mark.parametrize("weight_format", ["fp32", "int4"])
def test_any_number_of_threads_gives_the_same_manifest(source, tmp_path, weight_format):
    manifests = [to_json(cut(source, DirectorySink(tmp_path / str(n)), weight_format, n)) for n in (1, 2, 7)]
    assert len(set(manifests)) == 1
    assert not (tmp_path / "1" / FOLDER).exists()


def test_a_killed_cut_goes_on_where_it_stopped(source, tmp_path):
    whole = Counting(tmp_path / "whole")
    expected = cut(source, whole)
    puts = len(whole.put_digests)
    broken = tmp_path / "broken"
    died = subprocess.run(
        [sys.executable, "-c", CUT_AND_DIE, str(source), str(broken), str(puts // 2)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    (journal,) = (broken / FOLDER).iterdir()
    assert len(journal.read_bytes().splitlines()) > 20

    # What the journal names is believed only while it is there, whole.
    entries = [json.loads(line) for line in journal.read_bytes().splitlines()]
    named = [(job, name, size) for job, pieces in entries for _, name, size in pieces if size > 100]
    spoiled = {name for _, name, _ in (named[5], named[-1])}
    redone = {job for job, name, _ in named if name in spoiled}
    sink = Counting(broken)
    sink.file(named[5][1]).unlink()
    os.truncate(sink.file(named[-1][1]), 10)
    with journal.open("ab") as file:
        file.write(b'["torn",[["w","')
    assert cut(source, sink) == expected
    assert not (broken / FOLDER).exists()
    kept = sum(len(pieces) for job, pieces in entries if job not in redone)
    assert len(sink.put_digests) == puts - kept
    for piece in all_pieces(expected):
        assert hashlib.sha256(sink.file(piece.digest).read_bytes()).hexdigest() == piece.digest
    # Once it is whole, nothing is remembered: the next cut is a new one, and finds every piece there.
    assert cut(source, sink) == expected


def test_another_model_of_the_same_headers_or_another_class_takes_nothing_over(source, tmp_path):
    other = make_llama(tmp_path / "other", seed=5, dtype="bfloat16", num_hidden_layers=3)
    died = subprocess.run(
        [sys.executable, "-c", CUT_AND_DIE, str(source), str(tmp_path / "pieces"), "200"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    clean = tmp_path / "clean"
    assert cut(other, DirectorySink(clean)).source_digest == cut(source, DirectorySink(clean)).source_digest
    for model, weight_format in ((other, "int4"), (source, "fp32")):
        expected = cut(model, DirectorySink(clean), weight_format)
        assert cut(model, DirectorySink(tmp_path / "pieces"), weight_format) == expected
    # The same folder with other weights of the same sizes is another source too.
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    interrupted = Interrupted(tmp_path / "again", 200)
    with pytest.raises(KeyboardInterrupt):
        cut(moved, interrupted, threads=1)
    shutil.copy(other / "model.safetensors", moved / "model.safetensors")
    os.utime(moved / "model.safetensors", ns=(1, 1))
    assert cut(moved, DirectorySink(tmp_path / "again")) == cut(other, DirectorySink(clean))


class Interrupted(DirectorySink):
    """Raises KeyboardInterrupt after some pieces."""

    def __init__(self, path: Path, left: int) -> None:
        super().__init__(path)
        self.left = left

    def put(self, buffer: bytes | memoryview, /) -> PieceRef:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().put(buffer)


def test_an_agent_s_store_is_such_a_shelf(source, tmp_path):
    store = PieceStore(tmp_path / "store")
    expected = cut(source, DirectorySink(tmp_path / "pieces"))
    full = PieceStore(tmp_path / "store", budget_bytes=40_000)
    with pytest.raises(Exhausted, match="budget"):
        cut(source, full)
    assert (tmp_path / "store" / FOLDER).is_dir()
    assert cut(source, store) == expected
    assert not (tmp_path / "store" / FOLDER).exists()
    assert all(store.has(piece.digest, piece.size) for piece in all_pieces(expected))


def test_a_new_share_re_cuts_nothing(source, tmp_path):
    """Every plan's pieces come of one cut: all together they are the whole, whichever way it is split."""
    sink = Counting(tmp_path / "pieces")
    manifest = cut(source, sink)
    sink.put_digests.clear()
    heads, columns, vocab = (
        manifest.geometry.head_groups,
        manifest.geometry.column_groups,
        manifest.geometry.vocab_groups,
    )
    everywhere = {piece.digest for piece in all_pieces(manifest)} - {
        piece.digest for pieces in (manifest.tokenizer.values(), *manifest.graphs.values()) for piece in pieces
    }
    for first in range(1, columns):
        split = min(first, heads)
        stage = Stage(
            layers=Range(0, 3),
            shares=(
                Share(device="a" * 26, heads=Range(0, split), columns=Range(0, first), vocab=Range(0, 1)),
                Share(device="b" * 26, heads=Range(split, heads), columns=Range(first, columns), vocab=Range(1, vocab)),
            ),
            topology="mesh",
        )
        plan = Plan(
            manifest_digest=digest(manifest),
            numeric_class=manifest.numeric_class,
            context=64,
            sessions=1,
            kv_tokens=4 * 8192,
            chunk=16,
            stages=(stage,),
            threads={"a" * 26: 1, "b" * 26: 1},
        )
        needed = [needed_pieces(manifest, plan, device) for device in plan.devices]
        assert all(sink.has(piece.digest, piece.size) for pieces in needed for piece in pieces)
        assert {piece.digest for pieces in needed for piece in pieces} >= everywhere
        # A share is less than the whole: only the vectors, the ropes and (for the lead) the embedding are in both.
        assert all(sum(p.size for p in pieces) < sum(p.size for p in all_pieces(manifest)) for pieces in needed)
    assert sink.put_digests == []


def test_tensors_that_the_model_does_not_use_are_neither_read_nor_cut(source, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(source, more)
    tensors = safetensors.torch.load_file(more / "model.safetensors")
    tensors["vision_tower.weight"] = torch.full((64, 64), torch.nan)  # reading it would be refused
    safetensors.torch.save_file(tensors, more / "model.safetensors")
    plain, extended = cut(source, DirectorySink(tmp_path / "a")), cut(more, DirectorySink(tmp_path / "b"))
    assert {piece.digest for piece in all_pieces(plain)} == {piece.digest for piece in all_pieces(extended)}


# The crew


def jobs_of(costs: list[int], run) -> list[Job]:
    return [Job(f"j{number}", cost, 1, lambda number=number: run(number)) for number, cost in enumerate(costs)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(1, 6))
def test_jobs_keep_to_threads_and_memory_and_their_results_to_their_order(costs, threads):
    lock, active, seen = threading.Lock(), [], []

    def run(number: int):
        with lock:
            active.append(costs[number])
            seen.append((len(active), sum(active)))
        ref = PieceRef(f"{number:064x}", number)
        with lock:
            active.remove(costs[number])
        return (("w", ref),)

    done: list[str] = []
    nothing = Journal(None, "", "", lambda name, size: False)
    results = work(jobs_of(costs, run), nothing, lambda job: done.append(job.name), threads=threads, memory_bytes=10)
    assert [pieces[0][1].size for pieces in results] == list(range(len(costs)))
    assert sorted(done) == sorted(f"j{number}" for number in range(len(costs)))
    assert max(count for count, _ in seen) <= threads
    assert all(total <= 10 or count == 1 for count, total in seen)


def test_what_a_job_raises_ends_the_work_and_what_was_done_is_kept(tmp_path):
    def run(number: int):
        if number == 4:
            raise Corrupt("tensor x: holds numbers that are not finite")
        return (("w", PieceRef(f"{number:064x}", 1)),)

    jobs = jobs_of([1] * 9, run)
    with (
        Journal(tmp_path / FOLDER, "k", "s", lambda name, size: True) as journal,
        pytest.raises(Corrupt, match="finite"),
    ):
        work(jobs, journal, lambda job: None, threads=1)
    again = Journal(tmp_path / FOLDER, "k", "s", lambda name, size: True)
    assert [again.find(job.name) is not None for job in jobs[:5]] == [True] * 4 + [False]
    gone = Journal(tmp_path / FOLDER, "k", "s", lambda name, size: False)
    assert gone.find("j0") is None
    gone.close()
    with Journal(tmp_path / FOLDER, "k", "t", lambda name, size: True) as other:  # the source or the code has changed
        assert other.find("j0") is None
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["k-t.jsonl"]
        other.finish()
    again.close()
    assert not (tmp_path / FOLDER).exists()


@settings(max_examples=40, deadline=None)
@given(cut_at=st.integers(0, 400))
def test_a_journal_torn_anywhere_loses_only_its_last_line(tmp_path_factory, cut_at):
    folder = tmp_path_factory.mktemp("torn")
    with Journal(folder, "k", "s", lambda name, size: True) as journal:
        for number in range(4):
            journal.add(f"j{number}", (("w", PieceRef(f"{number:064x}", 7)),))
    file = folder / "k-s.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:cut_at])
    whole = content[:cut_at].count(b"\n")
    with Journal(folder, "k", "s", lambda name, size: True) as journal:
        assert [journal.find(f"j{number}") is not None for number in range(4)] == [n < whole for n in range(4)]
        journal.add("more", ())
    with Journal(folder, "k", "s", lambda name, size: True) as journal:
        assert journal.find("more") == ()
    shutil.rmtree(folder)


# Pages


def resident_file_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages in /proc")
def test_dropped_pages_leave_this_process_and_come_back_the_same(tmp_path):
    numbers = np.arange(8 << 20, dtype=np.float32)
    safetensors.numpy.save_file({"a": numbers, "b": numbers + 1}, tmp_path / "m.safetensors")
    tensors = open_safetensors(tmp_path / "m.safetensors").tensors
    before = resident_file_bytes()
    sums = [tensor.rows(0, 8 << 20).sum() for tensor in tensors.values()]
    assert resident_file_bytes() - before > 48 << 20
    for tensor in tensors.values():
        drop_pages(tensor.data)
    assert resident_file_bytes() - before < 8 << 20
    assert [tensor.rows(0, 8 << 20).sum() for tensor in tensors.values()] == sums
    drop_pages(memoryview(b"plain bytes"))
    drop_pages(tensors["a"].data[5:9])
    assert tensors["a"].rows(0, 3).tolist() == [0, 1, 2]
