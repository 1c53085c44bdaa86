"""Random-weight mixtures of known shapes, written without torch: `python bench/mixtures.py SHAPE FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from shapes import write_random

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


def write_mixture(folder: Path, shape_name: str, tokenizer: Path, *, seed: int = 0) -> Path:
    """Write a Qwen3-MoE checkpoint of `shape_name` with tied embeddings, as `write_random` does."""
    shape = SHAPES[shape_name]
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "attention_bias": False,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "bos_token_id": 0,
        "eos_token_id": shape["vocab_size"] - 1, "intermediate_size": 4 * shape["hidden_size"], **shape,
    }  # fmt: skip
    return write_random(folder / f"mixture-{shape_name}", list(_tensors(shape)), config, tokenizer, seed=seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    arguments = parser.parse_args()
    print(write_mixture(arguments.folder, arguments.shape, arguments.tokenizer))
