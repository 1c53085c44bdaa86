"""Keyed Gumbel noise: one number per (seed, position, token id), the same on every device and in a browser.

The hash, in 32-bit unsigned arithmetic that wraps (`fmix` is the finalizer of MurmurHash3, x86 32-bit variant):

    fmix(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16
    first  = fmix(fmix(fmix(low(seed) + 0x9E3779B9) ^ high(seed)) + position)
    second = fmix(first ^ 0x7F4A7C15)
    hash(id) = fmix(fmix(id * 0x9E3779B1 + first) ^ second)

`u = (hash + 0.5) / 2^32` lies strictly inside (0, 1); the noise is `g = -log(-log(u))` in float64
(Gumbel coupling, arXiv 2408.07978). argmax(score + g) then draws from softmax(score).
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

_MASK: Final = 0xFFFFFFFF
_SCALE: Final = 2.0**-32

NOISE_MAX: Final = -math.log(-math.log((_MASK + 0.5) * _SCALE))
NOISE_MIN: Final = -math.log(-math.log(0.5 * _SCALE))


def _fmix(value: int) -> int:
    value ^= value >> 16
    value = (value * 0x85EBCA6B) & _MASK
    value ^= value >> 13
    value = (value * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def _fmix_in_place(values: NDArray[np.uint32], scratch: NDArray[np.uint32]) -> None:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        np.right_shift(values, np.uint32(shift), out=scratch)
        np.bitwise_xor(values, scratch, out=values)
        np.multiply(values, np.uint32(factor), out=values)
    np.right_shift(values, np.uint32(16), out=scratch)
    np.bitwise_xor(values, scratch, out=values)


def hashes(seed: int, position: int, ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The hash of every id: `seed` 64 bits, `position` 32 bits, ids [n] uint32 -> [n] uint32."""
    first = _fmix((seed + 0x9E3779B9) & _MASK)
    first = _fmix(first ^ ((seed >> 32) & _MASK))
    first = _fmix((first + position) & _MASK)
    second = _fmix(first ^ 0x7F4A7C15)
    values = np.multiply(ids, np.uint32(0x9E3779B1), dtype=np.uint32)
    np.add(values, np.uint32(first), out=values)
    scratch = np.empty_like(values)
    _fmix_in_place(values, scratch)
    np.bitwise_xor(values, np.uint32(second), out=values)
    _fmix_in_place(values, scratch)
    return values


def from_hashes(values: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The noise that belongs to hashes: [n] uint32 -> [n] float64 in NOISE_MIN..NOISE_MAX."""
    uniform = (values.astype(np.float64) + 0.5) * _SCALE
    return np.asarray(-np.log(-np.log(uniform)), np.float64)


def noise(seed: int, position: int, ids: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The noise of every id at `position`: [n] uint32 -> [n] float64."""
    return from_hashes(hashes(seed, position, ids))


def hash_at_least(bound: float) -> int:
    """A hash such that every smaller one has noise below `bound`; rounded down, so that nothing is lost to rounding."""
    if bound <= NOISE_MIN:
        return 0
    uniform = math.exp(-math.exp(-bound))
    return max(0, min(_MASK, int(uniform * (1.0 - 1e-12) / _SCALE) - 2))
