"""GPTQ checkpoints (arXiv 2210.17323) as AutoGPTQ and GPTQModel write them: codes packed along the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

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


@dataclass(frozen=True)
class GptqMatrix(Grouped):
    """qweight: int32 [inputs / codes of a word, outputs]. qzeros: int32 [groups, outputs / codes of a word].

    added: what a stored zero lacks (1 in the first version of the format).
    """

    qweight: Integers
    qzeros: Integers
    stored_scales: Tensor
    added: int

    def codes(self, outputs: slice, start: int, stop: int) -> Bytes:
        """Codes [outputs, stop - start] of inputs start..stop."""
        held = 32 // self.bits
        first = start // held
        words = self.qweight[first : -(-stop // held), outputs].T
        return codes_of(words, self.bits)[:, start - first * held : stop - first * held]

    def scales(self, outputs: slice) -> Floats:
        """Scales [outputs, groups]."""
        return self.stored_scales.columns(outputs.start, outputs.stop).T

    def zeros(self, outputs: slice) -> Integers:
        """Zeros [outputs, groups]."""
        held = 32 // self.bits
        first = outputs.start // held
        stored = codes_of(self.qzeros[:, first : -(-outputs.stop // held)], self.bits)
        stored = stored[:, outputs.start - first * held : outputs.stop - first * held]
        return stored.T.astype(np.int32) + np.int32(self.added)


def read_gptq(config: Config) -> Wrap:
    """How the tensors of a checkpoint with this quantization_config read; raises Unsupported for other bits."""
    bits = config.whole("bits")
    if bits not in {4, 8}:
        raise Unsupported(f"{config.where}: GPTQ of {bits} bits; supported are 4 and 8", param="quantization_config")
    written = config.text("checkpoint_format", "gptq")
    if written not in {"gptq", "gptq_v2"}:
        raise Unsupported(
            f"{config.where}: checkpoint_format {written!r}; supported are gptq and gptq_v2",
            param="quantization_config",
        )
    group = -1 if config.fields.get("group_size", -1) == -1 else config.whole("group_size")
    added = int(written == "gptq")

    def wrap(tensors: dict[str, Tensor]) -> dict[str, Weights]:
        found: dict[str, Weights] = dict(tensors)
        for name in [name for name in tensors if name.endswith(".qweight")]:
            base = name.removesuffix("qweight")
            found[f"{base}weight"] = _matrix(tensors, base, cast(Literal[4, 8], bits), group, added)
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                found.pop(f"{base}{part}", None)
        return found

    return wrap


def _matrix(tensors: dict[str, Tensor], base: str, bits: Literal[4, 8], group: int, added: int) -> GptqMatrix:
    held = 32 // bits
    packed, scales = tensors[f"{base}qweight"], companion(tensors, f"{base}scales")
    zeros = companion(tensors, f"{base}qzeros")
    if len(packed.shape) != 2 or len(scales.shape) != 2 or packed.shape[1] != scales.shape[1]:
        raise Corrupt(f"tensor {packed.name}: shape {list(packed.shape)} does not fit scales {list(scales.shape)}")
    inputs, (groups, outputs) = packed.shape[0] * held, scales.shape
    size = inputs_per_group(packed.name, inputs, groups, group)
    order, parts = None, [packed, zeros, scales]
    if f"{base}g_idx" in tensors:
        parts.append(tensors[f"{base}g_idx"])
        order = integers(parts[-1], inputs).astype(np.int32)
        if order.min() < 0 or order.max() >= groups:
            raise Corrupt(f"tensor {base}g_idx: groups {order.min()} to {order.max()}, there are {groups}")
        if np.array_equal(order, np.arange(inputs) // size):
            order = None
    return GptqMatrix(
        f"{base}weight",
        (outputs, inputs),
        bits,
        size,
        tuple(parts),
        order,
        integers(packed, *packed.shape),
        integers(zeros, groups, -(-outputs // held)),
        scales,
        added,
    )
