"""Torch's numbers against ONNX Runtime's on the same shards: logits, tokens, formats, windows of drafted tokens."""

from __future__ import annotations

import numpy as np
import pytest
from family_shapes import SHAPES
from torch_cuts import Cut, tokens_of

FAMILIES = [
    "llama-kv1-biases",
    "mistral-window",
    "qwen2-kv3-windows",
    "qwen3-kv1",
    "gemma2-kv2-tied",
    "gemma3-kv1-wide",
    "phi3-kv1-long",
    "olmo2-kv2",
    "granite-kv2",
    "smollm3-kv3-windows",
    "cohere-kv3-biases",
    "mixtral-window",
    "gpt-oss",
    "deepseek-groups",
]
CHUNKS = (20, 1, 7, 1, 1, 13, 17)


def distance(found: np.ndarray, true: np.ndarray) -> float:
    """Root mean square of the difference, as a part of the truth's own."""
    return float(np.sqrt(((found - true) ** 2).mean() / (true**2).mean()))


def check_tokens(found: np.ndarray, true: np.ndarray, gap: float) -> int:
    """Greedy tokens of logits differ only where the truth's first two are within `gap`; how many do."""
    other = np.flatnonzero(found.argmax(1) != true.argmax(1))
    for row in other:
        second, first = np.sort(true[row])[-2:]
        assert first - second <= gap, f"row {row}: {first - second} apart"
    return len(other)


@pytest.mark.parametrize("shape", FAMILIES)
def test_float32_logits_are_those_of_onnx_runtime(cuts, shape):
    cut: Cut = cuts(shape)
    ids = tokens_of(cut, sum(CHUNKS))
    true = cut.run("ort").sequence(ids, CHUNKS)
    found = cut.run("torch:cpu:fp32").sequence(ids, CHUNKS)
    assert np.abs(found - true).max() <= 1e-4 * np.abs(true).max()
    assert check_tokens(found, true, 1e-4 * float(np.abs(true).max())) <= 1


@pytest.mark.parametrize("weights", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("shape", ["llama-kv1-biases", "granite-kv1-biases", "qwen2-kv3-windows"])
def test_dequantized_weights_are_no_further_from_float32_than_rounded_rows(cuts, shape, weights):
    # Nothing here is rounded but the weights; ONNX Runtime's products also round the rows to 8 bits.
    cut: Cut = cuts(shape, weights)
    ids = tokens_of(cut, sum(CHUNKS))
    true = cuts(shape).run("ort").sequence(ids, CHUNKS)
    ours = cut.run("torch:cpu:fp32").sequence(ids, CHUNKS)
    theirs = cut.run("ort").sequence(ids, CHUNKS)
    assert distance(ours, true) <= 1.05 * distance(theirs, true)
    assert distance(ours, theirs) <= 0.25


@pytest.mark.parametrize("shape", ["gpt-oss", "mixtral"])
def test_quantized_experts(cuts, shape):
    cut: Cut = cuts(shape, "int8")
    ids = tokens_of(cut, sum(CHUNKS))
    true = cuts(shape).run("ort").sequence(ids, CHUNKS)
    found = cut.run("torch:cpu:fp32").sequence(ids, CHUNKS)
    assert distance(found, true) <= 1.05 * distance(cut.run("ort").sequence(ids, CHUNKS), true)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("shape", ["llama-kv2", "gemma2-kv2-tied", "olmo2-kv2", "mistral-window"])
def test_16_bits_choose_other_tokens_at_near_ties_only(cuts, shape, kind):
    cut: Cut = cuts(shape)
    ids = tokens_of(cut, 60)
    true = cut.run("ort").sequence(ids, CHUNKS)
    found = cut.run(f"torch:cpu:{kind}").sequence(ids, CHUNKS)
    part = {"bf16": 0.05, "fp16": 0.01}[kind]  # of the largest logit
    assert distance(found, true) <= part
    assert check_tokens(found, true, part * float(np.abs(true).max())) <= 6


@pytest.mark.parametrize("shape", ["llama-kv2", "mistral-window", "gemma2-kv2-tied"])
def test_a_window_is_verified_as_single_tokens_are_drawn(cuts, shape):
    cut: Cut = cuts(shape)
    run, prompt = cut.run("torch:cpu:fp32"), tokens_of(cut, 24)
    alone, rows = run.greedy(prompt, 30)
    true = cut.run("ort").greedy(prompt, 30)[0]
    ties = sum(one != other for one, other in zip(alone, true, strict=True))
    assert ties == 0 or check_tokens(run.sequence([*prompt, *alone], (24, 30)), rows, 1e-4) <= 1
    # Drafts of which the fourth is wrong: what was run for it and after it is taken back by the next entry's start.
    ids, at, passes = list(prompt), len(prompt) - 1, 0
    run.step([(2, 0, at)], ids[:at])
    while len(ids) < len(prompt) + 29:
        drafted = [*alone[len(ids) - len(prompt) :][:3], 0, 1][: len(prompt) + 30 - len(ids)]
        logits = run.step([(2, at, 1 + len(drafted))], [ids[at], *drafted])
        drawn = [int(one) for one in logits.argmax(1)]
        accepted = next((n for n, token in enumerate(drafted) if token != drawn[n]), len(drafted))
        ids += drawn[: accepted + 1]
        at, passes = len(ids) - 1, passes + 1
    assert ids[len(prompt) :][:29] == alone[:29]
    assert passes < 15


def test_every_shape_of_the_table_has_a_family_here():
    families = {shape.family for shape in SHAPES.values()}
    covered = {SHAPES[shape].family for shape in FAMILIES if shape in SHAPES}
    assert families - covered <= {"Olmo3", "Cohere2"}  # the same segments as Olmo2 and Cohere, with windows
