"""Every mixture against transformers in fp32, and bit for bit against itself over splits and chunkings."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from mixture_shapes import SHAPES
from reference_runner import Cut, Runner, cut_evenly

from ganglion.wire.nouns import Range, to_json

RELATIVE = 1e-4  # largest difference of a logit at any position, over the largest logit at any position
NOT_IN_32 = {"deepseek-dense-first"}  # its hidden size is no multiple of 32

ON_TWO_THREADS = """
import hashlib, json, sys
from pathlib import Path
from reference_runner import Runner, cut_evenly
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, from_json
found = {}
for name, given in json.load(sys.stdin).items():
    manifest = from_json(Manifest, given["manifest"], limit_bytes=MANIFEST_BYTES)
    shares = cut_evenly(manifest, (2, 1))
    runner = Runner(manifest, DirectorySink(Path(given["pieces"])), Path(given["folder"]), shares, threads=2)
    found[name] = hashlib.sha256(runner.forward(given["ids"], [33, 1, 36])[0].tobytes()).hexdigest()
print(json.dumps(found))
"""


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def chunks(tokens: int, number: int) -> list[int] | None:
    """A few ways to chunk a text, one row alone among them."""
    ways = [None, [17, 1, 1, 2, tokens - 21], [1] * 5 + [tokens - 38, 33]]
    return ways[number % len(ways)]


def same_bits(cut, ids, tmp_path) -> np.ndarray:
    """The logits, after uneven splits and chunkings gave the same ones."""
    first = None
    for number, weights in enumerate([(1,), (3, 1), (2, 5, 1)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        logits, hidden = runner.forward(ids, chunks(len(ids), number))
        if first is None:
            first = logits, hidden
        assert np.array_equal(logits, first[0]), weights
        assert np.array_equal(hidden, first[1]), weights
    return first[0]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_transformers_and_do_not_depend_on_the_split(name, mixtures, tmp_path):
    expected = mixtures.expected(name)
    logits = same_bits(mixtures.cut(name), mixtures.ids(name), tmp_path)
    assert difference(logits, expected) < RELATIVE
    assert (logits.argmax(1) == expected.argmax(1)).all()
    assert len(set(expected.argmax(1))) > 10  # the comparison is about something


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_integer_classes_do_not_depend_on_the_split(name, weight_format, mixtures, tmp_path):
    block = 16 if name in NOT_IN_32 else 32
    same_bits(mixtures.cut(name, weight_format, block=block), mixtures.ids(name), tmp_path)


def test_two_threads_give_the_bits_of_one(mixtures, tmp_path):
    """In a process of its own: a process has one pool of threads."""
    given, expected = {}, {}
    for name, weight_format in (("gpt-oss-kv3", "fp32"), ("deepseek-lite", "int4")):
        cut, ids = mixtures.cut(name, weight_format), mixtures.ids(name)
        runner = Runner(cut.manifest, cut.pieces, tmp_path / name, cut_evenly(cut.manifest, (1,)))
        expected[name] = hashlib.sha256(runner.forward(ids)[0].tobytes()).hexdigest()
        pieces, folder = str(cut.pieces.path), str(tmp_path / f"{name}-two")
        given[name] = {"manifest": to_json(cut.manifest).decode(), "pieces": pieces, "folder": folder, "ids": ids}
    run = subprocess.run(
        [sys.executable, "-c", ON_TWO_THREADS],
        input=json.dumps(given),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(run.stdout) == expected


@pytest.mark.parametrize("name", ["mixtral-window", "olmoe", "qwen3-moe", "gpt-oss-kv3", "deepseek-lite"])
def test_greedy_tokens_are_transformers(name, mixtures, tmp_path):
    cut, prompt = mixtures.cut(name), mixtures.ids(name)[:9]
    expected = list(prompt)
    for _ in range(12):
        with torch.no_grad():
            logits = mixtures.reference(name)(torch.tensor([expected]), use_cache=False).logits[0, -1]
        expected.append(int(logits.argmax()))
    assert len(set(expected[9:])) > 3, "the reference loops: the comparison would prove little"
    for number, weights in enumerate([(1,), (3, 1), (1, 5, 2)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        assert runner.greedy(prompt, 12) == expected[9:]


@pytest.mark.parametrize("name", ["mixtral", "olmoe-normalized", "qwen3-moe-steps", "gpt-oss", "deepseek-groups"])
def test_fast_classes_are_near_on_any_split(name, mixtures, tmp_path):
    cut, ids, expected = mixtures.cut(name, "fp32", True), mixtures.ids(name), mixtures.expected(name)
    assert cut.manifest.geometry.column_groups > 4
    for number, weights in enumerate([(1,), (2, 5, 1)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        assert difference(runner.forward(ids, chunks(len(ids), number))[0], expected) < RELATIVE


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss", "deepseek-lite"])
def test_a_device_with_all_experts_of_a_layer_and_one_with_none(name, mixtures, tmp_path):
    cut, ids = mixtures.cut(name), mixtures.ids(name)
    g = cut.manifest.geometry
    whole = Runner(cut.manifest, cut.pieces, tmp_path / "whole", cut_evenly(cut.manifest, (1,)))
    columns, nothing = Range(0, g.column_groups), Range(0, 0)
    shares = [
        Cut(Range(0, g.head_groups), nothing, Range(0, g.vocab_groups)),
        Cut(nothing, columns, nothing),
    ]
    apart = Runner(cut.manifest, cut.pieces, tmp_path / "apart", shares)
    assert np.array_equal(apart.forward(ids, [19, len(ids) - 19])[0], whole.forward(ids)[0])


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3-moe", "gpt-oss", "deepseek-groups"])
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_agents_accept_every_graph(name, fast, mixtures):
    segments = mixtures.cut(name, "int4", fast).check_graphs()
    assert sum(kind.startswith("mixture") for kind in segments) == 1
