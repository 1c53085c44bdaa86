"""A small writer of GGUF files from transformers' models, as llama.cpp's converter writes them.

Names come from the gguf package's own map; what the converter does to rows, norms and experts is done here again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

ARCHITECTURES = {
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "MixtralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
    "Qwen3MoeForCausalLM": gguf.MODEL_ARCH.QWEN3MOE,
    "Gemma2ForCausalLM": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3ForCausalLM": gguf.MODEL_ARCH.GEMMA3,
    "Phi3ForCausalLM": gguf.MODEL_ARCH.PHI3,
    "Olmo2ForCausalLM": gguf.MODEL_ARCH.OLMO2,
    "Olmo3ForCausalLM": gguf.MODEL_ARCH.OLMO2,
    "OlmoeForCausalLM": gguf.MODEL_ARCH.OLMOE,
    "GraniteForCausalLM": gguf.MODEL_ARCH.GRANITE,
    "SmolLM3ForCausalLM": gguf.MODEL_ARCH.SMOLLM3,
    "CohereForCausalLM": gguf.MODEL_ARCH.COMMAND_R,
    "Cohere2ForCausalLM": gguf.MODEL_ARCH.COHERE2,
    "GptOssForCausalLM": gguf.MODEL_ARCH.GPT_OSS,
    "DeepseekV2ForCausalLM": gguf.MODEL_ARCH.DEEPSEEK2,
}
PAIRED = {"LlamaForCausalLM", "MixtralForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM"}


def paired_rows(weights: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half beside row i of its second: the order that llama.cpp turns pairs in."""
    rows = [
        weights[head * width + half * (width // 2) + pair]
        for width in [len(weights) // heads]
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]
    return np.stack(rows)


def converted(architecture: str, state: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A state dict by the names and in the layouts that the converter hands to gguf's map."""
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, original in state.items():
        value = original
        if architecture in PAIRED and (at := re.search(r"\.([qk])_proj\.", name)):
            value = paired_rows(value, config["num_attention_heads" if at[1] == "q" else "num_key_value_heads"])
        if architecture.startswith("Gemma") and name.endswith("norm.weight"):
            value = value + np.float32(1)
        if at := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            merged = at[1].replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
            merged = merged if architecture == "MixtralForCausalLM" else at[1]
            stacks.setdefault(f"{merged}.{at[3]}.weight", {})[int(at[2])] = value
            continue
        if architecture == "GptOssForCausalLM" and ".experts." in name:
            base, part = name.rsplit(".", 1)
            if part.endswith("_bias"):
                halves = [(part[:-5], value)]
                suffix = "bias"
            else:
                halves, suffix = [(part, value.swapaxes(1, 2))], "weight"
            if part.startswith("gate_up"):
                outputs = halves[0][1]
                halves = [("gate_proj", outputs[:, 0::2]), ("up_proj", outputs[:, 1::2])]
            found |= {f"{base}.{half}.{suffix}": np.ascontiguousarray(array) for half, array in halves}
            continue
        if name.endswith("kv_b_proj.weight") and config.get("absorbed"):
            heads, key, rest = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
            both = value.reshape(heads, key + rest, -1)
            found[name.replace("kv_b_proj", "k_b_proj")] = np.ascontiguousarray(both[:, :key].swapaxes(1, 2))
            found[name.replace("kv_b_proj", "v_b_proj")] = np.ascontiguousarray(both[:, key:])
            continue
        found[f"{name}.weight" if name.endswith("self_attn.sinks") else name] = value
    return found | {name: np.stack([of[n] for n in sorted(of)]) for name, of in stacks.items()}


def add_metadata(writer: gguf.GGUFWriter, architecture: str, config: dict[str, Any]) -> None:
    """The keys that the converter writes for a configuration of transformers 5."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    absorbed = config.get("absorbed", False)
    writer.add_head_count_kv(1 if absorbed else config["num_key_value_heads"])
    ropes = config["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    if rope["rope_type"] in {"linear", "yarn"}:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }.items():
            if rope.get(key) is not None:
                add(rope[key])
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if config.get("rms_norm_eps") is not None:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("layer_norm_eps") is not None:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    experts = config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if architecture != "DeepseekV2ForCausalLM" and config.get("head_dim") and architecture != "GraniteForCausalLM":
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture in PAIRED:
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(
            config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        )
    _OWN.get(architecture, lambda writer, config: None)(writer, config)
    for key, add in {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "pad_token_id": writer.add_pad_token_id,
    }.items():
        if config.get(key) is not None:
            add(config[key])


def _gemma(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _phi3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    share = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * config["hidden_size"]) // config["num_attention_heads"])
    writer.add_sliding_window(config["sliding_window"] or 0)
    if rope["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        magnitude = (
            (1 + np.log(scale) / np.log(config["original_max_position_embeddings"])) ** 0.5 if scale > 1 else 1.0
        )
        writer.add_rope_scaling_attn_factors(float(magnitude))


def _granite(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])


def _cohere(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_logit_scale(config["logit_scale"])
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _gpt_oss(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])


def _deepseek2(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    turned, nope, rank = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["kv_lora_rank"]
    if config.get("absorbed"):
        writer.add_key_length(rank + turned)
        writer.add_value_length(rank)
        writer.add_key_length_mla(nope + turned)
        writer.add_value_length_mla(config["v_head_dim"])
    else:
        writer.add_key_length(nope + turned)
        writer.add_value_length(config["v_head_dim"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_rope_dimension_count(turned)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)
    if config["rope_parameters"].get("mscale_all_dim"):
        writer.add_rope_scaling_yarn_log_mul(0.1 * config["rope_parameters"]["mscale_all_dim"])


def _olmo3(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


_OWN: dict[str, Callable[[gguf.GGUFWriter, dict[str, Any]], None]] = {
    "Gemma2ForCausalLM": _gemma,
    "Gemma3ForCausalLM": _gemma,
    "Olmo3ForCausalLM": _olmo3,
    "Phi3ForCausalLM": _phi3,
    "GraniteForCausalLM": _granite,
    "CohereForCausalLM": _cohere,
    "Cohere2ForCausalLM": _cohere,
    "GptOssForCausalLM": _gpt_oss,
    "DeepseekV2ForCausalLM": _deepseek2,
    "Qwen3MoeForCausalLM": lambda writer, config: writer.add_expert_feed_forward_length(
        config["moe_intermediate_size"]
    ),
}


def llama3_factors(rope: dict[str, Any], width: int) -> np.ndarray:
    """What the converter writes as rope_freqs.weight."""
    factors = []
    for index in range(0, width, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (index / width)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_model(
    path: Path, config: Any, state: dict[str, torch.Tensor], kind: Kind = Kind.F32, **writer_options: Any
) -> Path:
    """Write a model's weights in `kind` (vectors in float32, as the converter does) and its configuration."""
    described = config.to_dict()
    architecture = described["architectures"][0]
    code = ARCHITECTURES[architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[code], **writer_options)
    writer.add_type(gguf.GGUFType.MODEL)
    described["absorbed"] = getattr(config, "absorbed", False)
    add_metadata(writer, architecture, described)
    names = gguf.get_tensor_name_map(code, config.num_hidden_layers)
    arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
    for name, array in converted(architecture, arrays, described).items():
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert ours is not None, name
        if array.ndim == 1 or ours.endswith("_norm.weight") or array.shape[-1] % 32:
            writer.add_tensor(ours, array.astype(np.float32))
        else:
            writer.add_tensor(ours, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    rope = described["rope_parameters"]
    width = described.get("head_dim") or config.hidden_size // config.num_attention_heads
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, width))
    if rope.get("rope_type") == "longrope":
        for size in ("long", "short"):
            writer.add_tensor(f"rope_factors_{size}.weight", np.array(rope[f"{size}_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def write_gguf_model() -> Callable[..., Path]:
    return write_model
