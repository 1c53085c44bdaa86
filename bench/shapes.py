"""Random-weight checkpoints of known shapes, written without torch: `python bench/shapes.py SHAPE FOLDER`."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHAPES: dict[str, dict[str, int]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "llama-160m": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
        "head_dim": 64, "intermediate_size": 3072, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "intermediate_size": 1024, "vocab_size": 2048, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def _tensors(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head = shape["hidden_size"], shape["head_dim"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    inner = shape["intermediate_size"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate_proj.weight", (inner, hidden)
        yield prefix + "mlp.up_proj.weight", (inner, hidden)
        yield prefix + "mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def _values(generator: np.random.Generator, dimensions: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """bfloat16 bits: ones for a norm, else Gaussian with the deviation that keeps rows at unit size."""
    if len(dimensions) == 1:
        values = np.ones(dimensions, np.float32)
    else:
        values = generator.standard_normal(dimensions, np.float32) / np.float32(dimensions[1] ** 0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_random(
    target: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    config: dict[str, object],
    tokenizer: Path,
    *,
    seed: int = 0,
) -> Path:
    """Write a Hugging Face checkpoint of random weights (bfloat16) to the folder `target` unless one stands there.

    tensors: names and shapes. tokenizer: folder whose tokenizer files are copied, so that text can be sent; ids beyond
    it never occur in text.
    """
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    offset = 0
    for name, dimensions in tensors:
        size = 2 * int(np.prod(dimensions))
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = np.random.default_rng(seed)
    with (target / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, dimensions in tensors:
            file.write(_values(generator, dimensions).tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((tokenizer / name).read_bytes())
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target


def write_checkpoint(folder: Path, shape_name: str, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write a Llama checkpoint of `shape_name` with tied embeddings, as `write_random` does."""
    shape = SHAPES[shape_name]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "attention_bias": False,
        "mlp_bias": False, "bos_token_id": 0, "eos_token_id": shape["vocab_size"] - 1, **shape,
    }  # fmt: skip
    return write_random(folder / shape_name, list(_tensors(shape)), config, tokenizer, seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    arguments = parser.parse_args()
    print(write_checkpoint(arguments.folder, arguments.shape, arguments.tokenizer))
