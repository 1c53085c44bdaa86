"""Taking over numbers that a source has in blocks of its own: in other sizes, 4 bits as 8, never rounded again."""

from __future__ import annotations

from math import gcd

import numpy as np

from ganglion.partitioner.quantize.blocks import pack_zeros, packed_values, unpacked
from ganglion.partitioner.quantize.formats import BLOCKS, Block, Format
from ganglion.partitioner.weights import Packed, Packing, Weights


def repack(packed: Packed, packing: Packing, form: Format) -> Packed:
    """`packed` in `form`, which holds `packing`; bit for bit the same numbers."""
    values = unpacked(packed.values, packing.bits)
    outputs, blocks, block = values.shape
    into = form.block or block
    zeros = None
    if packed.zero_points is not None:
        zeros = unpacked(packed.zero_points, packing.bits)[:, :blocks]
    if form.bits > packing.bits:  # the zero goes to 128, whatever it was
        shift = np.uint8(128) - (zeros[..., None] if zeros is not None else np.uint8(8))
        values, zeros = values + shift, None
    middle = np.uint8(8 if form.bits == 4 else 128)
    parts = -(-block // into)
    if block % into:  # one block for the whole of an output: its numbers are padded to whole blocks
        values = np.pad(values, [(0, 0), (0, 0), (0, parts * into - block)], constant_values=middle)
    values = values.reshape(outputs, blocks * parts, into)
    scales = np.repeat(packed.scales, parts, axis=1)
    points = None
    if form.zero_points:
        points = np.full(scales.shape, middle) if zeros is None else np.repeat(zeros, parts, axis=1)
        points = pack_zeros(points, form.bits)
    return Packed(packed_values(values, form.bits), scales, points)


def read_rows(weights: Weights, start: int, stop: int, form: Format) -> Packed:
    """Rows start..stop of packed `weights` in `form`."""
    return repack(weights.packed_rows(start, stop), _packing(weights), form)


def read_columns(weights: Weights, start: int, stop: int, form: Format) -> Packed:
    """Columns start..stop of packed `weights` in `form`, whose block divides `start`: read by the source's blocks."""
    packing = _packing(weights)
    if not packing.block:  # an output's one block is read whole
        first, last = 0, weights.shape[1]
    else:
        first = start // packing.block * packing.block
        last = min(-(-stop // packing.block) * packing.block, weights.shape[1])
    packed = repack(weights.packed_columns(first, last), packing, form)
    begin, end = (start - first) // form.block, -(-(stop - first) // form.block)
    points = None
    if packed.zero_points is not None:
        blocks = packed.scales.shape[1]
        points = pack_zeros(unpacked(packed.zero_points, form.bits)[:, :blocks][:, begin:end], form.bits)
    return Packed(packed.values[:, begin:end], packed.scales[:, begin:end], points)


def _packing(weights: Weights) -> Packing:
    if weights.packing is None:
        raise ValueError(f"tensor {weights.name} is not in blocks")
    return weights.packing


def block_for(packing: Packing, at_most: int, width: int) -> Block | None:
    """The largest block that divides the packing's and `width`, the columns of a group (0: they are not cut)."""
    size = gcd(packing.block, width) or 128
    return next((block for block in BLOCKS if block <= at_most and size % block == 0), None)


def padded(packed: Packed, form: Format, outputs: int, inputs: int) -> Packed:
    """`packed` with zeros up to [outputs, inputs]."""
    more_rows, blocks = outputs - len(packed.values), -(-inputs // form.block) - packed.values.shape[1]
    if not more_rows and not blocks:
        return packed
    middle = 0x88 if form.bits == 4 else 128
    values = np.pad(packed.values, [(0, more_rows), (0, blocks), (0, 0)], constant_values=middle)
    scales = np.pad(packed.scales, [(0, more_rows), (0, blocks)])
    points = packed.zero_points
    if points is not None:
        zeros = unpacked(points, form.bits)[:, : packed.scales.shape[1]]
        points = pack_zeros(np.pad(zeros, [(0, more_rows), (0, blocks)]), form.bits)
    return Packed(values, scales, points)
