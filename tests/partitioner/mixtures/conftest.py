"""Random mixtures, cut and run by transformers once per session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mixture_shapes import SHAPES, make_mixture
from transformers import AutoModelForCausalLM

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import Manifest


@dataclass(frozen=True)
class CutModel:
    path: Path
    manifest: Manifest
    pieces: DirectorySink


@dataclass(frozen=True)
class Mixtures:
    """Everything lazily, once per session."""

    checkpoint: Callable[[str], Path]
    cut: Callable[..., CutModel]
    reference: Callable[[str], torch.nn.Module]
    ids: Callable[[str], list[int]]
    expected: Callable[[str], np.ndarray]  # transformers' logits of `ids`


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Mixtures:
    root = tmp_path_factory.mktemp("mixtures")

    @cache
    def checkpoint(name: str) -> Path:
        return make_mixture(root / name, SHAPES[name])

    @cache
    def cut(name: str, weight_format: str = "fp32", fast: bool = False, block: int | None = None) -> CutModel:
        path = checkpoint(name)
        chosen = numeric_class(path, weight_format, fast=fast, block=block)  # type: ignore[arg-type]
        sink = DirectorySink(root / "pieces")
        return CutModel(path, partition(path, sink, name=name, numeric_class=chosen), sink)

    @cache
    def reference(name: str) -> torch.nn.Module:
        # Other implementations of attention have no sinks, others of experts want sizes in multiples of 4.
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.float32, **eager).eval()

    def ids(name: str) -> list[int]:
        vocab = SHAPES[name].config.get("vocab_size", 283)
        return [int(i) for i in np.random.default_rng(7).integers(0, vocab, SHAPES[name].tokens)]

    @cache
    def expected(name: str) -> np.ndarray:
        with torch.no_grad():
            return reference(name)(torch.tensor([ids(name)]), use_cache=False).logits[0].numpy()

    return Mixtures(checkpoint, cut, reference, ids, expected)
