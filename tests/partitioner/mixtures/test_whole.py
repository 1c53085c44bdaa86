"""Mixtures cut expert by expert: against transformers, and bit for bit wherever an expert lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from mixture_shapes import SHAPES
from reference_runner import Runner, apart, cut_evenly

RELATIVE = 1e-4  # largest difference of a logit at any position, over the largest logit at any position
FEW = ["mixtral", "olmoe", "qwen3-moe", "gpt-oss", "deepseek-groups"]


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def check(cut, ids: Sequence[int], tmp_path, chunks: Sequence[int] | None = None) -> np.ndarray:
    """The logits, after experts in other places (and rows in other chunks) gave the same ones."""
    first, _ = Runner(cut.manifest, cut.pieces, tmp_path / "whole", cut_evenly(cut.manifest, (1,))).forward(ids)
    runner = Runner(cut.manifest, cut.pieces, tmp_path / "apart", apart(cut.manifest, 3))
    assert np.array_equal(runner.forward(ids, chunks)[0], first)
    return first


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_transformers_wherever_experts_lie(name, mixtures, tmp_path):
    cut, expected = mixtures.cut(name, experts="whole"), mixtures.expected(name)
    ids = mixtures.ids(name)
    logits = check(cut, ids, tmp_path, [17, 1, len(ids) - 18])
    assert difference(logits, expected) < RELATIVE
    assert (logits.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
def test_integer_classes_do_not_depend_on_the_place(name, weight_format, mixtures, tmp_path):
    check(mixtures.cut(name, weight_format, experts="whole"), mixtures.ids(name)[:30], tmp_path)
