"""Pure: a text as a bag of hashed byte n-grams, what the gate's graph takes (fastText's features, arXiv 1607.01759).

Bytes need no vocabulary, so one encoder serves every language and every expert's tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BUCKETS: Final = 8192
GRAMS: Final = (1, 2, 3, 4, 5)  # bytes
HEAD_BYTES: Final = 1024  # of a longer text its beginning and its end are read
TAIL_BYTES: Final = 2048

_OFFSET: Final = np.uint32(2166136261)
_PRIME: Final = np.uint32(16777619)  # FNV-1a


@dataclass(frozen=True)
class Features:
    """buckets: int64 [n], each once, rising; weights: float32 [n], of Euclidean length 1. Of an empty text none."""

    buckets: NDArray[np.int64]
    weights: NDArray[np.float32]


def features(text: str) -> Features:
    """The features of a text: every n-gram's bucket, weighed with log(1 + how often it occurs)."""
    data = text.encode("utf-8", "replace")
    if len(data) > HEAD_BYTES + TAIL_BYTES:
        data = data[:HEAD_BYTES] + data[-TAIL_BYTES:]
    read = np.frombuffer(data, np.uint8).astype(np.uint32)
    hashed = [_buckets(read, size) for size in GRAMS if len(read) >= size]
    if not hashed:
        return Features(np.empty(0, np.int64), np.empty(0, np.float32))
    buckets, counts = np.unique(np.concatenate(hashed), return_counts=True)
    weights = np.log1p(counts).astype(np.float32)
    weights /= np.sqrt((weights * weights).sum())
    return Features(buckets.astype(np.int64), weights)


def _buckets(data: NDArray[np.uint32], size: int) -> NDArray[Any]:
    """The bucket of every n-gram of `size` bytes."""
    length = len(data) - size + 1
    found = np.full(length, _OFFSET ^ np.uint32(size), np.uint32)
    for at in range(size):
        found = (found ^ data[at : at + length]) * _PRIME
    return (found ^ (found >> np.uint32(15))) % np.uint32(BUCKETS)
