"""How wide numbers are as they travel: as they are, in 16 bits, or in 8 bits with a scale for each block. Pure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ganglion.wire.nouns.plan import Payload

BLOCK: Final = 64  # numbers that share a scale
_FLOAT32: Final = np.dtype(np.float32)


def width_of(payload: Payload, columns: int) -> int:
    """Elements of a row of `columns` numbers as it travels."""
    return columns + 4 * -(-columns // BLOCK) if payload == "int8" else columns


def dtype_of(payload: Payload, dtype: np.dtype[Any] = _FLOAT32) -> np.dtype[Any]:
    """The type of an element as it travels, of numbers of `dtype`."""
    if payload == "full":
        return dtype
    return np.dtype(np.float16 if payload == "fp16" else np.uint8)


def row_bytes(payload: Payload, columns: int) -> int:
    """Bytes of a row of `columns` float32 numbers as it travels."""
    return width_of(payload, columns) * dtype_of(payload).itemsize
