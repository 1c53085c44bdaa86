"""The cut model against transformers in fp32: logits at every position, greedy tokens, any shares; and mutants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference_runner import Cut, Runner, cut_evenly
from transformers import AutoModelForCausalLM

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import Range

RELATIVE = 1e-4  # largest difference of a logit at any position, over the largest logit at any position
SHAPES = [
    "llama-kv2",
    "llama-kv1-tied",
    "llama-kv3-llama31",
    "llama-kv4-biases",
    "llama-hd80-yarn",
    "qwen3-kv2",
    "qwen3-kv3-tied",
]
SHARES = [(1,), (1, 1), (1, 3), (2, 1, 1), (1, 1, 1, 1), (5, 1, 2, 1)]


def logits_of(reference: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor([list(ids)])).logits[0].numpy()


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_logits_equal_transformers(shape, fast, models, text, tmp_path):
    cut = models.cut(shape, "fp32", fast)
    ids = text(cut.manifest, 90)
    expected = logits_of(models.reference(shape), ids)
    for number, weights in enumerate(SHARES):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        logits, _ = runner.forward(ids, [17, 1, 1, 71])
        assert logits.shape == expected.shape
        assert difference(logits, expected) < RELATIVE, weights


@pytest.mark.parametrize("shape", ["llama-kv2", "llama-kv3-llama31", "qwen3-kv3-tied"])
def test_greedy_tokens_equal_transformers(shape, models, text, tmp_path):
    cut = models.cut(shape, "fp32")
    prompt = text(cut.manifest, 12)
    reference = models.reference(shape)
    expected = list(prompt)
    for _ in range(24):
        expected.append(int(logits_of(reference, expected)[-1].argmax()))
    assert len(set(expected[12:])) > 6, "the reference loops: the comparison would prove little"
    for number, weights in enumerate([(1,), (2, 1, 1)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        assert runner.greedy(prompt, 24) == expected[12:]


@pytest.mark.parametrize("mutant", ["rope off", "wrong key-value group", "dropped partial", "dropped residual"])
@pytest.mark.parametrize("shape", ["llama-kv2", "qwen3-kv3-tied"])
def test_mutants_are_caught(mutant, shape, models, text, tmp_path):
    cut = models.cut(shape, "fp32")
    ids = text(cut.manifest, 40)
    expected = logits_of(models.reference(shape), ids)
    shares = cut_evenly(cut.manifest, (1, 1))
    spoil = None
    if mutant == "wrong key-value group":  # the first share runs the second one's heads, too
        shares = [Cut(shares[1].heads, shares[0].columns, shares[0].vocab), shares[1]]
        if shape == "qwen3-kv3-tied":
            shares[0] = Cut(Range(1, 2), shares[0].columns, shares[0].vocab)
    elif mutant == "dropped partial":
        spoil = lambda segment, rank, partial: partial * (segment != 1 or rank != 1)  # noqa: E731
    runner = Runner(cut.manifest, cut.pieces, tmp_path, shares, spoil=spoil)
    if mutant == "rope off":
        cos, sin = runner.ropes["default"]
        runner.ropes["default"] = [np.ones_like(cos), np.zeros_like(sin)]
    elif mutant == "dropped residual":
        run = runner._layers

        def dropped(*args, **options):
            res, delta = run(*args, **options)
            return res * 0, delta

        runner._layers = dropped
    logits, _ = runner.forward(ids)
    assert difference(logits, expected) > 100 * RELATIVE


def test_the_demo_model_equals_transformers(tmp_path):
    path = Path(__file__).parents[2] / "models/ganglion/models/demo"
    if not (path / "model.safetensors").exists():
        pytest.skip(f"{path} is not there: models/train.py makes it")
    sink = DirectorySink(tmp_path / "pieces")
    manifest = partition(path, sink, name="demo", numeric_class=numeric_class(path, "fp32"))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = np.random.default_rng(3).integers(0, manifest.geometry.vocab, 200).tolist()
    expected = logits_of(reference, ids)
    for number, weights in enumerate([(1,), (3, 1, 2)]):
        runner = Runner(manifest, sink, tmp_path / str(number), cut_evenly(manifest, weights))
        logits, _ = runner.forward(ids, [150, 1, 49])
        assert difference(logits, expected) < RELATIVE
        assert (logits.argmax(1) == expected.argmax(1)).all()
