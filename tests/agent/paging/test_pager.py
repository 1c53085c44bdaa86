"""Experts that come and go give the numbers of experts that stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from paging_graphs import Shape, make_layers

from ganglion.agent.executor.loader import _session
from ganglion.agent.paging.pager import Pager, Worth
from ganglion.agent.paging.parts import RECORDS_FILE, PagedExperts
from ganglion.wire.errors import Corrupt, DoesNotFit, Internal


def run(pager, paged, layer: int, rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    index = chosen.reshape(-1)
    repeated = np.repeat(rows, chosen.shape[1], axis=0)
    given = np.full_like(repeated, np.nan)
    for ready in pager.waves(layer, chosen):
        mine = np.isin(index, ready)
        given[mine] = paged.session.run(["given"], {"rows": repeated[mine], "index": index[mine]})[0]
    return given


def budget(paged, share: float) -> int:
    held = sum(one.resident_bytes for one in paged)
    every = sum(one.layout.experts * one.index.record_bytes for one in paged)
    return held + int(every * share)


def test_the_same_bits_with_room_for_two_fifths(layers) -> None:
    paged = layers.open()
    rng = np.random.default_rng(0)
    pager = Pager(paged, budget(paged, 0.4))
    try:
        for step in range(40):
            rows = rng.standard_normal((1 if step % 4 else 24, layers.shape.hidden)).astype(np.float32)
            for layer, one in enumerate(paged):
                chosen = np.argsort(rng.random((len(rows), layers.shape.experts)), axis=1)[:, :2]
                given = run(pager, one, layer, rows, chosen)
                want = layers.want(layer, np.repeat(rows, 2, axis=0), chosen.reshape(-1))
                assert np.array_equal(given, want)
        assert pager.counts.misses > 20
        assert pager.counts.read_bytes > pager.counts.misses * paged[0].index.record_bytes // 2
    finally:
        pager.close()


def shared_bytes() -> int:
    """Memory of pools in this process, each page counted once."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Shmem"))


def test_memory_is_what_was_given(layers) -> None:
    before = shared_bytes()
    paged = layers.open()
    memory = budget(paged, 0.4)
    pager = Pager(paged, memory)
    rng = np.random.default_rng(1)
    for layer in list(range(len(paged))) * 6:
        chosen = np.argsort(rng.random((3, layers.shape.experts)), axis=1)[:, :3]
        run(pager, paged[layer], layer, np.ones((3, layers.shape.hidden), np.float32), chosen)
    assert 0 < shared_bytes() - before <= memory
    pager.close()
    with pytest.raises(Internal, match="closed"):
        next(pager.waves(0, chosen))
    with pytest.raises(DoesNotFit, match="--expert-memory must be at least"):
        Pager(paged, 100)


@pytest.mark.parametrize(("fault", "message"), [("short", "ends .* early"), ("rotten", "is not what was written")])
def test_a_file_that_is_not_what_was_written_ends_the_wait_and_is_named(
    layers, tmp_path: Path, fault: str, message: str
) -> None:
    place = shutil.copytree(layers.parts[0], tmp_path / "part")
    paged = PagedExperts(place, layers.skeleton, _session, "layer 17")
    with (place / RECORDS_FILE).open("r+b") as file:
        if fault == "short":
            file.truncate(paged.index.record_bytes)
        else:
            file.seek(3 * paged.index.record_bytes + 100)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))
    pager = Pager([paged], budget([paged], 1.0), ahead=False)
    try:
        row = np.ones((1, layers.shape.hidden), np.float32)
        run(pager, paged, 0, row, np.array([[0]]))
        for _ in range(2):  # and so does whoever comes after
            with pytest.raises(Corrupt, match=f"layer 17: expert 3 in experts.bin {message}"):
                run(pager, paged, 0, row, np.array([[0, 3]]))
    finally:
        pager.close()


def test_a_step_given_up_in_the_middle_leaves_the_next_one_right(layers) -> None:
    paged = layers.open()
    pager = Pager(paged, budget(paged, 0.3))
    try:
        waves = pager.waves(0, np.array([[0, 1, 2]]))
        next(waves)
        waves.close()
        rows = np.ones((2, layers.shape.hidden), np.float32)
        given = run(pager, paged[1], 1, rows, np.array([[3, 4], [5, 3]]))
        assert np.array_equal(given, layers.want(1, np.repeat(rows, 2, axis=0), np.array([3, 4, 5, 3])))
    finally:
        pager.close()


def test_layers_may_hold_different_numbers_of_experts(tmp_path: Path) -> None:
    made = [make_layers(Shape(8, experts=count), tmp_path / str(count), 1) for count in (8, 3)]
    paged = [one for layers in made for one in layers.open()]
    pager = Pager(paged, budget(paged, 0.6))
    rng = np.random.default_rng(0)
    try:
        for step in range(60):
            layer = step % 2
            chosen = np.argsort(rng.random((2, paged[layer].layout.experts)), axis=1)[:, :2]
            rows = rng.standard_normal((2, 128)).astype(np.float32)
            given = run(pager, paged[layer], layer, rows, chosen)
            assert np.array_equal(given, made[layer].want(0, np.repeat(rows, 2, axis=0), chosen.reshape(-1)))
        assert pager.counts.ahead > 5
    finally:
        pager.close()


def test_reading_ahead_ends_where_it_does_not_pay_and_is_tried_again() -> None:
    worth = Worth()
    assert worth.pays
    for _ in range(20):
        worth.came(used=False)
    tried = 0
    for worth.steps in range(1, 161):
        tried += worth.pays
    assert tried == 10
    for _ in range(40):
        worth.came(used=True)
    worth.steps = 1
    assert worth.pays
