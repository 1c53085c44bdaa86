"""Weights of a share as torch holds them: matrices of every format dequantized to [outputs, inputs]."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def blocks(
    packed: NDArray[np.uint8], scales: NDArray[np.float32], zeros: NDArray[np.uint8] | None, bits: int
) -> Tensor:
    """Of MatMulNBits: packed [outputs, blocks, block * bits / 8], low half first -> [outputs, inputs] float32."""
    outputs, count, _ = packed.shape
    values = _unpacked(packed, bits).reshape(outputs, count, -1)
    middle = torch.full((), float(1 << (bits - 1)))
    if zeros is not None:
        middle = _unpacked(zeros.reshape(outputs, -1), bits)[:, :count].unsqueeze(-1).float()
    scaled = (values.float() - middle) * torch.from_numpy(scales.copy()).reshape(outputs, count, 1)
    return scaled.flatten(1)


def experts(packed: NDArray[np.uint8], scales: NDArray[np.float32], bits: int) -> Tensor:
    """Stacked matrices of QMoE: packed [experts, outputs, bytes], scales [experts, outputs, blocks] -> float32."""
    count, outputs, width = packed.shape
    rows = packed.reshape(count * outputs, scales.shape[-1], width // scales.shape[-1])
    return blocks(rows, scales.reshape(count * outputs, -1), None, bits).reshape(count, outputs, -1)


def integers(values: NDArray[np.int8], scales: NDArray[np.float32]) -> Tensor:
    """An int8 matrix [inputs, outputs] with a scale for each output -> [outputs, inputs] float32."""
    return torch.from_numpy(values.copy()).T.float() * torch.from_numpy(scales.copy()).unsqueeze(-1)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> Tensor:
    found = torch.from_numpy(packed.copy())
    if bits == 8:
        return found
    return torch.stack((found & 15, found >> 4), dim=-1).flatten(-2)
