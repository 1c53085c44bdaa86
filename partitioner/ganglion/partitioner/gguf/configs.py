"""A GGUF file's metadata as the config.json of the same model, so that the families' readers need nothing special.

One function an architecture; the names are llama.cpp's on the left, transformers' on the right. What llama.cpp fixes in
its code and a file does not say is fixed here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.gguf.metadata import Metadata
from ganglion.partitioner.gguf.ropes import rope_parameters
from ganglion.partitioner.weights import Weights
from ganglion.wire.errors import InvalidDocument, Unsupported

Fields = dict[str, Any]
Tensors = dict[str, Weights]
EMBEDDING: Final = "token_embd.weight"
GEMMA_27B: Final = {"gemma2": 46, "gemma3": 62}  # layers of the size whose scores are scaled by hidden / heads
END_KEYS: Final = ("eos", "eot", "eom")


def read_config(metadata: Metadata, tensors: Tensors) -> Config:
    """The configuration of the tensors by their GGUF names; raises Unsupported naming the supported architectures."""
    build = ARCHITECTURES.get(metadata.architecture)
    if build is None:
        raise Unsupported(
            f"{metadata.path}: GGUF architecture {metadata.architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}",
            param="architectures",
        )
    return Config(build(metadata, tensors), str(metadata.path))


def _shared(metadata: Metadata, tensors: Tensors, architecture: str, model_type: str) -> Fields:
    embedding = tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise InvalidDocument(f"{metadata.path}: no matrix {EMBEDDING} in it")
    heads, hidden = metadata.whole(".attention.head_count"), metadata.whole(".embedding_length")
    context = metadata.whole(".context_length")
    head_dim = metadata.whole(".attention.key_length", hidden // heads)
    if metadata.whole(".attention.value_length", head_dim) != head_dim:
        raise Unsupported(f"{metadata.path}: values of another length than keys ({head_dim})")
    fields: Fields = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": metadata.whole(".block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if metadata.has(".feed_forward_length"):
        fields["intermediate_size"] = metadata.whole(".feed_forward_length")
    width = metadata.whole(".rope.dimension_count", head_dim)
    fields["rope_parameters"] = rope_parameters(metadata, tensors, width, context)
    if width != head_dim:
        fields["rope_parameters"]["partial_rotary_factor"] = width / head_dim
    ends = [metadata.whole(f"tokenizer.ggml.{key}_token_id", least=0) for key in END_KEYS if _has_id(metadata, key)]
    if ends:
        fields["eos_token_id"] = ends[0] if len(set(ends)) == 1 else sorted(set(ends))
    for name, key in {"bos_token_id": "bos", "pad_token_id": "padding"}.items():
        if _has_id(metadata, key):
            fields[name] = metadata.whole(f"tokenizer.ggml.{key}_token_id", least=0)
    return fields


def _has_id(metadata: Metadata, key: str) -> bool:
    return metadata.has(f"tokenizer.ggml.{key}_token_id")


def _rms(metadata: Metadata, tensors: Tensors, architecture: str, model_type: str) -> Fields:
    fields = _shared(metadata, tensors, architecture, model_type)
    return fields | {"hidden_act": "silu", "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon")}


def _has_bias(tensors: Tensors, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in tensors for name in names)


def _biases(tensors: Tensors) -> Fields:
    return {
        "attention_bias": _has_bias(tensors, "attn_q", "attn_output"),
        "mlp_bias": _has_bias(tensors, "ffn_up", "ffn_down"),
    }


def _layer_types(metadata: Metadata, layers: int, period: int) -> list[str]:
    """Sliding windows but in every `period`th layer, unless the file has a pattern of its own."""
    key = ".attention.sliding_window_pattern"
    sliding = [bool((layer + 1) % period) for layer in range(layers)]
    if metadata.has(key):
        if isinstance(metadata.values[f"{metadata.architecture}{key}"], int):
            period = metadata.whole(key)
            sliding = [bool((layer + 1) % period) for layer in range(layers)]
        else:
            sliding = [bool(flag) for flag in metadata.wholes(key)]
        if len(sliding) != layers:
            raise InvalidDocument(f"{metadata.path}: a pattern of {len(sliding)} layers for {layers} layers")
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _llama(metadata: Metadata, tensors: Tensors) -> Fields:
    experts = metadata.whole(".expert_count", 0, least=0)
    if experts:  # Mixtral; Mistral's dense models are written as this architecture too, without their window
        fields = _rms(metadata, tensors, "MixtralForCausalLM", "mixtral")
        return fields | {"num_local_experts": experts, "num_experts_per_tok": metadata.whole(".expert_used_count")}
    return _rms(metadata, tensors, "LlamaForCausalLM", "llama") | _biases(tensors)


def _qwen2(metadata: Metadata, tensors: Tensors) -> Fields:
    return _rms(metadata, tensors, "Qwen2ForCausalLM", "qwen2")


def _qwen3(metadata: Metadata, tensors: Tensors) -> Fields:
    return _rms(metadata, tensors, "Qwen3ForCausalLM", "qwen3") | {"attention_bias": _has_bias(tensors, "attn_q")}


def _qwen3_moe(metadata: Metadata, tensors: Tensors) -> Fields:
    experts = metadata.whole(".expert_count")
    return _rms(metadata, tensors, "Qwen3MoeForCausalLM", "qwen3_moe") | {
        "attention_bias": _has_bias(tensors, "attn_q"),
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": metadata.whole(".expert_used_count"),
        "moe_intermediate_size": metadata.whole(".expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": metadata.flag(".expert_weights_norm", True),
    }


def _gemma(metadata: Metadata, tensors: Tensors, architecture: str, model_type: str, period: int) -> Fields:
    fields = _rms(metadata, tensors, architecture, model_type)
    del fields["hidden_act"]
    layers, window = fields["num_hidden_layers"], metadata.whole(".attention.sliding_window", 4096, least=0)
    scalar: float = fields["head_dim"]
    if metadata.has(".attention.scale"):
        scalar = 1 / metadata.positive(".attention.scale") ** 2
    elif layers == GEMMA_27B[metadata.architecture]:
        scalar = fields["hidden_size"] // fields["num_attention_heads"]
    return fields | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "sliding_window": window or None,
        "layer_types": _layer_types(metadata, layers, period) if window else ["full_attention"] * layers,
        "attn_logit_softcapping": _optional(metadata, ".attn_logit_softcapping"),
        "final_logit_softcapping": _optional(metadata, ".final_logit_softcapping"),
    }


def _optional(metadata: Metadata, key: str) -> float | None:
    return metadata.number(key) or None if metadata.has(key) else None


def _gemma2(metadata: Metadata, tensors: Tensors) -> Fields:
    return _gemma(metadata, tensors, "Gemma2ForCausalLM", "gemma2", 2)


def _gemma3(metadata: Metadata, tensors: Tensors) -> Fields:
    fields = _gemma(metadata, tensors, "Gemma3ForCausalLM", "gemma3_text", 6)
    if not metadata.has(".rope.freq_base"):
        fields["rope_parameters"]["rope_theta"] = 1000000.0
    return _local_rope(metadata, fields, 10000.0)


def _local_rope(metadata: Metadata, fields: Fields, theta: float) -> Fields:
    """`fields` with a rope of their own, not scaled, for the layers with a window."""
    local = {"rope_type": "default", "rope_theta": metadata.positive(".rope.freq_base_swa", theta)}
    return fields | {"rope_parameters": {"full_attention": fields["rope_parameters"], "sliding_attention": local}}


def _phi3(metadata: Metadata, tensors: Tensors) -> Fields:
    fields = _rms(metadata, tensors, "Phi3ForCausalLM", "phi3")
    context = fields["max_position_embeddings"]
    original = metadata.whole(".rope.scaling.original_context_length", context)
    return fields | {
        "original_max_position_embeddings": original,
        "sliding_window": metadata.whole(".attention.sliding_window", 0, least=0) or None,
    }


def _olmo2(metadata: Metadata, tensors: Tensors) -> Fields:
    biased = {"attention_bias": _has_bias(tensors, "attn_q")}
    window = metadata.whole(".attention.sliding_window", 0, least=0)
    if not window:
        return _rms(metadata, tensors, "Olmo2ForCausalLM", "olmo2") | biased
    fields: Fields = _rms(metadata, tensors, "Olmo3ForCausalLM", "olmo3")
    fields |= biased
    return _local_rope(metadata, fields, fields["rope_parameters"]["rope_theta"]) | {
        "sliding_window": window,
        "layer_types": _layer_types(metadata, fields["num_hidden_layers"], 4),
    }


def _olmoe(metadata: Metadata, tensors: Tensors) -> Fields:
    return _rms(metadata, tensors, "OlmoeForCausalLM", "olmoe") | {
        "num_experts": metadata.whole(".expert_count"),
        "num_experts_per_tok": metadata.whole(".expert_used_count"),
        "norm_topk_prob": metadata.flag(".expert_weights_norm", False),
        "attention_bias": _has_bias(tensors, "attn_q"),
    }


def _granite(metadata: Metadata, tensors: Tensors) -> Fields:
    if metadata.whole(".expert_count", 0, least=0):
        raise Unsupported(f"{metadata.path}: granite with experts is not supported")
    fields = _rms(metadata, tensors, "GraniteForCausalLM", "granite") | _biases(tensors)
    return fields | {
        "attention_multiplier": metadata.number(".attention.scale", 1 / math.sqrt(fields["head_dim"])),
        "embedding_multiplier": metadata.number(".embedding_scale", 1.0),
        "residual_multiplier": metadata.number(".residual_scale", 1.0),
        "logits_scaling": metadata.number(".logit_scale"),
    }


def _smollm3(metadata: Metadata, tensors: Tensors) -> Fields:
    fields = _rms(metadata, tensors, "SmolLM3ForCausalLM", "smollm3") | _biases(tensors)
    layers = range(fields["num_hidden_layers"])
    return fields | {"no_rope_layer_interval": 4, "no_rope_layers": [int(bool((n + 1) % 4)) for n in layers]}


def _cohere(metadata: Metadata, tensors: Tensors) -> Fields:
    return _shared(metadata, tensors, "CohereForCausalLM", "cohere") | {
        "hidden_act": "silu",
        "layer_norm_eps": metadata.number(".attention.layer_norm_epsilon"),
        "logit_scale": metadata.number(".logit_scale"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "attention_bias": _has_bias(tensors, "attn_q"),
    }


def _cohere2(metadata: Metadata, tensors: Tensors) -> Fields:
    fields = _shared(metadata, tensors, "Cohere2ForCausalLM", "cohere2")
    return fields | {
        "hidden_act": "silu",
        "layer_norm_eps": metadata.number(".attention.layer_norm_epsilon"),
        "logit_scale": metadata.number(".logit_scale"),
        "sliding_window": metadata.whole(".attention.sliding_window"),
        "layer_types": _layer_types(metadata, fields["num_hidden_layers"], 4),
        "attention_bias": _has_bias(tensors, "attn_q"),
    }


def _gpt_oss(metadata: Metadata, tensors: Tensors) -> Fields:
    fields = _rms(metadata, tensors, "GptOssForCausalLM", "gpt_oss")
    if fields["rope_parameters"]["rope_type"] == "yarn":
        fields["rope_parameters"]["truncate"] = False
    return fields | {
        "attention_bias": _has_bias(tensors, "attn_q"),
        "intermediate_size": metadata.whole(".expert_feed_forward_length"),
        "num_local_experts": metadata.whole(".expert_count"),
        "num_experts_per_tok": metadata.whole(".expert_used_count"),
        "sliding_window": metadata.whole(".attention.sliding_window"),
        "layer_types": _layer_types(metadata, fields["num_hidden_layers"], 2),
    }


def _deepseek2(metadata: Metadata, tensors: Tensors) -> Fields:
    """DeepSeek V2; key and value lengths are those of the latent where a file has its products absorbed."""
    if metadata.whole(".expert_gating_func", 1, least=0) != 1:
        raise Unsupported(f"{metadata.path}: deepseek2 with sigmoid gates (DeepSeek V3) is not supported")
    absorbed = ".attention.key_length_mla" if metadata.has(".attention.key_length_mla") else ".attention.key_length"
    valued = ".attention.value_length_mla" if metadata.has(".attention.value_length_mla") else ".attention.value_length"
    turned, keys, values = metadata.whole(".rope.dimension_count"), metadata.whole(absorbed), metadata.whole(valued)
    if keys <= turned:
        raise InvalidDocument(f"{metadata.path}: keys of {keys} dimensions, {turned} of them turned")
    plain = {f"{metadata.architecture}.attention.{part}_length": turned for part in ("key", "value")}
    fields = _rms(
        Metadata(metadata.path, metadata.values | plain, "deepseek2"), tensors, "DeepseekV2ForCausalLM", "deepseek_v2"
    )
    if metadata.has(".rope.scaling.yarn_log_multiplier"):
        # The file keeps one of the two magnitudes; every DeepSeek V2 has them equal.
        magnitude = round(metadata.number(".rope.scaling.yarn_log_multiplier") * 10, 6)
        fields["rope_parameters"] |= {"mscale": magnitude, "mscale_all_dim": magnitude}
    groups = metadata.whole(".expert_group_count", 1)
    return fields | {
        "num_key_value_heads": fields["num_attention_heads"],
        "q_lora_rank": metadata.whole(".attention.q_lora_rank") if metadata.has(".attention.q_lora_rank") else None,
        "kv_lora_rank": metadata.whole(".attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys - turned,
        "v_head_dim": values,
        "n_routed_experts": metadata.whole(".expert_count"),
        "n_shared_experts": metadata.whole(".expert_shared_count"),
        "num_experts_per_tok": metadata.whole(".expert_used_count"),
        "moe_intermediate_size": metadata.whole(".expert_feed_forward_length"),
        "first_k_dense_replace": metadata.whole(".leading_dense_block_count", 0, least=0),
        "routed_scaling_factor": metadata.number(".expert_weights_scale", 1.0) or 1.0,
        "norm_topk_prob": metadata.flag(".expert_weights_norm", False),
        "n_group": groups,
        "topk_group": metadata.whole(".expert_group_used_count", 1),
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
    }


ARCHITECTURES: Final[dict[str, Callable[[Metadata, Tensors], Fields]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "granite": _granite,
    "smollm3": _smollm3,
    "command-r": _cohere,
    "cohere2": _cohere2,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek2,
}
