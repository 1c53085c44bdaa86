"""Rope caches against transformers' own, for every scaling; unknown ones are refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import LLAMA3_ROPE, TINY
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ganglion.partitioner.config import Config
from ganglion.partitioner.rope import Rope, read_ropes
from ganglion.wire.errors import InvalidDocument, Unsupported

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
CASES = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": LLAMA3_ROPE,
    "llama3-as-released": LLAMA31,
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn-mscale": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512,
        "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0, "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512,
        "attention_factor": 1.5,
    },
}  # fmt: skip


def read_rope(config: Config, head_dim: int, context: int) -> Rope:
    ((_, rope),) = read_ropes(config, head_dim, context)
    return rope


@pytest.mark.parametrize("head_dim", [16, 64, 80])
@pytest.mark.parametrize("case", CASES)
def test_caches_equal_transformers(case, head_dim):
    context = 2048
    parameters = dict(CASES[case])
    config = LlamaConfig(
        **(TINY | {"head_dim": head_dim, "max_position_embeddings": context, "rope_parameters": dict(parameters)})
    )
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(context)[None])
    cos, sin = read_rope(Config({"rope_parameters": parameters}, "test"), head_dim, context).rows(0, context)
    half = head_dim // 2
    # A frequency may differ in its last bit (6e-8), which position 2048 makes a phase of 1.2e-4 at most.
    assert np.abs(cos - expected_cos[0, :, :half].numpy()).max() < 1.3e-4
    assert np.abs(sin - expected_sin[0, :, :half].numpy()).max() < 1.3e-4
    assert np.median(np.abs(cos - expected_cos[0, :, :half].numpy())) == 0


def test_blocks_of_rows_are_the_whole_cache():
    rope = read_rope(Config({"rope_parameters": LLAMA31}, "test"), 64, 4096)
    whole = rope.rows(0, 4096)
    assert np.array_equal(whole[0][1000:3000], rope.rows(1000, 3000)[0])
    assert whole[0].dtype == np.float32
    assert whole[1].shape == (4096, 32)


def test_old_and_new_configurations_read_the_same():
    scaling = {key: value for key, value in LLAMA31.items() if key != "rope_theta"}
    old = Config({"rope_theta": 500000.0, "rope_scaling": scaling}, "old")
    older = Config({"rope_theta": 500000.0, "rope_scaling": scaling | {"type": "llama3"}}, "older")
    new = Config({"rope_parameters": LLAMA31}, "new")
    assert read_rope(old, 64, 1024) == read_rope(older, 64, 1024) == read_rope(new, 64, 1024)
    assert read_rope(Config({"rope_scaling": None}, "none"), 64, 1024).scaling == 1.0


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"rope_scaling": {"rope_type": "proportional"}}, Unsupported, "proportional"),
        ({"rope_scaling": {"rope_type": "longrope"}}, InvalidDocument, "short_factor is not a list of 32"),
        ({"rope_scaling": LONG | {"long_factor": [1.0] * 31}}, InvalidDocument, "long_factor is not a list of 32"),
        ({"rope_scaling": LONG | {"long_factor": [0.0] * 32}}, InvalidDocument, "long_factor is not a list of 32"),
        ({"rope_scaling": LONG, "original_max_position_embeddings": 1}, Unsupported, "an original context of 1"),
        ({"rope_theta": 1}, InvalidDocument, "rope_theta is 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, Unsupported, "partial_rotary"),
        ({"rope_parameters": {"rope_type": "linear"}}, InvalidDocument, "factor is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, InvalidDocument, "factor is 'x'"),
        ({"rope_parameters": [1]}, InvalidDocument, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, Unsupported, "this family turns whole heads"),
        ({"rope_theta": float("nan")}, InvalidDocument, "rope_theta"),
    ],
)
def test_other_configurations_are_refused(fields, error, said):
    with pytest.raises(error, match=said):
        read_rope(Config(fields, "config.json"), 64, 1024)


def test_heads_that_turn_in_part():
    def turned(factor: float) -> Rope:
        config = Config({"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": factor}}, "config.json")
        ((_, rope),) = read_ropes(config, 64, 1024, partial=True)
        return rope

    narrow = Config({"rope_theta": 100.0}, "config.json")
    assert turned(0.25) == read_rope(narrow, 16, 1024)
    assert turned(1.0) == read_rope(narrow, 64, 1024)
    for factor in (0.01, 0.3, 1.5):
        with pytest.raises(Unsupported, match="partial_rotary_factor"):
            turned(factor)


def test_long_ropes_have_two_variants_unless_the_context_is_the_original_one():
    config = Config({"rope_scaling": LONG, "original_max_position_embeddings": 512}, "config.json")
    (short, first), (long, second) = read_ropes(config, 64, 1024)
    assert (short, long) == (512, 1024)
    assert first.scaling == second.scaling > 1
    assert first.inverse_frequencies[5] == 2 * second.inverse_frequencies[5]
    assert read_ropes(config, 64, 512)[0][1].inverse_frequencies == first.inverse_frequencies
    assert [context for context, _ in read_ropes(config, 64, 300)] == [300]
