"""Checkpoints of the table's shapes, cut and run by transformers once per session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make
from family_shapes import SHAPES
from transformers import AutoModelForCausalLM, GenerationConfig

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import Manifest


@dataclass(frozen=True)
class CutModel:
    path: Path
    manifest: Manifest
    pieces: DirectorySink


@dataclass(frozen=True)
class Families:
    """Everything lazily, once per session."""

    checkpoint: Callable[[str], Path]
    cut: Callable[..., CutModel]
    reference: Callable[[str], torch.nn.Module]
    ids: Callable[[str], list[int]]
    expected: Callable[[str], np.ndarray]  # transformers' logits of `ids`


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    root = tmp_path_factory.mktemp("families")

    @cache
    def checkpoint(name: str) -> Path:
        shape = SHAPES[name]
        return make(root / name, shape.family, dtype=shape.dtype, **shape.config)

    @cache
    def cut(name: str, weight_format: str = "fp32", fast: bool = False) -> CutModel:
        path = checkpoint(name)
        chosen = numeric_class(path, weight_format, fast=fast)  # type: ignore[arg-type]
        sink = DirectorySink(root / "pieces")
        return CutModel(path, partition(path, sink, name=name, numeric_class=chosen), sink)

    @cache
    def reference(name: str) -> torch.nn.Module:
        # Other implementations of attention leave out soft caps.
        path = checkpoint(name)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        model.generation_config = GenerationConfig()  # with no token that ends a text
        return model

    def ids(name: str) -> list[int]:
        vocab = SHAPES[name].config.get("vocab_size", 283)
        return [int(i) for i in np.random.default_rng(7).integers(0, vocab, SHAPES[name].tokens)]

    @cache
    def expected(name: str) -> np.ndarray:
        with torch.no_grad():
            return reference(name)(torch.tensor([ids(name)]), use_cache=False).logits[0].numpy()

    return Families(checkpoint, cut, reference, ids, expected)
