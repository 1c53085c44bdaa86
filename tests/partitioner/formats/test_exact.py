"""Exact classes of the other formats: hidden states and logits bit-equal for any split and any chunking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_runner import Runner, cut_evenly

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink

WAYS = [((1,), [70]), ((1, 1), [33, 1, 36]), ((3, 1), [1] * 70), ((1, 5), [2] * 35), ((4, 1, 2, 3), [65, 1, 4])]
CLASSES: list[tuple[str, int | None]] = [("int8", None), ("int8", 32), ("int8", 16), ("int4", 16), ("fp16", None)]


@pytest.mark.parametrize(("weight_format", "block"), CLASSES)
@pytest.mark.parametrize("shape", ["llama-kv1-tied", "llama-hd80-yarn", "qwen3-kv2"])
def test_any_split_and_any_chunking_is_bit_equal(
    shape: str, weight_format: str, block: int | None, models: Any, text: Any, tmp_path: Path
) -> None:
    path = models.checkpoint(shape)
    chosen = numeric_class(path, weight_format, block=block)  # type: ignore[arg-type]
    pieces = DirectorySink(tmp_path / "pieces")
    manifest = partition(path, pieces, name=shape, numeric_class=chosen)
    ids = text(manifest, 70)
    found = []
    for number, (weights, chunks) in enumerate(WAYS):
        runner = Runner(manifest, pieces, tmp_path / str(number), cut_evenly(manifest, weights))
        found.append(runner.forward(ids, chunks))
    for logits, hidden in found[1:]:
        assert np.array_equal(hidden, found[0][1])
        assert np.array_equal(logits, found[0][0])
    plain = models.cut(shape, "fp32")
    expected = Runner(plain.manifest, plain.pieces, tmp_path / "plain", cut_evenly(plain.manifest, (1,))).forward(ids)
    alike = float(np.corrcoef(found[0][0].ravel(), expected[0].ravel())[0, 1])
    assert alike > (0.7 if weight_format == "int4" else 0.99)
    if weight_format == "fp16" and shape == "llama-hd80-yarn":  # a float16 source loses nothing
        assert np.array_equal(found[0][0], expected[0])
