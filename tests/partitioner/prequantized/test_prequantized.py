"""GPTQ, AWQ, compressed-tensors and MXFP4 checkpoints: the numbers that the formats' papers say, and exact packing.

The writers pack one code after the other as the formats are published; numbers are computed from the codes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import make_llama
from safetensors.torch import load_file, save_file

from ganglion.partitioner.checkpoint import Checkpoint, open_checkpoint, read_config
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.partitioner.weights import Packed, Packing, Weights
from ganglion.wire.errors import Corrupt, Unsupported

OUTPUTS, INPUTS = 24, 256
NAME = "model.layers.0.self_attn.q_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: nibble k of a word holds output ORDER[k]


@dataclass
class Codes:
    """codes [outputs, inputs], zeros and scales [outputs, groups], and what each number is."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        found = np.empty(self.codes.shape, np.float32)
        for output, row in enumerate(self.codes):
            for at, code in enumerate(row):
                group = self.group_of[at]
                found[output, at] = np.float32(int(code) - int(self.zeros[output, group])) * self.scales[output, group]
        return found


def random_codes(bits: int, group: int, *, symmetric: bool, least_zero: int = 1) -> Codes:
    random = np.random.default_rng(bits * 1000 + group)
    groups, middle = INPUTS // group, 1 << bits - 1
    zeros = np.full((OUTPUTS, groups), middle)
    if not symmetric:
        zeros = random.integers(least_zero, 1 << bits, (OUTPUTS, groups))
    scales = random.uniform(0.001, 0.1, (OUTPUTS, groups)).astype(np.float16).astype(np.float32)
    codes = random.integers(0, 1 << bits, (OUTPUTS, INPUTS))
    return Codes(codes, zeros, scales, np.arange(INPUTS) // group)


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes of the last axis in 32-bit words, the first one lowest (or in `order`)."""
    held = 32 // bits
    padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % held)])
    parts = padded.reshape(*padded.shape[:-1], -1, held).astype(np.uint64)
    packed = np.zeros(parts.shape[:-1], np.uint64)
    for nibble, which in enumerate(order or range(held)):
        packed |= parts[..., which] << np.uint64(nibble * bits)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32).copy())


def checkpoint(folder: Path, quantization: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    plain = {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.ones(4, 8, dtype=torch.bfloat16)}
    save_file({name: tensor.contiguous() for name, tensor in (plain | tensors).items()}, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert opened.config.fields == {"architectures": ["LlamaForCausalLM"]} == read_config(folder).fields
    assert set(opened.tensors) == {*plain, f"{NAME}.weight"}
    return opened


def numbers_of(packed: Packed, packing: Packing, inputs: int) -> np.ndarray:
    """One number after the other, as MatMulNBits has them."""
    outputs, blocks, _ = packed.values.shape
    block = packing.block or inputs
    found = np.empty((outputs, blocks * block), np.float32)
    for output in range(outputs):
        for at in range(blocks * block):
            part, index = divmod(at, block)
            zero = 1 << packing.bits - 1
            if packing.bits == 8:
                value = int(packed.values[output, part, index])
                if packed.zero_points is not None:
                    zero = int(packed.zero_points[output, part])
            else:
                value = int(packed.values[output, part, index // 2]) >> 4 * (index % 2) & 15
                if packed.zero_points is not None:
                    zero = int(packed.zero_points[output, part // 2]) >> 4 * (part % 2) & 15
            found[output, at] = np.float32(value - zero) * packed.scales[output, part]
    return found[:, :inputs]


def check(weights: Weights, expected: Codes, packing: Packing | None) -> None:
    numbers = expected.numbers
    assert weights.name == f"{NAME}.weight"
    assert weights.shape == (OUTPUTS, INPUTS)
    assert weights.elements == OUTPUTS * INPUTS
    assert weights.stored == "float32"
    assert np.array_equal(weights.rows(0, OUTPUTS), numbers)
    assert np.array_equal(weights.rows(3, 14), numbers[3:14])
    assert np.array_equal(np.frombuffer(weights.raw_rows(3, 5), np.float32), numbers[3:5].reshape(-1))
    for start, stop in ((0, INPUTS), (5, 6), (13, 155), (INPUTS - 3, INPUTS)):
        assert np.array_equal(weights.columns(start, stop), numbers[:, start:stop])
    assert weights.packing == packing
    if packing is None:
        with pytest.raises(Unsupported, match=f"{NAME}.weight: its groups"):
            weights.packed_rows(0, 1)
        return
    packed = weights.packed_rows(0, OUTPUTS)
    blocks = INPUTS // packing.block if packing.block else 1
    assert packed.values.shape == (OUTPUTS, blocks, INPUTS // blocks * packing.bits // 8)
    assert packed.scales.shape == (OUTPUTS, blocks)
    assert (packed.zero_points is not None) == packing.zero_points
    if packed.zero_points is not None:
        assert packed.zero_points.shape == (OUTPUTS, -(-blocks * packing.bits // 8))
    assert np.array_equal(numbers_of(packed, packing, INPUTS), numbers)
    assert np.array_equal(numbers_of(weights.packed_rows(3, 14), packing, INPUTS), numbers[3:14])
    step = packing.block or 50
    for start, stop in ((0, step), (step, 2 * step), (INPUTS - step, INPUTS)):
        columns = numbers_of(weights.packed_columns(start, stop), packing, stop - start)
        assert np.array_equal(columns, numbers[:, start:stop])


def gptq(codes: Codes, bits: int, version: int, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    stored = codes.zeros - (1 if version == 1 else 0)
    return {
        f"{NAME}.qweight": words(codes.codes, bits).T,
        f"{NAME}.qzeros": words(stored.T, bits),
        f"{NAME}.scales": torch.from_numpy(codes.scales.T.copy()).half(),
    } | {f"{NAME}.{name}": tensor for name, tensor in extra.items()}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (4, -1), (8, 32), (8, 128), (8, -1)])
def test_gptq(bits, group, symmetric, version, tmp_path):
    codes = random_codes(bits, INPUTS if group == -1 else group, symmetric=symmetric)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": symmetric}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    order = torch.from_numpy(codes.group_of.astype(np.int32))
    opened = checkpoint(tmp_path / "model", config, gptq(codes, bits, version, g_idx=order))
    whole = group == -1 and bits == 8 and symmetric
    block = 0 if whole else 128 if group == -1 else group
    check(opened.tensors[f"{NAME}.weight"], codes, Packing(bits, block, zero_points=not symmetric))


def test_gptq_whose_inputs_are_ordered_by_activation(tmp_path):
    codes = random_codes(4, 64, symmetric=False)
    codes.group_of = np.random.default_rng(0).permutation(codes.group_of)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    order = torch.from_numpy(codes.group_of.astype(np.int32))
    opened = checkpoint(tmp_path / "model", config, gptq(codes, 4, 1, g_idx=order))
    check(opened.tensors[f"{NAME}.weight"], codes, None)


def test_gptq_zeros_that_no_code_holds(tmp_path):
    codes = random_codes(4, 64, symmetric=False)
    codes.zeros[5, 1] = 16  # stored as 15 in the first version
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    opened = checkpoint(tmp_path / "model", config, gptq(codes, 4, 1))
    check(opened.tensors[f"{NAME}.weight"], codes, None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_awq(group, symmetric, tmp_path):
    codes = random_codes(4, group, symmetric=symmetric, least_zero=0)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    tensors = {
        f"{NAME}.qweight": words(codes.codes.T, 4, ORDER),
        f"{NAME}.qzeros": words(codes.zeros.T, 4, ORDER),
        f"{NAME}.scales": torch.from_numpy(codes.scales.T.copy()).half(),
    }
    opened = checkpoint(tmp_path / "model", config, tensors)
    check(opened.tensors[f"{NAME}.weight"], codes, Packing(4, group, zero_points=not symmetric))


def compressed(
    form: str, bits: int, strategy: str, group: int | None = None, *, symmetric: bool = True
) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": group, "symmetric": symmetric}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (4, INPUTS), (8, 128), (8, INPUTS)])
def test_compressed_tensors_packed(bits, group, symmetric, tmp_path):
    codes = random_codes(bits, group, symmetric=symmetric, least_zero=0)
    tensors = {
        f"{NAME}.weight_packed": words(codes.codes, bits),
        f"{NAME}.weight_scale": torch.from_numpy(codes.scales).to(torch.bfloat16),
        f"{NAME}.weight_shape": torch.tensor([OUTPUTS, INPUTS]),
        f"{NAME}.weight_g_idx": torch.full((INPUTS,), -1, dtype=torch.int32),
    }
    codes.scales = tensors[f"{NAME}.weight_scale"].float().numpy()
    if not symmetric:
        tensors[f"{NAME}.weight_zero_point"] = words(codes.zeros.T, bits).T
    config = compressed("pack-quantized", bits, "group", group, symmetric=symmetric)
    opened = checkpoint(tmp_path / "model", config, tensors)
    block = 0 if bits == 8 and group == INPUTS and symmetric else min(group, 128)
    check(opened.tensors[f"{NAME}.weight"], codes, Packing(bits, block, zero_points=not symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["channel", "tensor", "group"])
def test_compressed_tensors_int8(strategy, symmetric, tmp_path):
    codes = random_codes(8, 64 if strategy == "group" else INPUTS, symmetric=symmetric, least_zero=0)
    scales, zeros = codes.scales, codes.zeros
    if strategy == "tensor":
        scales, zeros = scales[:1, :1], zeros[:1, :1]
        codes.scales, codes.zeros = (np.repeat(array, OUTPUTS, axis=0) for array in (scales, zeros))
    tensors = {
        f"{NAME}.weight": torch.from_numpy((codes.codes - 128).astype(np.int8)),
        f"{NAME}.weight_scale": torch.from_numpy(scales.reshape(-1) if strategy == "tensor" else scales),
        f"{NAME}.input_scale": torch.ones(1),
    }
    if not symmetric:
        stored = (zeros - 128).astype(np.int8)
        tensors[f"{NAME}.weight_zero_point"] = torch.from_numpy(stored.reshape(-1) if strategy == "tensor" else stored)
    config = compressed("int-quantized", 8, strategy, symmetric=symmetric)
    opened = checkpoint(tmp_path / "model", config, tensors)
    block = 64 if strategy == "group" else 0 if symmetric else 128
    check(opened.tensors[f"{NAME}.weight"], codes, Packing(8, block, zero_points=not symmetric))


def test_mxfp4(tmp_path):
    random = np.random.default_rng(3)
    experts, outputs, inputs = 2, 10, 96
    codes = random.integers(0, 16, (experts, outputs, inputs), np.uint8)
    exponents = random.integers(100, 140, (experts, outputs, inputs // 32), np.uint8)
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    numbers = np.empty(codes.shape, np.float32)
    for index in np.ndindex(codes.shape):
        code = int(codes[index])
        sign = -1.0 if code >> 3 else 1.0
        numbers[index] = sign * magnitudes[code & 7] * 2.0 ** (int(exponents[*index[:2], index[2] // 32]) - 127)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(experts, outputs, inputs // 32, 16)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}_blocks": torch.from_numpy(packed), f"{name}_scales": torch.from_numpy(exponents)}
    save_file(tensors | {f"{name}_bias": torch.ones(experts, outputs)}, folder / "model.safetensors")
    opened = open_checkpoint(folder)
    assert set(opened.tensors) == {name, f"{name}_bias"}
    stack = opened.tensor(name, experts, inputs, outputs)
    assert np.array_equal(stack.rows(0, experts), numbers.swapaxes(1, 2))
    for expert in range(experts):
        part = stack.part(expert)
        assert part.packing is None
        assert np.array_equal(part.rows(30, 70), numbers[expert].T[30:70])
        assert np.array_equal(part.columns(2, 9), numbers[expert].T[:, 2:9])
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32)
    assert np.array_equal(stack.rows(0, experts), theirs.numpy())
    exponents[1, 2, 1] = 255
    save_file(tensors | {f"{name}_scales": torch.from_numpy(exponents)}, folder / "model.safetensors")
    with pytest.raises(Corrupt, match=r"gate_up_proj.*not finite"):
        open_checkpoint(folder).tensors[name].rows(1, 2)


GROUPS = {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        ({"quant_method": "bitsandbytes"}, "method bitsandbytes; supported are gptq, awq, compressed-tensors, mxfp4"),
        ({"bits": 4}, r"method \(none named\); supported are"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 128}, "GPTQ of 3 bits; supported are 4 and 8"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin'; supported are",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ gemv of 4 bits; supported is gemm"),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized"},
            "format 'float-quantized'; supported are",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": GROUPS},
            r"weights of \[4\] bits in int-quantized; supported is one of \[8\]",
        ),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"weights of \[\] bits"),
    ],
)
def test_other_methods_are_refused_by_name(quantization, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(Unsupported, match=said):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scales": None}, r"q_proj\.scales is missing"),
        ({"qzeros": None}, r"q_proj\.qzeros is missing"),
        ({"scales": torch.ones(3, OUTPUTS)}, "3 groups of 64 for 256 inputs"),
        ({"scales": torch.ones(4, OUTPUTS + 1)}, r"shape \[32, 24\] does not fit scales \[4, 25\]"),
        ({"qweight": torch.ones(32, OUTPUTS)}, r"q_proj\.qweight: F32\[32, 24\], integers"),
        ({"qzeros": torch.ones(4, 2, dtype=torch.int32)}, r"q_proj\.qzeros: I32\[4, 2\], integers \[4, 3\]"),
        ({"g_idx": torch.full((INPUTS,), 4, dtype=torch.int32)}, "groups 4 to 4, there are 4"),
        ({"g_idx": torch.full((INPUTS,), -1, dtype=torch.int32)}, "groups -1 to -1"),
    ],
)
def test_tensors_that_do_not_fit(changes, said, tmp_path):
    codes = random_codes(4, 64, symmetric=False)
    tensors: dict[str, Any] = gptq(codes, 4, 1) | {f"{NAME}.{part}": tensor for part, tensor in changes.items()}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    with pytest.raises(Corrupt, match=said):
        checkpoint(tmp_path / "model", config, {name: t for name, t in tensors.items() if t is not None})


def test_scales_that_are_not_finite(tmp_path):
    codes = random_codes(4, 64, symmetric=True)
    tensors = gptq(codes, 4, 1)
    tensors[f"{NAME}.scales"][2, 9] = float("inf")
    opened = checkpoint(tmp_path / "model", {"quant_method": "gptq", "bits": 4, "group_size": 64}, tensors)
    with pytest.raises(Corrupt, match=r"q_proj\.scales: .* not finite"):
        opened.tensors[f"{NAME}.weight"].rows(8, 10)


def stored_as(method: str, name: str, codes: Codes) -> dict[str, torch.Tensor]:
    """One matrix `name` without ".weight", symmetric, as the method stores it."""
    scales = torch.from_numpy(codes.scales)
    if method == "gptq":
        return {
            f"{name}.qweight": words(codes.codes, 4).T,
            f"{name}.qzeros": words(codes.zeros.T - 1, 4),
            f"{name}.scales": scales.T.half(),
        }
    if method == "awq":
        return {
            f"{name}.qweight": words(codes.codes.T, 4, ORDER),
            f"{name}.qzeros": words(codes.zeros.T, 4, ORDER),
            f"{name}.scales": scales.T.half(),
        }
    if method == "pack-quantized":
        shape = torch.tensor(codes.codes.shape)
        return {
            f"{name}.weight_packed": words(codes.codes, 4),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": shape,
        }
    return {f"{name}.weight": torch.from_numpy((codes.codes - 128).astype(np.int8)), f"{name}.weight_scale": scales}


METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "pack-quantized": compressed("pack-quantized", 4, "group", 32),
    "int-quantized": compressed("int-quantized", 8, "channel"),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_model_is_cut_as_its_numbers_are(method, tmp_path):
    folder = make_llama(tmp_path / "plain", head_dim=32, hidden_size=128, intermediate_size=256)
    state = load_file(folder / "model.safetensors")
    bits = 8 if method == "int-quantized" else 4
    middle, quantized = 1 << bits - 1, dict[str, torch.Tensor]()
    for name, tensor in list(state.items()):
        if not name.endswith("_proj.weight"):
            quantized[name] = tensor
            continue
        weights = tensor.numpy()
        group = weights.shape[1] if bits == 8 else 32
        blocks = weights.reshape(len(weights), -1, group)
        scales = (np.abs(blocks).max(axis=-1) / (middle - 1)).astype(np.float16).astype(np.float32)
        codes = np.rint(blocks / scales[..., None]).reshape(weights.shape).astype(int) + middle
        codes = Codes(
            codes.clip(0, 2 * middle - 1), np.full(scales.shape, middle), scales, np.arange(weights.shape[1]) // group
        )
        numbers = (codes.codes - middle).reshape(blocks.shape).astype(np.float32) * scales[..., None]
        state[name] = torch.from_numpy(numbers.reshape(weights.shape))
        quantized |= stored_as(method, name.removesuffix(".weight"), codes)
    save_file(state, folder / "model.safetensors")
    stored = shutil.copytree(folder, tmp_path / "quantized")
    save_file({name: tensor.contiguous() for name, tensor in quantized.items()}, stored / "model.safetensors")
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": METHODS[method]}))
    sink = DirectorySink(tmp_path / "pieces")
    first, second = (
        partition(source, sink, name="model", numeric_class=numeric_class(source, "fp32"))
        for source in (folder, stored)
    )
    assert second == msgspec.structs.replace(first, source_digest=second.source_digest)
