"""The parameter table of the families' tests, which `docs/models.md` is generated from, too.

Shapes are odd on purpose: heads and columns that do not divide evenly, windows shorter than the text, soft caps and
multipliers that matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from checkpoints import LLAMA3_ROPE


@dataclass(frozen=True)
class Shape:
    """A random checkpoint of `family` (transformers' class without ForCausalLM), and how many tokens it is run on."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    tokens: int = 60
    dtype: str = "float32"


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
KV1 = {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 80}  # head dimension 16
KV3 = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "vocab_size": 300}  # head dimension 16
BIASES = {"attention_bias": True}
TIED = {"tie_word_embeddings": True}
SLIDING, FULL = "sliding_attention", "full_attention"
NESTED = {FULL: LINEAR | {"rope_theta": 50000.0}, SLIDING: {"rope_type": "default", "rope_theta": 5000.0}}


def long_rope(pairs: int) -> dict[str, Any]:
    """A longrope for heads of which `pairs` pairs turn."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [2.0 + 0.5 * pair for pair in range(pairs)],
    }


SHAPES: dict[str, Shape] = {
    "llama-kv2": Shape("Llama", {"rope_parameters": DYNAMIC, "num_hidden_layers": 3}),
    "llama-kv3-tied": Shape("Llama", KV3 | TIED | {"rope_parameters": LINEAR}, dtype="bfloat16"),
    "llama-kv1-biases": Shape(
        "Llama", KV1 | BIASES | {"mlp_bias": True, "head_dim": 32, "rope_parameters": LLAMA3_ROPE}
    ),
    "mistral-window": Shape("Mistral", {"sliding_window": 7}),
    "mistral-kv1-tied": Shape("Mistral", KV1 | TIED | {"sliding_window": None, "rope_parameters": YARN}),
    "mistral-kv3": Shape("Mistral", KV3 | {"sliding_window": 16, "head_dim": 32, "hidden_size": 72}, dtype="bfloat16"),
    "qwen2-kv2": Shape("Qwen2", {"rope_parameters": LINEAR}),
    "qwen2-kv3-windows": Shape(
        "Qwen2",
        KV3 | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen2-kv1-tied": Shape(
        "Qwen2",
        KV1
        | TIED
        | {
            "use_sliding_window": True,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": YARN,
        },
    ),
    "qwen3-kv2-windows": Shape(
        "Qwen3",
        BIASES | {"head_dim": 32, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3-kv3-tied": Shape("Qwen3", KV3 | TIED | {"head_dim": 16, "hidden_size": 40}, dtype="bfloat16"),
    "qwen3-kv1": Shape("Qwen3", KV1 | {"head_dim": 48, "rope_parameters": YARN}),
    "gemma2-kv2-tied": Shape(
        "Gemma2",
        TIED
        | {
            "head_dim": 32,
            "hidden_size": 72,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        dtype="bfloat16",
    ),
    "gemma2-kv3-biases": Shape(
        "Gemma2",
        KV3
        | BIASES
        | {
            "head_dim": 16,
            "layer_types": [FULL, SLIDING],
            "sliding_window": 5,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_parameters": LINEAR,
            "hidden_activation": "gelu",
        },
    ),
    "gemma2-kv1-wide": Shape(
        "Gemma2",
        {
            "head_dim": 256,
            "hidden_size": 40,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "sliding_window": 70,
            "attn_logit_softcapping": 2.0,
        },
        tokens=150,
    ),
    "gemma3-kv2-tied": Shape(
        "Gemma3",
        TIED
        | {"head_dim": 32, "hidden_size": 72, "num_hidden_layers": 4, "sliding_window_pattern": 3, "sliding_window": 8},
    ),
    "gemma3-kv3-biases": Shape(
        "Gemma3",
        KV3
        | BIASES
        | {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, FULL, SLIDING],
            "sliding_window": 6,
            "final_logit_softcapping": 3.0,
            "rope_parameters": NESTED,
        },
    ),
    "gemma3-kv1-wide": Shape(
        "Gemma3",
        {
            "head_dim": 192,
            "hidden_size": 40,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": [SLIDING, FULL],
            "sliding_window": 30,
        },
        tokens=150,
    ),
    "phi3-kv2": Shape("Phi3", {"sliding_window": 9}),
    "phi3-kv3-tied": Shape("Phi3", KV3 | TIED | {"intermediate_size": 100}, dtype="bfloat16"),
    "phi3-kv1-long": Shape(
        "Phi3",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 96,
            "original_max_position_embeddings": 32,
            "rope_parameters": long_rope(8) | {"partial_rotary_factor": 0.5},
        },
    ),
    "olmo2-kv2": Shape("Olmo2", {"num_hidden_layers": 3}),
    "olmo2-kv3-biases": Shape("Olmo2", KV3 | BIASES | {"rope_parameters": LINEAR}),
    "olmo2-kv1-tied": Shape("Olmo2", KV1 | TIED | {"rope_parameters": YARN}, dtype="bfloat16"),
    "olmo3-kv2": Shape(
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default"}},
        },
    ),
    "olmo3-kv3-biases": Shape("Olmo3", KV3 | BIASES | {"layer_types": [FULL, SLIDING], "sliding_window": 11}),
    "olmo3-kv1-tied": Shape("Olmo3", KV1 | TIED | {"sliding_window": 5, "rope_parameters": NESTED}),
    "granite-kv2": Shape(
        "Granite",
        {
            "attention_multiplier": 0.6,
            "embedding_multiplier": 3.5,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "num_hidden_layers": 3,
        },
    ),
    "granite-kv3-tied": Shape(
        "Granite",
        KV3 | TIED | {"residual_multiplier": 0.22, "attention_multiplier": 0.25, "rope_parameters": LLAMA3_ROPE},
    ),
    "granite-kv1-biases": Shape("Granite", KV1 | BIASES | {"mlp_bias": True, "logits_scaling": 8.0}, dtype="bfloat16"),
    "smollm3-kv2-tied": Shape("SmolLM3", TIED | {"num_hidden_layers": 4}),
    "smollm3-kv3-windows": Shape(
        "SmolLM3",
        KV3 | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7, "rope_parameters": YARN},
    ),
    "smollm3-kv1-biases": Shape("SmolLM3", KV1 | BIASES | {"mlp_bias": True, "no_rope_layers": [0, 1]}),
    "cohere-kv2-tied": Shape("Cohere", TIED | {"num_hidden_layers": 3, "logit_scale": 0.3}),
    "cohere-kv3-biases": Shape("Cohere", KV3 | BIASES | {"use_qk_norm": True, "rope_parameters": LINEAR}),
    "cohere-kv1": Shape("Cohere", KV1 | {"use_qk_norm": True, "rope_parameters": LLAMA3_ROPE}, dtype="bfloat16"),
    "cohere2-kv2-tied": Shape("Cohere2", TIED | {"num_hidden_layers": 4, "sliding_window": 8}),
    "cohere2-kv3-biases": Shape("Cohere2", KV3 | BIASES | {"layer_types": [FULL, SLIDING], "sliding_window": 11}),
    "cohere2-kv1": Shape("Cohere2", KV1 | {"sliding_window": 5, "sliding_window_pattern": 2, "rope_parameters": YARN}),
}
# The rope types that each family's reader takes; those by layer type have one for layers with a window, one for others.
ROPES: dict[str, tuple[str, ...]] = {
    shape.family: ("default", "linear", "dynamic", "llama3", "yarn", "longrope") for shape in SHAPES.values()
} | {"Phi3": ("default", "longrope")}
BY_LAYER_TYPE = ("Gemma3", "Olmo3")
# Configurations that a family refuses: the fields changed, and what is said.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "Llama": [
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "turns whole heads"),
        ({"hidden_act": "relu2"}, "activation 'relu2'"),
        ({"head_dim": 24}, "head dimension 24; multiples of 16"),
    ],
    "Mistral": [({"layer_types": [FULL, SLIDING]}, "layer_types is not supported")],
    "Qwen2": [
        ({"layer_types": [FULL, SLIDING]}, "sliding_attention layers without use_sliding_window"),
        ({"layer_types": [FULL, "linear_attention"]}, "layer type 'linear_attention'"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 2 layers"),
    ],
    "Qwen3": [({"layer_types": ["chunked_attention", FULL]}, "layer type 'chunked_attention'")],
    "Gemma2": [({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported")],
    "Gemma3": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ({"rope_parameters": LINEAR}, "rope_parameters that are not by layer type"),
        ({"rope_parameters": {FULL: YARN | {"truncate": False}}}, "truncate is not supported"),
    ],
    "Phi3": [
        ({"rope_parameters": LINEAR}, "rope type 'linear'; supported are default, longrope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.7}}, "multiples of 16 dimensions can turn"),
        ({"rope_parameters": long_rope(7)}, "short_factor is not a list of 8 numbers"),
    ],
    "Olmo2": [({"hidden_act": "xielu"}, "activation 'xielu'")],
    "Olmo3": [({"rope_parameters": None, "rope_theta": 10000.0}, "rope_theta other than 500000")],
    "Granite": [({"residual_multiplier": 0}, "residual_multiplier is '0', a number above 0")],
    "SmolLM3": [
        ({"layer_types": [FULL, SLIDING]}, "sliding_attention layers without a window"),
        ({"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 2 layers"),
    ],
    "Cohere": [({"logit_scale": -1.0}, "logit_scale is '-1.0', a number above 0")],
    "Cohere2": [({"sliding_window": None}, "sliding_window is missing")],
}
FIRST = {shape.family: name for name, shape in reversed(SHAPES.items())}  # the first shape of every family


def of_family(family: str) -> dict[str, Shape]:
    """The shapes of one family."""
    return {name: shape for name, shape in SHAPES.items() if shape.family == family}
