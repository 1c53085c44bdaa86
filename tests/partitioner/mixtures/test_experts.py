"""A layer of experts by itself: integer formats against dequantized numbers, how evenly it splits, what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from mixture_shapes import SHAPES
from reference_runner import Runner, cut_evenly

from ganglion.partitioner.config import Config
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.model import split_model
from ganglion.partitioner.quantize import dequantize, parse_format, quantize
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import NumericClass

FEW = ["mixtral", "olmoe", "qwen3-moe", "gpt-oss", "deepseek-groups"]


def layer_of(manifest) -> tuple[int, int]:
    """Layer and place of the last layer's experts."""
    layer = len(manifest.layers) - 1
    return layer, [one.kind for one in manifest.layers[layer].segments].index("mixture")


def partial_of(cut, folder, rows: np.ndarray, weights=(1,)) -> np.ndarray:
    runner = Runner(cut.manifest, cut.pieces, folder, cut_evenly(cut.manifest, weights))
    delta = np.zeros(rows.shape, np.float64 if cut.manifest.numeric_class.exact else np.float32)
    layer, place = layer_of(cut.manifest)
    feeds = {"res": rows, "delta": delta}
    return sum(runner.sessions[rank, layer, place][0].run(["partial"], feeds)[0] for rank in range(len(weights)))


def experts_of(reference: torch.nn.Module, rows: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """What transformers' last layer of experts makes of `rows`, and the experts that were chosen."""
    layer = reference.model.layers[-1]
    router = getattr(layer.mlp, "gate", None) or layer.mlp.router
    chosen: set[int] = set()
    handle = router.register_forward_hook(lambda module, given, out: chosen.update(out[-1].unique().tolist()))
    with torch.no_grad():
        out = layer.mlp(layer.post_attention_layernorm(torch.from_numpy(rows)[None]))
    handle.remove()
    return (out[0] if isinstance(out, tuple) else out)[0].numpy(), chosen


def rounded(reference: torch.nn.Module, form, name: str) -> torch.nn.Module:
    """`reference` with the last layer's experts as the format holds them."""
    model = copy.deepcopy(reference)

    def round_one(matrix: np.ndarray) -> np.ndarray:
        return dequantize(quantize(np.ascontiguousarray(matrix), form), form, matrix.shape[1])

    turned = SHAPES[name].family == "GptOss"
    for key, weight in model.model.layers[-1].mlp.named_parameters():
        if "gate.weight" in key or "router" in key or key.endswith("bias"):
            continue
        stack = weight.detach().numpy()
        stack = stack[None] if stack.ndim == 2 else stack
        new = np.stack([round_one(one.T).T if turned else round_one(one) for one in stack])
        weight.data = torch.from_numpy(new).reshape(weight.shape).clone()
    return model


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("weight_format", ["int4", "int8"])
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_integer_experts_are_the_dequantized_ones(name, weight_format, fast, mixtures, tmp_path):
    block = 16 if fast else 32  # an attention group of olmoe has 16 inputs
    cut = mixtures.cut(name, weight_format, fast, block)
    hidden = cut.manifest.geometry.hidden
    rows = np.random.default_rng(3).standard_normal((40, hidden)).astype(np.float32)
    reference = mixtures.reference(name)
    expected, chosen = experts_of(rounded(reference, parse_format(f"{weight_format}-{block}"), name), rows)
    unrounded, _ = experts_of(reference, rows)
    partial = partial_of(cut, tmp_path, rows, (1, 1))

    def error(of: np.ndarray) -> float:
        return float(np.linalg.norm(partial - of) / np.linalg.norm(of))

    assert len(chosen) > 2, "the router is degenerate: the comparison would prove little"
    assert error(expected) < 0.02  # what is left is the int8 rounding of rows inside the kernel
    assert weight_format == "int8" or error(expected) < error(unrounded) / 3


def test_a_row_alone_with_its_expert_has_the_bits_that_it_has_in_a_batch(mixtures, tmp_path):
    for name in ("mixtral-window", "deepseek-lite"):
        cut = mixtures.cut(name)
        rows = np.random.default_rng(5).standard_normal((60, cut.manifest.geometry.hidden)).astype(np.float32)
        together = partial_of(cut, tmp_path / name, rows)
        for row in range(0, 60, 7):
            alone = partial_of(cut, tmp_path / f"{name}-{row}", rows[row : row + 1])
            assert np.array_equal(alone[0], together[row])


def real(name: str) -> Config:
    """A published configuration, as far as it is read."""
    common = {"max_position_embeddings": 4096, "vocab_size": 32000, "tie_word_embeddings": False}
    found = {
        "mixtral": {
            "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32, "num_local_experts": 8,
        },
        "olmoe": {
            "architectures": ["OlmoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 1024,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 16, "num_experts": 64,
        },
        "qwen3-moe": {
            "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128,
            "num_attention_heads": 32, "num_key_value_heads": 4, "num_hidden_layers": 48, "num_experts": 128,
            "moe_intermediate_size": 768, "norm_topk_prob": True,
        },
        "gpt-oss": {
            "architectures": ["GptOssForCausalLM"], "hidden_size": 2880, "intermediate_size": 2880, "head_dim": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 24, "num_local_experts": 32,
        },
        "deepseek": {
            "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 27, "n_routed_experts": 64,
            "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "q_lora_rank": None,
        },
    }  # fmt: skip
    return Config(found[name] | common, name)


@pytest.mark.parametrize(
    ("name", "weight_format", "block", "exact", "groups", "width"),
    [
        ("mixtral", "int4", 32, True, 4, 3584),
        ("mixtral", "int4", 128, False, 16, 896),
        ("olmoe", "int4", 32, True, 4, 256),
        ("qwen3-moe", "int4", 32, True, 4, 192),
        ("qwen3-moe", "int4", 128, False, 6, 128),
        ("gpt-oss", "int4", 32, True, 4, 736),
        ("gpt-oss", "int4", 64, False, 15, 192),
        ("gpt-oss", "fp32", 0, True, 4, 720),
        ("deepseek", "int4", 32, True, 4, 352),
        ("deepseek", "int4", 128, False, 11, 128),
    ],
)
def test_the_groups_of_published_models(name, weight_format, block, exact, groups, width):
    config = real(name)
    model = family_of(config).read(config)
    split = split_model(model, NumericClass(format=weight_format, block=block, exact=exact))
    assert (split.geometry.column_groups, split.width_of(model.expert_intermediate)) == (groups, width)


@pytest.mark.parametrize(
    ("name", "weight_format", "block", "words"),
    [
        ("mixtral", "fp16", 0, "experts run in fp32, int4, and int8 with a block"),
        ("olmoe", "int8", 0, "experts run in fp32, int4, and int8 with a block"),
        ("deepseek-dense-first", "int4", 32, "block 32 does not divide the hidden size 80"),
    ],
)
def test_classes_without_experts_are_refused_by_name(name, weight_format, block, words, mixtures, tmp_path):
    path = mixtures.checkpoint(name)
    chosen = NumericClass(format=weight_format, block=block, exact=True)
    with pytest.raises(Unsupported, match=words):
        partition(path, DirectorySink(tmp_path), name=name, numeric_class=chosen)


def test_int8_of_a_mixture_is_in_blocks(mixtures):
    assert numeric_class(mixtures.checkpoint("olmoe"), "int8").name == "int8-32-exact"


def test_a_fast_class_takes_a_block_that_divides_what_experts_take(mixtures):
    config = real("gpt-oss")
    model = family_of(config).read(config)
    assert model.block_inputs == 64
    with pytest.raises(Unsupported, match="block 128 does not divide"):
        split_model(model, NumericClass(format="int4", block=128, exact=False))
    narrow = replace(model, hidden=2856)
    with pytest.raises(Unsupported, match="does not divide the hidden size 2856"):
        split_model(narrow, NumericClass(format="int4", block=16, exact=False))
