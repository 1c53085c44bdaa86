"""AWQ checkpoints (arXiv 2306.00978) in AutoAWQ's gemm layout: 4 bits, eight outputs in a word, out of order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from ganglion.partitioner.config import Config
from ganglion.partitioner.prequantized.grouped import (
    Grouped,
    Integers,
    codes_of,
    companion,
    inputs_per_group,
    integers,
)
from ganglion.partitioner.safetensors import Tensor
from ganglion.partitioner.weights import Bytes, Floats, Weights
from ganglion.wire.errors import Corrupt, Unsupported

Wrap = Callable[[dict[str, Tensor]], dict[str, Weights]]
HELD: Final = 8
PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word that holds output 0, 1, ... of its eight


@dataclass(frozen=True)
class AwqMatrix(Grouped):
    """qweight: int32 [inputs, outputs / 8]. qzeros: int32 [groups, outputs / 8]."""

    qweight: Integers
    qzeros: Integers
    stored_scales: Tensor

    def codes(self, outputs: slice, start: int, stop: int) -> Bytes:
        """Codes [outputs, stop - start] of inputs start..stop."""
        return _outputs(self.qweight[start:stop], outputs)

    def scales(self, outputs: slice) -> Floats:
        """Scales [outputs, groups]."""
        return self.stored_scales.columns(outputs.start, outputs.stop).T

    def zeros(self, outputs: slice) -> Integers:
        """Zeros [outputs, groups]."""
        return _outputs(self.qzeros, outputs).astype(np.int32)


def _outputs(words: Integers, outputs: slice) -> Bytes:
    """[rows, words] -> the codes [outputs, rows] of some outputs."""
    first = outputs.start // HELD
    codes = codes_of(words[:, first : -(-outputs.stop // HELD)], 4)
    ordered = codes.reshape(len(codes), -1, HELD)[..., PLACES].reshape(len(codes), -1)
    return ordered[:, outputs.start - first * HELD : outputs.stop - first * HELD].T


def read_awq(config: Config) -> Wrap:
    """How the tensors of a checkpoint with this quantization_config read; raises Unsupported for other layouts."""
    bits, version = config.whole("bits"), config.text("version", "gemm").lower()
    if bits != 4 or version != "gemm":
        raise Unsupported(
            f"{config.where}: AWQ {version} of {bits} bits; supported is gemm of 4", param="quantization_config"
        )
    group = -1 if config.fields.get("group_size", -1) == -1 else config.whole("group_size")

    def wrap(tensors: dict[str, Tensor]) -> dict[str, Weights]:
        found: dict[str, Weights] = dict(tensors)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            base = name.removesuffix("qweight")
            found[f"{base}weight"] = _matrix(tensors, base, group)
            for part in ("qweight", "qzeros", "scales"):
                found.pop(f"{base}{part}", None)
        return found

    return wrap


def _matrix(tensors: dict[str, Tensor], base: str, group: int) -> AwqMatrix:
    packed, scales = tensors[f"{base}qweight"], companion(tensors, f"{base}scales")
    zeros = companion(tensors, f"{base}qzeros")
    if len(packed.shape) != 2 or len(scales.shape) != 2 or packed.shape[1] * HELD != scales.shape[1]:
        raise Corrupt(f"tensor {packed.name}: shape {list(packed.shape)} does not fit scales {list(scales.shape)}")
    inputs, (groups, outputs) = packed.shape[0], scales.shape
    size = inputs_per_group(packed.name, inputs, groups, group)
    return AwqMatrix(
        f"{base}weight",
        (outputs, inputs),
        4,
        size,
        (packed, zeros, scales),
        None,
        integers(packed, *packed.shape),
        integers(zeros, groups, outputs // HELD),
        scales,
    )
