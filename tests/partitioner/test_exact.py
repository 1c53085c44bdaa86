"""Exact classes: hidden states and logits are bit-equal for any split and any chunking, at one thread and at two."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import make_llama
from reference_runner import Cut, Runner, cut_evenly

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import Range, to_json

# At head dimension 16 attention works in blocks of 32 rows: 33 and 65 leave a row alone in its block.
CHUNKINGS = [[70], [35, 35], [1] * 70, [2] * 35, [3] * 23 + [1], [65, 1, 4], [33, 1, 1, 35]]

ON_TWO_THREADS = """
import hashlib, json, sys
from pathlib import Path
from reference_runner import Runner, cut_evenly
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, from_json
given = json.load(sys.stdin)
manifest = from_json(Manifest, given["manifest"], limit_bytes=MANIFEST_BYTES)
shares = cut_evenly(manifest, (2, 1))
runner = Runner(manifest, DirectorySink(Path(given["pieces"])), Path(given["folder"]), shares, threads=2)
logits, hidden = runner.forward(given["ids"], [33, 1, 36])
print(hashlib.sha256(hidden.tobytes() + logits.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("shape", ["llama-kv2", "llama-kv3-llama31", "llama-kv4-biases", "qwen3-kv3-tied"])
@pytest.mark.parametrize("weight_format", ["fp32", "int4", "int8"])
def test_any_split_and_any_chunking_is_bit_equal(shape, weight_format, models, text, tmp_path):
    cut = models.cut(shape, weight_format)
    ids = text(cut.manifest, 70)
    whole = Runner(cut.manifest, cut.pieces, tmp_path / "whole", cut_evenly(cut.manifest, (1,)))
    logits, hidden = whole.forward(ids)
    splits = [(1,), (1, 1), (3, 1), (1, 5), (1, 1, 1), (4, 1, 2, 3), (1, 1, 1, 1)]
    for number, weights in enumerate(splits):
        shares = cut_evenly(cut.manifest, weights)
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), shares)
        for chunks in (CHUNKINGS[number], CHUNKINGS[(number + 2) % len(CHUNKINGS)]):
            other_logits, other_hidden = runner.forward(ids, chunks)
            assert np.array_equal(other_hidden, hidden), (weights, chunks)
            assert np.array_equal(other_logits, logits), (weights, chunks)


@pytest.mark.parametrize("weight_format", ["fp32", "int4", "int8"])
def test_two_threads_give_the_bits_of_one(weight_format, models, text, tmp_path):
    """In a process of its own: a process has one pool of threads."""
    cut = models.cut("llama-kv2", weight_format)
    ids = text(cut.manifest, 70)
    runner = Runner(cut.manifest, cut.pieces, tmp_path / "whole", cut_evenly(cut.manifest, (1,)))
    logits, hidden = runner.forward(ids)
    given = {
        "manifest": to_json(cut.manifest).decode(),
        "pieces": str(cut.pieces.path),
        "folder": str(tmp_path / "two"),
        "ids": ids,
    }
    run = subprocess.run(
        [sys.executable, "-c", ON_TWO_THREADS],
        input=json.dumps(given),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.strip() == hashlib.sha256(hidden.tobytes() + logits.tobytes()).hexdigest()


def test_exact_classes_end_where_attention_is_no_longer_exact(models, tmp_path):
    path = make_llama(tmp_path / "wide", head_dim=272)
    with pytest.raises(Unsupported, match="head dimension 272, exact classes go up to 256; use a fast class"):
        partition(path, DirectorySink(tmp_path / "p"), name="m", numeric_class=numeric_class(path, "fp32"))
    fast = numeric_class(path, "fp32", fast=True)
    assert partition(path, DirectorySink(tmp_path / "p"), name="m", numeric_class=fast).geometry.head_dim == 272


def test_axes_split_differently_and_a_share_without_heads(models, text, tmp_path):
    cut = models.cut("llama-kv2", "int4")
    g = cut.manifest.geometry
    ids = text(cut.manifest, 30)
    logits, hidden = Runner(cut.manifest, cut.pieces, tmp_path / "whole", cut_evenly(cut.manifest, (1,))).forward(ids)
    everything, nothing = Range(0, g.head_groups), Range(0, 0)
    shares = [
        Cut(everything, Range(0, 1), nothing),
        Cut(nothing, Range(1, g.column_groups), Range(0, 2)),
        Cut(nothing, nothing, Range(2, g.vocab_groups)),
    ]
    other_logits, other_hidden = Runner(cut.manifest, cut.pieces, tmp_path / "split", shares).forward(ids, [11, 19])
    assert np.array_equal(other_hidden, hidden)
    assert np.array_equal(other_logits, logits)


def test_fast_classes_are_not_bit_equal_but_near(models, text, tmp_path):
    """The comparison above can fail: one product per share rounds otherwise for another split."""
    cut = models.cut("llama-kv2", "fp32", True)
    ids = text(cut.manifest, 70)
    results = []
    for number, weights in enumerate([(1,), (1, 1)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        results.append(runner.forward(ids)[1])
    assert not np.array_equal(*results)
    assert np.abs(results[0] - results[1]).max() < 1e-4 * np.abs(results[0]).max()
