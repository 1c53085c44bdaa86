"""Random checkpoints of odd shapes, cut once per session and class; what transformers says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import LLAMA3_ROPE, make_llama, make_qwen3
from cut_models import CutModels

from ganglion.wire.nouns import Manifest

SHAPES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "llama-kv2": (make_llama, {}),
    "llama-kv1-tied": (
        make_llama,
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 48,
            "intermediate_size": 100,
            "vocab_size": 300,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "llama-kv3-llama31": (
        make_llama,
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 72,
            "head_dim": 32,
            "vocab_size": 517,
            "rope_parameters": LLAMA3_ROPE,
            "dtype": "bfloat16",
            "shard_bytes": 60_000,
        },
    ),
    "llama-kv4-biases": (
        make_llama,
        {
            "num_key_value_heads": 4,
            "head_dim": 64,
            "intermediate_size": 200,
            "attention_bias": True,
            "mlp_bias": True,
            "num_hidden_layers": 3,
        },
    ),
    "llama-hd80-yarn": (
        make_llama,
        {
            "num_attention_heads": 4,
            "head_dim": 80,
            "dtype": "float16",
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3-kv2": (make_qwen3, {"attention_bias": True}),
    "qwen3-kv3-tied": (
        make_qwen3,
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 40,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
        },
    ),
}
EXACT_CLASSES = ("fp32", "int4")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> CutModels:
    def make(shape: str, path: Path) -> Path:
        write, config = SHAPES[shape]
        return write(path, **config)

    return CutModels.of(tmp_path_factory.mktemp("models"), make)


@pytest.fixture(scope="session")
def text() -> Callable[[Manifest, int], list[int]]:
    def ids(manifest: Manifest, count: int) -> list[int]:
        return np.random.default_rng(7).integers(0, manifest.geometry.vocab, count).tolist()

    return ids
