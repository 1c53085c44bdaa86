"""A better scale for each block of 4-bit numbers than its largest one: the least squared error among a few."""

from __future__ import annotations

from typing import Final

import numpy as np

from ganglion.partitioner.weights import Floats

# What the number of largest magnitude is mapped to; beyond -8 it is clipped, and the others get finer steps.
TARGETS: Final = tuple(np.float32(-target / 10) for target in range(70, 105, 5))
ROWS: Final = 256  # outputs at a time, so that the scratch stays in the cache


def best_scales(by_block: Floats, extreme: Floats) -> Floats:
    """Scales [outputs, blocks] for 4-bit numbers of `by_block` [outputs, blocks, block], zero point 8.

    extreme: each block's number of largest magnitude, with its sign. Every candidate rounds the block with a trial
    scale, then takes the scale that fits those integers best, sum(x q) / sum(q q): the error that is left is
    sum(x x) - sum(x q)^2 / sum(q q). Scales of this form are llama.cpp's `make_qx_quants`.
    """
    found = np.empty_like(extreme)
    for start in range(0, len(by_block), ROWS):
        found[start : start + ROWS] = _best(by_block[start : start + ROWS], extreme[start : start + ROWS])
    return found


def _best(by_block: Floats, extreme: Floats) -> Floats:
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        unit = np.float32(1) / extreme
    unit = np.where(np.isfinite(unit), unit, np.float32(0))
    best = extreme / np.float32(-8)
    gain = np.full(extreme.shape, -1, np.float32)
    values = np.empty_like(by_block)
    for target in TARGETS:
        np.multiply(by_block, (unit * target)[..., None], out=values)
        np.rint(values, out=values)
        np.clip(values, -8, 7, out=values)
        along = np.einsum("abc,abc->ab", by_block, values)
        square = np.einsum("abc,abc->ab", values, values)
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = along / square
            fits = along * scale
        better = (fits > gain) & (square > 0)
        gain = np.where(better, fits, gain)
        best = np.where(better, scale, best)
    return best
