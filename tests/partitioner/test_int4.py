"""int4 against numpy: the quantization itself, one product bit by bit of its arithmetic, and whole models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from reference_runner import Runner, cut_evenly

from ganglion.partitioner.quantize import dequantize, parse_format, quantize
from ganglion.partitioner.weights import Packed

RNG = np.random.default_rng(11)


def rounded(weights: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed values, scales, and the numbers that they stand for."""
    form = parse_format(f"int4-{block}")
    packed = quantize(weights, form)
    return packed.values, packed.scales, dequantize(packed, form, weights.shape[1])


def dumb_quantize(row: np.ndarray, block: int) -> np.ndarray:
    """Dequantized `row`, number by number."""
    out = []
    for start in range(0, len(row), block):
        part = row[start : start + block]
        extreme = max(part, key=abs)
        scale = np.float32(extreme / -8)
        for number in part:
            level = 0 if scale == 0 else max(-8, min(7, round(float(number) / float(scale))))
            out.append(level * float(scale))
    return np.array(out)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("inputs", [16, 100, 256])
def test_quantize_equals_the_dumb_one(block, inputs):
    weights = RNG.standard_normal((6, inputs)).astype(np.float32)
    weights[0] = 0
    weights[1, :3] = [1e-44, -1e-44, 0]
    packed, scales, dequantized = rounded(weights, block)
    assert packed.shape == (6, -(-inputs // block), block // 2)
    for row, expected in zip(dequantized, weights, strict=True):
        step = np.abs(scales).max()
        # A number half-way between two levels may round either way: 1/scale is a float32.
        assert np.abs(row - dumb_quantize(expected, block)).max() <= step * 1.001
        assert (np.abs(row - dumb_quantize(expected, block)) > 1e-6).mean() < 0.02
    assert np.abs(dequantized - weights).max() <= np.abs(scales).max() * 1.001


def dequantized_reference(reference: torch.nn.Module, manifest) -> torch.nn.Module:
    """transformers with every cut matrix replaced by its dequantized numbers, group by group."""
    model, block, g = copy.deepcopy(reference), manifest.numeric_class.block, manifest.geometry
    queries = g.heads // g.kv_heads * g.head_dim

    def replace(linear: torch.nn.Linear, group_inputs: int = 0) -> None:
        weights = linear.weight.detach().numpy()
        step = group_inputs or weights.shape[1]
        parts = [
            rounded(np.ascontiguousarray(weights[:, at : at + step]), block)[2]
            for at in range(0, weights.shape[1], step)
        ]
        linear.weight = torch.nn.Parameter(torch.from_numpy(np.concatenate(parts, 1)))

    column_width = -(-g.intermediate // (16 * block)) * block
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            replace(linear)
        replace(layer.self_attn.o_proj, queries)
        replace(layer.mlp.gate_proj)
        replace(layer.mlp.up_proj)
        replace(layer.mlp.down_proj, column_width)
    replace(model.lm_head)
    return model


@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
@pytest.mark.parametrize("shape", ["llama-kv2", "llama-kv4-biases", "qwen3-kv3-tied", "llama-hd80-yarn"])
def test_logits_equal_the_dequantized_model(shape, fast, models, text, tmp_path):
    cut = models.cut(shape, "int4", fast)
    ids = text(cut.manifest, 40)
    reference = dequantized_reference(models.reference(shape), cut.manifest)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        unquantized = models.reference(shape)(torch.tensor([ids])).logits[0].numpy()
    logits, _ = Runner(cut.manifest, cut.pieces, tmp_path, cut_evenly(cut.manifest, (2, 1))).forward(ids)

    def error(of: np.ndarray) -> float:
        return float(np.linalg.norm(logits - of) / np.linalg.norm(of))

    # What is left is the int8 rounding of activations inside MatMulNBits (accuracy_level 4), a fraction of int4's own.
    assert error(expected) < 0.08
    assert error(expected) < error(unquantized) / 3


def test_the_head_equals_integer_arithmetic_in_numpy(models, tmp_path):
    """One MatMulNBits product: int8 activations per block, 4-bit weights, sums in integers."""
    cut = models.cut("llama-kv2", "int4")
    g, block = cut.manifest.geometry, cut.manifest.numeric_class.block
    runner = Runner(cut.manifest, cut.pieces, tmp_path, cut_evenly(cut.manifest, (1,)))
    res = RNG.standard_normal((5, g.hidden)).astype(np.float32)
    logits = runner._head(res, np.zeros(res.shape))
    slots = {slot.name: slot for slot in cut.manifest.head.slots}

    def joined(name: str, dtype: type, *shape: int) -> np.ndarray:
        data = b"".join(cut.pieces.file(piece.digest).read_bytes() for piece in slots[name].pieces)
        return np.frombuffer(data, dtype).reshape(-1, *shape)

    blocks = g.hidden // block
    packed, scales = joined("output", np.uint8, blocks, block // 2), joined("output_scales", np.float32, blocks)
    normed = res / np.sqrt((res**2).mean(1, keepdims=True) + 1e-6) * joined("norm", np.float32, g.hidden)
    by_block = normed.reshape(5, blocks, block)
    step = np.abs(by_block).max(2, keepdims=True) / 127
    activations = np.rint(by_block / step) * step
    numbers = dequantize(Packed(packed, scales), parse_format(f"int4-{block}"), g.hidden)
    expected = activations.reshape(5, -1) @ numbers.T
    assert np.abs(logits - expected[:, : g.vocab]).max() < 2e-3 * np.abs(expected).max()
