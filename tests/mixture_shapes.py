"""Odd shapes of every mixture, and random checkpoints of them whose routers choose all kinds of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import LLAMA3_ROPE, TINY, write_tokenizer

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LATENT_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}


@dataclass(frozen=True)
class Shape:
    """A checkpoint: transformers' class without ForCausalLM, and its configuration beyond `TINY`."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    tokens: int = 70


DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 40,
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
SHAPES: dict[str, Shape] = {
    "mixtral": Shape("Mixtral", {"intermediate_size": 90, "num_local_experts": 3}),
    "mixtral-one-kv-tied": Shape(
        "Mixtral",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 96,
            "intermediate_size": 52,
            "num_local_experts": 5,
            "num_experts_per_tok": 1,
            "vocab_size": 300,
            "rope_parameters": LINEAR,
            "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
    "mixtral-window": Shape(
        "Mixtral",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "intermediate_size": 75,
            "num_local_experts": 8,
            "num_experts_per_tok": 5,
            "sliding_window": 11,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "olmoe": Shape(
        "Olmoe", {"num_key_value_heads": 4, "intermediate_size": 40, "num_experts": 9, "num_experts_per_tok": 4}
    ),
    "olmoe-normalized": Shape(
        "Olmoe",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "intermediate_size": 27,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
            "rope_parameters": DYNAMIC,
        },
    ),
    "olmoe-tied": Shape(
        "Olmoe",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 66,
            "num_experts": 4,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": True,
            "vocab_size": 333,
            "rope_parameters": YARN,
        },
        "bfloat16",
    ),
    "qwen3-moe": Shape(
        "Qwen3Moe",
        {
            "head_dim": 32,
            "moe_intermediate_size": 44,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3-moe-steps": Shape(
        "Qwen3Moe",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "head_dim": 16,
            "intermediate_size": 130,
            "moe_intermediate_size": 21,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 2,
            "rope_parameters": LINEAR,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-moe-window": Shape(
        "Qwen3Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "moe_intermediate_size": 96,
            "num_experts": 6,
            "num_experts_per_tok": 6,
            "use_sliding_window": True,
            "sliding_window": 9,
            "rope_parameters": YARN,
        },
        "float16",
    ),
    "gpt-oss": Shape(
        "GptOss",
        {
            "head_dim": 16,
            "intermediate_size": 56,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 9,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "gpt-oss-kv3": Shape(
        "GptOss",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "head_dim": 32,
            "intermediate_size": 27,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 3,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": YARN | {"truncate": False},
        },
        "bfloat16",
    ),
    "gpt-oss-unbiased-tied": Shape(
        "GptOss",
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "hidden_size": 64,
            "head_dim": 16,
            "intermediate_size": 33,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "swiglu_alpha": 1.5,
            "swiglu_limit": 2.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "deepseek-lite": Shape("DeepseekV2", DEEPSEEK | {"rope_parameters": LATENT_YARN}),
    "deepseek-groups": Shape(
        "DeepseekV2",
        DEEPSEEK
        | {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "hidden_size": 96,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 33,
            "first_k_dense_replace": 0,
            "q_lora_rank": 40,
            "routed_scaling_factor": 2.5,
            "qk_nope_head_dim": 48,
            "v_head_dim": 64,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "deepseek-dense-first": Shape(
        "DeepseekV2",
        DEEPSEEK
        | {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "hidden_size": 80,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "intermediate_size": 100,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 32,
            "v_head_dim": 16,
            "kv_lora_rank": 36,
            "n_routed_experts": 5,
            "num_experts_per_tok": 1,
            "rope_parameters": LINEAR,
        },
        "bfloat16",
    ),
    "deepseek-wide": Shape(  # the heads of DeepSeek-V2-Lite
        "DeepseekV2",
        DEEPSEEK
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "kv_lora_rank": 64,
            "rope_parameters": LATENT_YARN,
        },
        tokens=90,
    ),
}


# By family: fields of its first shape that are refused, and words of the error.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "Mixtral": [
        ({"num_experts_per_tok": 4}, "4 experts are chosen of 3"),
        ({"hidden_act": "gelu"}, "experts with activation gelu; supported is silu"),
    ],
    "Olmoe": [({"clip_qkv": 8.0}, "clip_qkv is not supported")],
    "Qwen3Moe": [({"decoder_sparse_step": 0}, "decoder_sparse_step is '0'")],
    "GptOss": [({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers")],
    "DeepseekV2": [
        ({"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'; supported is softmax"),
        ({"moe_layer_freq": 2}, "moe_layer_freq other than 1"),
        ({"norm_topk_prob": True}, "norm_topk_prob is not supported"),
        ({"num_key_value_heads": 2}, "fewer key-value heads"),
        ({"qk_nope_head_dim": 24}, "heads of 24 plain and 16 turned dimensions"),
        ({"v_head_dim": 64}, "values of at most 48"),
    ],
}


def make_mixture(path: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a random checkpoint of `shape` to the folder `path` and return it."""
    kind = getattr(transformers, f"{shape.family}ForCausalLM")
    config = kind.config_class(**(TINY | {"pad_token_id": None} | shape.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "embed_tokens" in name:  # a large tied embedding would have every token say itself
                    weight.normal_(0.0, 0.1 if config.tie_word_embeddings else 0.3)
                elif name.endswith("bias"):
                    weight.normal_(0.0, 0.3)
                elif name.endswith("sinks"):
                    weight.normal_(0.0, 1.0)
                elif weight.dim() == 1:
                    weight.normal_(1.0, 0.2)
                else:
                    inputs = weight.shape[1 if shape.family == "GptOss" and weight.dim() == 3 else -1]
                    weight.normal_(0.0, 1.5 / inputs**0.5)
    model = model.to(getattr(torch, shape.dtype))
    model.config.dtype = shape.dtype
    model.save_pretrained(path)
    write_tokenizer(path)
    return path
