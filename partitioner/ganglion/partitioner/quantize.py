"""int4 by blocks: symmetric, round to nearest, zero point 8, as MatMulNBits reads it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def quantize_int4(weights: Floats, block: int) -> tuple[Bytes, Floats]:
    """Quantize `weights` [outputs, inputs] in blocks of `block` along the inputs; the last block is padded with zeros.

    Returns (packed [outputs, blocks, block / 2], the even value low in its byte; scales [outputs, blocks] float32).
    A block's number of largest magnitude becomes -8 exactly, so a scale may be negative.
    """
    outputs, inputs = weights.shape
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block), np.float32)
    padded[:, :inputs] = weights
    by_block = padded.reshape(outputs, blocks, block)
    highest, lowest = by_block.max(-1), by_block.min(-1)
    extreme = np.where(highest > -lowest, highest, lowest)
    scales = (extreme / np.float32(-8)).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    by_block *= np.where(np.isfinite(inverse), inverse, np.float32(0))[..., None]  # zero or denormal scale: zeros
    values = np.clip(np.rint(by_block, out=by_block) + np.float32(8), 0, 15).astype(np.uint8)
    packed: Bytes = values[..., 0::2] | np.left_shift(values[..., 1::2], np.uint8(4))
    return packed, scales


def dequantize_int4(packed: Bytes, scales: Floats, inputs: int) -> Floats:
    """The numbers [outputs, inputs] that `quantize_int4` stands for."""
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(np.float32)
    floats: Floats = ((values - np.float32(8)) * scales[..., None]).reshape(packed.shape[0], -1)[:, :inputs]
    return floats
