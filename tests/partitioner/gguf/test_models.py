"""Models of every architecture, written as llama.cpp's converter writes them: the same configuration and tensors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from ganglion.partitioner.checkpoint import open_checkpoint, read_config
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Corrupt, InvalidDocument, Unsupported

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_key_value_heads": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "llama tied, linear": (
        "Llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
        },
    ),
    "llama 3": ("Llama", {"head_dim": 64, "rope_parameters": LLAMA3}),
    "llama 3 of a short context": (
        "Llama",
        {"head_dim": 32, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32, "factor": 8.0}},
    ),
    "llama 3 with factors of its own": (
        "Llama",
        {"head_dim": 64, "rope_parameters": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 40.0}},
    ),
    "llama yarn": ("Llama", {"head_dim": 16, "rope_parameters": YARN}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 moe": (
        "Qwen3Moe",
        EXPERTS | {"head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True, "attention_bias": True},
    ),
    "gemma2": ("Gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 32,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": ("Phi3", {"original_max_position_embeddings": 256, "sliding_window": 64}),
    "phi3 long": (
        "Phi3",
        {
            "hidden_size": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "long_factor": [round(1 + 0.35 * n, 2) for n in range(24)],
                "short_factor": [round(1 + 0.05 * n, 2) for n in range(24)],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 32,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "olmoe": ("Olmoe", EXPERTS),
    "granite": (
        "Granite",
        {
            "attention_multiplier": 0.0078125,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "command-r": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.0625}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 5, "logit_scale": 0.25, "sliding_window": 32, "head_dim": 16}),
    "gpt-oss": (
        "GptOss",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 32,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "deepseek2": ("DeepseekV2", LATENT | {"absorbed": True}),
    "deepseek2 before absorption": (
        "DeepseekV2",
        LATENT | {"q_lora_rank": 32, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
}
# What a file does not hold, and what transformers keeps for itself.
UNSAID = {"transformers_version", "dtype", "architectures", "_name_or_path", "absorbed", "_sliding_window_pattern"}


def build(case: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model of the case as transformers saves it: its configuration and tensors."""
    family, overrides = CASES[case]
    options = BASE | {name: value for name, value in overrides.items() if name != "absorbed"}
    kind = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    config = kind(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.4)
    model.save_pretrained(folder)
    config.architectures = [f"{family}ForCausalLM"]
    config.absorbed = bool(overrides.get("absorbed"))
    return config, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_configuration_and_tensors(case, tmp_path, write_gguf_model):
    config, state = build(case, tmp_path / "model")
    path = write_gguf_model(tmp_path / "model.gguf", config, state)
    opened = open_checkpoint(path)
    fields = opened.config.fields
    assert fields["architectures"] == config.architectures
    assert fields["model_type"] == config.model_type
    options = {k: copy.deepcopy(v) for k, v in fields.items() if k not in {"architectures", "model_type"}}
    rebuilt = type(config)(**options).to_dict()
    expected = config.to_dict()
    unsaid = UNSAID | ({"rope_parameters"} if case == "llama 3 with factors of its own" else set())
    different = {
        name: (rebuilt.get(name), expected[name])
        for name in expected
        if name not in unsaid and rebuilt.get(name) != expected[name]
    }
    assert not different
    assert (opened.bos_id, opened.eos_ids) == (1, (2,))
    assert read_config(path).fields == fields
    assert set(opened.tensors) == set(state)
    for name, tensor in state.items():
        ours, whole = opened.tensor(name, *tensor.shape), tensor.float().numpy()
        rows = ours.rows(0, whole.shape[0])
        assert rows.dtype == np.float32
        shifted = config.model_type.startswith("gemma") and name.endswith("norm.weight")
        np.testing.assert_allclose(rows, whole, rtol=0, atol=3e-7 if shifted else 0)
        start, stop = len(whole) // 3, len(whole) - 1
        if stop > start:
            assert np.array_equal(ours.rows(start, stop), rows[start:stop])
            raw = np.frombuffer(ours.raw_rows(start, stop), np.float32)
            assert np.array_equal(raw, rows[start:stop].reshape(-1))
        if whole.ndim == 2:
            assert np.array_equal(ours.columns(3, 15), rows[:, 3:15])
            assert np.array_equal(ours.columns(2, whole.shape[1]), rows[:, 2:])
        if whole.ndim == 3:
            for index in range(len(whole)):
                part = ours.part(index)
                assert part.shape == whole.shape[1:]
                assert np.array_equal(part.rows(5, 40), whole[index, 5:40])
                assert np.array_equal(part.columns(7, 50), whole[index][:, 7:50])
    assert sum(t.elements for t in opened.tensors.values()) == sum(t.numel() for t in state.values())


@pytest.mark.parametrize("case", CASES)
def test_the_same_pieces_as_the_folder(case, tmp_path, write_gguf_model):
    config, state = build(case, tmp_path / "model")
    path = write_gguf_model(tmp_path / "model.gguf", config, state)
    sink = DirectorySink(tmp_path / "pieces")
    first, second = (
        partition(source, sink, name="model", numeric_class=numeric_class(source, "fp32"))
        for source in (tmp_path / "model", path)
    )
    assert second.source_digest != first.source_digest
    if case == "llama 3 with factors of its own":  # the file's factors are applied as they are: equal but for rounding
        (ours,), (theirs,) = second.ropes["default"], first.ropes["default"]
        for name in ("cos", "sin"):
            tables = [
                np.frombuffer(sink.file(getattr(r, name).digest).read_bytes(), np.float32) for r in (ours, theirs)
            ]
            np.testing.assert_allclose(*tables, rtol=0, atol=1e-4)
        second = msgspec.structs.replace(second, ropes=first.ropes)
    assert second == msgspec.structs.replace(first, source_digest=second.source_digest, tokenizer={})


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_stored_types(case, kind, tmp_path, write_gguf_model):
    config, state = build(case, tmp_path / "model")
    opened = open_checkpoint(write_gguf_model(tmp_path / "model.gguf", config, state, kind))
    for name, tensor in state.items():
        whole = tensor.numpy()
        ours = opened.tensor(name, *whole.shape)
        errors = np.abs(ours.rows(0, len(whole)) - whole)
        blocks = np.abs(whole.reshape(-1, 32)).max(axis=1) if whole.ndim == 2 else np.abs(whole)
        steps = {Kind.F16: 2.0**-11, Kind.BF16: 2.0**-8, Kind.Q8_0: 1 / 127, Kind.Q4_0: 1 / 8}
        allowed = blocks * (steps[kind] if whole.ndim == 2 else 0)
        assert (errors.reshape(len(allowed), -1) <= allowed[:, None] * 1.02).all()
        assert (ours.packing is not None) == (whole.ndim == 2 and kind in {Kind.Q8_0, Kind.Q4_0})


def test_a_split_file(tmp_path, write_gguf_model):
    config, state = build("qwen3", tmp_path / "model")
    whole = open_checkpoint(write_gguf_model(tmp_path / "whole.gguf", config, state))
    write_gguf_model(tmp_path / "part.gguf", config, state, split_max_tensors=9)
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    opened = open_checkpoint(parts[0])
    assert set(opened.tensors) == set(whole.tensors)
    assert opened.config.fields == whole.config.fields
    assert opened.digest != whole.digest
    with pytest.raises(InvalidDocument, match=rf"not the first of {len(parts)} files; name part-00001-of-"):
        open_checkpoint(parts[1])
    renamed = parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(InvalidDocument, match=rf"one of {len(parts)} files"):
        open_checkpoint(renamed)
    renamed.rename(parts[0])
    parts[2].rename(tmp_path / "kept")
    with pytest.raises(Corrupt, match=rf"{parts[2].name}: one of .* missing"):
        open_checkpoint(parts[0])
    (tmp_path / "kept").rename(parts[2])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(Corrupt, match=r"does not say that it is file 3"):
        open_checkpoint(parts[0])


def test_equal_headers_give_equal_digests(tmp_path, write_gguf_model):
    config, state = build("qwen2", tmp_path / "model")
    first = open_checkpoint(write_gguf_model(tmp_path / "a.gguf", config, state)).digest
    assert open_checkpoint(write_gguf_model(tmp_path / "b.gguf", config, state)).digest == first
    config.rope_parameters["rope_theta"] = 20000.0
    assert open_checkpoint(write_gguf_model(tmp_path / "c.gguf", config, state)).digest != first


def test_what_is_not_known_is_refused_by_name(tmp_path, write_gguf_model):
    config, state = build("qwen2", tmp_path / "model")
    path = write_gguf_model(tmp_path / "model.gguf", config, state)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.9.ffn_up.weight"))
    with pytest.raises(Unsupported, match=r"tensor blk\.9\.ffn_up\.weight belongs to no part of a Qwen2ForCausalLM"):
        open_checkpoint(path)
    path.write_bytes(data.replace(b"qwen2", b"qwen9"))
    with pytest.raises(Unsupported, match=r"architecture 'qwen9' is not supported; supported are llama, qwen2, "):
        open_checkpoint(path)
