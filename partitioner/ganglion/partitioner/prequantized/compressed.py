"""compressed-tensors checkpoints (https://github.com/vllm-project/compressed-tensors): integers of 4 or 8 bits.

Formats: pack-quantized (codes in 32-bit words along the inputs) and int-quantized (int8). Only the weights are read:
how activations were to be quantized is a choice of the numeric class here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.config import Config
from ganglion.partitioner.prequantized.grouped import Grouped, Integers, codes_of, companion, integers
from ganglion.partitioner.safetensors import Tensor
from ganglion.partitioner.weights import Bytes, Floats, Weights
from ganglion.wire.errors import Corrupt, Unsupported

Wrap = Callable[[dict[str, Tensor]], dict[str, Weights]]
PACKED, PLAIN = "pack-quantized", "int-quantized"
COMPANIONS: Final = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "input_scale", "input_zero_point",
)  # fmt: skip


@dataclass(frozen=True)
class CompressedMatrix(Grouped):
    """stored_codes: int32 [outputs, inputs / codes of a word], or int8 [outputs, inputs]. stored_zeros: of codes."""

    stored_codes: npt.NDArray[Any]
    stored_scales: Tensor
    stored_zeros: Integers | None

    def codes(self, outputs: slice, start: int, stop: int) -> Bytes:
        """Codes [outputs, stop - start] of inputs start..stop."""
        if self.stored_codes.dtype.itemsize == 1:
            return self.stored_codes[outputs, start:stop].view(np.uint8) + np.uint8(128)  # wraps
        held = 32 // self.bits
        first = start // held
        words = self.stored_codes[outputs, first : -(-stop // held)]
        return codes_of(words, self.bits)[:, start - first * held : stop - first * held]

    def scales(self, outputs: slice) -> Floats:
        """Scales [outputs, groups]."""
        if self.stored_scales.elements == 1:
            only = self.stored_scales.rows(0, 1) if self.stored_scales.shape else np.empty(0, np.float32)
            return np.repeat(only.reshape(1, 1), outputs.stop - outputs.start, axis=0)
        return self.stored_scales.rows(outputs.start, outputs.stop).reshape(outputs.stop - outputs.start, -1)

    def zeros(self, outputs: slice) -> Integers | None:
        """Zeros [outputs, groups], None where all are 2^(bits - 1)."""
        if self.stored_zeros is None:
            return None
        return (
            self.stored_zeros[outputs]
            if len(self.stored_zeros) > 1
            else np.repeat(self.stored_zeros, outputs.stop - outputs.start, axis=0)
        )


def read_compressed(config: Config) -> Wrap:
    """How the tensors of a checkpoint with this quantization_config read; raises Unsupported for other formats."""
    written = config.text("format")
    if written not in {PACKED, PLAIN}:
        raise Unsupported(
            f"{config.where}: compressed-tensors format {written!r}; supported are {PACKED} and {PLAIN}",
            param="quantization_config",
        )
    bits = _bits(config, written)

    def wrap(tensors: dict[str, Tensor]) -> dict[str, Weights]:
        found: dict[str, Weights] = dict(tensors)
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            base = name.removesuffix("weight_scale")
            found[f"{base}weight"] = _matrix(tensors, base, bits, written)
            for part in COMPANIONS:
                found.pop(f"{base}{part}", None)
        return found

    return wrap


def _bits(config: Config, written: str) -> Literal[4, 8]:
    """Bits of the weights, the same in all groups of modules."""
    groups = config.object("config_groups") or Config({}, config.where)
    found: set[int] = set()
    for name in groups.fields:
        group = groups.object(name) or Config({}, groups.where)
        weights = group.object("weights")
        if weights is None:
            continue
        if weights.text("type", "int") != "int":
            raise Unsupported(f"{weights.where}: weights of type {weights.text('type')!r}; supported is int")
        found.add(weights.whole("num_bits"))
    allowed = {4, 8} if written == PACKED else {8}
    if len(found) != 1 or not found <= allowed:
        raise Unsupported(
            f"{config.where}: weights of {sorted(found)} bits in {written}; supported is one of {sorted(allowed)}",
            param="quantization_config",
        )
    return cast(Literal[4, 8], found.pop())


def _matrix(tensors: dict[str, Tensor], base: str, bits: Literal[4, 8], written: str) -> CompressedMatrix:
    held = 32 // bits
    stored = companion(tensors, f"{base}{'weight_packed' if written == PACKED else 'weight'}")
    scale = tensors[f"{base}weight_scale"]
    if len(stored.shape) != 2 or not stored.elements:
        raise Corrupt(f"tensor {stored.name}: shape {list(stored.shape)}, a matrix is expected")
    outputs, inputs = stored.shape
    if written == PACKED:
        shape = integers(companion(tensors, f"{base}weight_shape"), 2).tolist()
        if shape[0] != outputs or -(-shape[1] // held) != inputs:
            raise Corrupt(f"tensor {stored.name}: shape {list(stored.shape)} does not hold {shape}")
        inputs = shape[1]
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if scale.elements not in {1, outputs * groups} or not groups or inputs % groups:
        raise Corrupt(f"tensor {scale.name}: shape {list(scale.shape)} does not fit a matrix of {[outputs, inputs]}")
    parts, zeros, order = [stored, scale], None, None
    if f"{base}weight_zero_point" in tensors:
        parts.append(tensors[f"{base}weight_zero_point"])
        zeros = _zeros(parts[-1], outputs, groups, bits, written, single=scale.elements == 1)
    if f"{base}weight_g_idx" in tensors:
        parts.append(tensors[f"{base}weight_g_idx"])
        order = integers(parts[-1], inputs).astype(np.int32)
        if order.max() >= groups:
            raise Corrupt(f"tensor {base}weight_g_idx: group {order.max()}, there are {groups}")
        if order.min() < 0 or np.array_equal(order, np.arange(inputs) // (inputs // groups)):
            order = None  # -1 says that no order was kept
    return CompressedMatrix(
        f"{base}weight",
        (outputs, inputs),
        bits,
        inputs // groups,
        tuple(parts),
        order,
        integers(stored, *stored.shape),
        scale,
        zeros,
    )


def _zeros(tensor: Tensor, outputs: int, groups: int, bits: Literal[4, 8], written: str, *, single: bool) -> Integers:
    """Zeros [outputs, groups] of codes, or [1, 1]: packed along the outputs, or signed integers."""
    if written == PACKED:
        words = integers(tensor, -(-outputs // (32 // bits)), groups)
        return codes_of(words.T, bits)[:, :outputs].T.astype(np.int32)
    rows = 1 if single else outputs
    return integers(tensor, *tensor.shape).reshape(rows, groups).astype(np.int32) + np.int32(1 << bits - 1)
