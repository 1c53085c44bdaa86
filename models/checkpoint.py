"""A trained model as a Hugging Face checkpoint, and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from corpus import END_OF_TEXT, END_OF_TURN, token_id, tokenizer_config
from llama import SHAPES, Llama, Shape
from mixture import BALANCE, Mixture
from safetensors.torch import load_file, save
from tokenizers import Tokenizer


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` in one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(path)


def new_model(name: str) -> Llama:
    """A model of the shape of that name, at random."""
    shape = SHAPES[name]
    return Mixture(shape) if shape.experts else Llama(shape)


def model_config(shape: Shape, end_of_text: int) -> dict[str, Any]:
    """`config.json` for transformers."""
    if shape.experts:
        kind: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": shape.intermediate,
            "norm_topk_prob": True,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": BALANCE,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    else:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    return kind | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }


def export(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a Hugging Face checkpoint; the weights last, each file in one step."""
    end_of_text = token_id(tokenizer, END_OF_TEXT)
    generation = {
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_text, token_id(tokenizer, END_OF_TURN)],
        "pad_token_id": end_of_text,
        "do_sample": False,
    }
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    texts = {
        "config.json": json.dumps(model_config(model.shape, end_of_text), indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": tokenizer_config(),
        "tokenizer.json": tokenizer.to_str(),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    weights = {name: weight.to("cpu", torch.bfloat16).contiguous() for name, weight in model.checkpoint().items()}
    write_atomically(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def load_checkpoint(folder: Path, device: torch.device) -> Llama:
    """The model exported to `folder`, for inference; its name is the folder's."""
    model = new_model(folder.name)
    model.load_checkpoint({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return model.to(device).requires_grad_(False)
