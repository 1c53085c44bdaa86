"""A checkpoint written as GGUF: our own reader gives back the same configuration and numbers, rounded once."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import make_llama
from gguf import GGMLQuantizationType as Kind

from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.families import family_of
from ganglion.partitioner.gguf.writing import BITS, KINDS, write_gguf
from ganglion.wire.errors import InvalidRequest, Unsupported

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "m", seed=5, hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize("kind", KINDS)
def test_read_back_bit_for_bit(made: Path, tmp_path: Path, kind: str) -> None:
    ours = open_checkpoint(made)
    seen: list[tuple[int, int]] = []
    path = write_gguf(ours, tmp_path / "m.gguf", kind, progress=lambda *done: seen.append(done))  # type: ignore[arg-type]
    back = open_checkpoint(path)
    assert seen[-1][0] == seen[-1][1] > 0
    assert list(tmp_path.iterdir()) == [path]
    assert set(back.tensors) == set(ours.tensors)
    family = family_of(ours.config)
    assert family_of(back.config).read(back.config) == family.read(ours.config)
    for name, tensor in back.tensors.items():
        exact = ours.tensors[name].rows(0, tensor.shape[0])
        if exact.ndim > 1:  # blocks are of rows, which move whole
            rounded = gguf.quants.quantize(exact, Kind[kind])
            exact = gguf.quants.dequantize(rounded, Kind[kind])
            assert rounded.nbytes * 8 == exact.size * BITS[kind]  # type: ignore[index]
        np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), exact, err_msg=name)


def test_scaled_frequencies_travel(tmp_path: Path) -> None:
    from ganglion.partitioner.rope import read_ropes

    path = make_llama(tmp_path / "m", seed=5, hidden_size=64, max_position_embeddings=512, rope_parameters=LLAMA3)
    ours = open_checkpoint(path)
    back = open_checkpoint(write_gguf(ours, tmp_path / "m.gguf", "F16"))
    head = ours.config.whole("hidden_size") // ours.config.whole("num_attention_heads")
    for context in (0, -1):
        mine = read_ropes(ours.config, head, 512)[context][1].inverse_frequencies
        np.testing.assert_allclose(read_ropes(back.config, head, 512)[context][1].inverse_frequencies, mine, rtol=1e-5)


def test_what_is_not_written(made: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    ours = open_checkpoint(made)
    with pytest.raises(InvalidRequest, match="F16, Q4_0, Q8_0"):
        write_gguf(ours, tmp_path / "m.gguf", "Q2_K")  # type: ignore[arg-type]
    other = replace(ours.config, fields=ours.config.fields | {"architectures": ["GptOssForCausalLM"]})
    with pytest.raises(Unsupported, match="GptOssForCausalLM"):
        write_gguf(replace(ours, config=other), tmp_path / "m.gguf", "F16")
    assert not any(tmp_path.iterdir())
