"""Random-weight mixtures of known shapes, written without torch: `python bench/mixtures.py SHAPE FOLDER`."""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHAPES: dict[str, dict[str, int]] = {
    "middle": {
        "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512,
        "vocab_size": 16384, "max_position_embeddings": 4096,
    },
    "tiny": {
        "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "vocab_size": 2048, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def _tensors(shape: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, head, inner = shape["hidden_size"], shape["head_dim"], shape["moe_intermediate_size"]
    queries, keys = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (shape["vocab_size"], hidden)
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "self_attn.q_norm.weight", (head,)
        yield prefix + "self_attn.k_norm.weight", (head,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "mlp.gate.weight", (shape["num_experts"], hidden)
        for expert in range(shape["num_experts"]):
            yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", (inner, hidden)
            yield f"{prefix}mlp.experts.{expert}.up_proj.weight", (inner, hidden)
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)


def _values(generator: np.random.Generator, dimensions: tuple[int, ...]) -> npt.NDArray[np.uint16]:
    """bfloat16 bits: ones for a norm, else Gaussian with the deviation that keeps rows at unit size."""
    if len(dimensions) == 1:
        values = np.ones(dimensions, np.float32)
    else:
        values = generator.standard_normal(dimensions, np.float32) / np.float32(dimensions[1] ** 0.5)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_mixture(folder: Path, shape_name: str, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write a Qwen3-MoE checkpoint of `shape_name` (bfloat16, tied embeddings) unless it stands already.

    `tokenizer`: folder whose tokenizer files are copied, so that text can be sent; ids beyond it never occur in text.
    """
    shape = SHAPES[shape_name]
    target = folder / f"mixture-{shape_name}"
    if (target / "config.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    header: dict[str, object] = {}
    offset = 0
    for name, dimensions in _tensors(shape):
        size = 2 * int(np.prod(dimensions))
        header[name] = {"dtype": "BF16", "shape": list(dimensions), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = np.random.default_rng(seed)
    with (target / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, dimensions in _tensors(shape):
            file.write(_values(generator, dimensions).tobytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((tokenizer / name).read_bytes())
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "attention_bias": False,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "bos_token_id": 0,
        "eos_token_id": shape["vocab_size"] - 1, "intermediate_size": 4 * shape["hidden_size"], **shape,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=1))
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    arguments = parser.parse_args()
    print(write_mixture(arguments.folder, arguments.shape, arguments.tokenizer))
