"""Rounding a matrix to integers: by blocks as MatMulNBits reads them, or with one scale for each output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from ganglion.partitioner.quantize.formats import Format, Rounding
from ganglion.partitioner.quantize.search import best_scales
from ganglion.partitioner.weights import Bytes, Floats, Packed

# Of a weight of the integer products, on either side of zero: x86 without VNNI adds two products of a row's 8 bits (up
# to 255) and a weight in 16 bits, which hold 2 * 255 * 64 and no more. A cut does not know where it will run.
LEVELS: Final = 64

AT_ONCE: Final = 1 << 17  # numbers: what is made of them on the way stays in the processor's cache


def quantize(weights: Floats, form: Format, rounding: Rounding = "nearest") -> Packed:
    """Round `weights` [outputs, inputs] to an integer format; the last block is padded with zeros.

    The result is as `Packed` says; without a block its values are int8 [outputs, inputs] and its scales [outputs]. In
    4 bits a block's number of largest magnitude becomes -8 exactly, so a scale may be negative. rounding: "search"
    looks for the scale with the least squared error (4 bits without zero points; elsewhere it gains nothing).
    """
    outputs, inputs = weights.shape
    return quantize_rows(lambda start, stop: weights[start:stop], outputs, inputs, form, rounding)


def quantize_rows(
    read: Callable[[int, int], Floats], outputs: int, inputs: int, form: Format, rounding: Rounding = "nearest"
) -> Packed:
    """`quantize` of a matrix of which `read(start, stop)` gives rows as float32: it is never whole in memory."""
    step = max(1, AT_ONCE // max(1, inputs))
    parts = [_rounded(read(at, min(at + step, outputs)), form, rounding) for at in range(0, max(1, outputs), step)]
    if len(parts) == 1:
        return parts[0]
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return Packed(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zero_points) if zero_points else None,
    )


def _rounded(weights: Floats, form: Format, rounding: Rounding) -> Packed:
    if form.per_row:
        scales = np.divide(np.abs(weights).max(axis=1, initial=0), LEVELS, dtype=np.float32)
        rounded: Any = np.rint(weights * _inverse(scales)[:, None]).astype(np.int8)
        return Packed(rounded, scales)
    by_block = _blocked(weights, form.block)
    zeros = np.float32(8 if form.bits == 4 else 128)
    if form.zero_points:
        return _with_zero_points(by_block, form)
    if form.bits == 8:
        scales = np.divide(np.abs(by_block).max(-1), 127, dtype=np.float32)
    else:
        highest, lowest = _extremes(by_block)
        extreme = np.where(highest > -lowest, highest, lowest)
        scales = best_scales(by_block, extreme) if rounding == "search" else np.divide(extreme, -8, dtype=np.float32)
    by_block = by_block * _inverse(scales)[..., None]
    np.rint(by_block, out=by_block)
    by_block += zeros
    np.clip(by_block, 0, 2 * zeros - 1, out=by_block)
    return Packed(packed_values(by_block.astype(np.uint8), form.bits), scales)


def dequantize(packed: Packed, form: Format, inputs: int) -> Floats:
    """The numbers float32 [outputs, inputs] that `packed` stands for."""
    if form.per_row:
        rows: Floats = packed.values.astype(np.float32) * packed.scales[:, None]
        return rows
    values = unpacked(packed.values, form.bits).astype(np.float32)
    if packed.zero_points is None:
        values -= 8 if form.bits == 4 else 128
    else:
        zeros = unpacked(packed.zero_points, form.bits)[:, : values.shape[1]]
        values -= zeros[..., None].astype(np.float32)
    values *= packed.scales[..., None]
    return values.reshape(len(values), -1)[:, :inputs]


def unpacked(packed: Bytes, bits: int) -> Bytes:
    """Values one a byte, along the last axis."""
    if bits == 8:
        return packed
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(*packed.shape[:-1], -1)


def pack_zeros(zeros: Bytes, bits: int) -> Bytes:
    """Zero points [outputs, blocks] as MatMulNBits reads them: of 4 bits two a byte, a row padded to a whole byte."""
    if bits == 4 and zeros.shape[1] % 2:
        zeros = np.pad(zeros, [(0, 0), (0, 1)])
    return packed_values(zeros, bits)


def packed_values(values: Bytes, bits: int) -> Bytes:
    """Values one a byte as MatMulNBits reads them: of 4 bits two a byte, the even one low."""
    if bits == 8:
        return np.ascontiguousarray(values)
    pairs: Any = np.ascontiguousarray(values).view("<u2")  # the even value is the lower byte
    packed: Bytes = (pairs | pairs >> np.uint16(4)).astype(np.uint8)
    return packed


def _extremes(by_block: Floats) -> tuple[Floats, Floats]:
    """Highest and lowest of each block; along the first axis numpy compares many blocks at once, 10 times as fast."""
    turned = np.ascontiguousarray(by_block.reshape(-1, by_block.shape[-1]).T)
    return turned.max(0).reshape(by_block.shape[:-1]), turned.min(0).reshape(by_block.shape[:-1])


def _blocked(weights: Floats, block: int) -> Floats:
    outputs, inputs = weights.shape
    blocks = -(-inputs // block)
    if inputs % block == 0:
        return weights.reshape(outputs, blocks, block)
    padded = np.zeros((outputs, blocks * block), np.float32)
    padded[:, :inputs] = weights
    return padded.reshape(outputs, blocks, block)


def _inverse(scales: Floats) -> Floats:
    """1 / scale, 0 where a scale is zero or so small that this overflows: its numbers become zero."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / scales
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _with_zero_points(by_block: Floats, form: Format) -> Packed:
    top = np.float32(15 if form.bits == 4 else 255)
    lowest = by_block.min(-1, initial=0)
    scales = (by_block.max(-1, initial=0) - lowest) / top
    inverse = _inverse(scales)
    zeros = np.rint(-lowest * inverse)
    values = np.clip(np.rint(by_block * inverse[..., None]) + zeros[..., None], 0, top).astype(np.uint8)
    return Packed(packed_values(values, form.bits), scales, pack_zeros(zeros.astype(np.uint8), form.bits))
