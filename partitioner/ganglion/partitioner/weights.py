"""What every source of weights gives: a tensor's numbers by rows or columns, and as packed blocks where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ganglion.wire.errors import Corrupt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Stored = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Packing:
    """How a stored matrix can be had without another rounding: `bits` a number, blocks of `block` along the inputs.

    block: 0 where an output's numbers are one block, whatever their count (of 8 bits only). zero_points: whether blocks
    have integer zero points of their own; otherwise zero is 8 (4 bits) or 128 (8 bits).
    """

    bits: Literal[4, 8]
    block: Literal[0, 16, 32, 64, 128]
    zero_points: bool = False


@dataclass(frozen=True)
class Packed:
    """Numbers as MatMulNBits reads them: a number is (value - zero point) * scale.

    values: uint8 [outputs, blocks, block * bits / 8], of 4 bits the even one low in its byte. scales: float32
    [outputs, blocks]. zero_points: uint8 [outputs, ceil(blocks * bits / 8)], of 4 bits two in a byte, or None. Where
    the packing's block is 0 there is one block, and a number's value minus 128 is what an int8 product takes.
    """

    values: Bytes
    scales: Floats
    zero_points: Bytes | None = None


_EXPONENT: Final = {"float32": ("<u4", 0x7F800000), "float16": ("<u2", 0x7C00), "bfloat16": ("<u2", 0x7F80)}

_CHECKED: Final = 1 << 18  # numbers looked at in one go


def check_finite(raw: memoryview, tensor: Weights) -> None:
    """Raise Corrupt where a number of `raw`, stored as `tensor` says, is not finite: its exponent is all ones."""
    kind, exponent = _EXPONENT[tensor.stored]
    numbers = np.frombuffer(raw, kind)
    for start in range(0, numbers.size, _CHECKED):
        if ((numbers[start : start + _CHECKED] & exponent) == exponent).any():
            raise _not_finite(tensor.name)


def finite(name: str, floats: Floats) -> Floats:
    """`floats` of the tensor `name`; raises Corrupt when one is not finite."""
    if not np.isfinite(floats).all():
        raise _not_finite(name)
    return floats


def _not_finite(name: str) -> Corrupt:
    return Corrupt(f"tensor {name}: holds numbers that are not finite (NaN or infinity)")


class Weights(Protocol):
    """A tensor of a checkpoint, still on disk. Matrices are [outputs, inputs]; nothing is read before it is asked for.

    Every reader raises Corrupt where a number is not finite.
    """

    @property
    def name(self) -> str:
        """As Hugging Face's checkpoints name it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""
        ...

    @property
    def elements(self) -> int:
        """How many numbers."""
        ...

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        ...

    @property
    def stored(self) -> Stored:
        """The type of what `raw_rows` gives: the stored one, or float32 where numbers are stored in blocks."""
        ...

    @property
    def packing(self) -> Packing | None:
        """How it can be had without another rounding, None where it is stored as plain floats or in other blocks."""
        ...

    def part(self, index: int) -> Weights:
        """Matrix `index` of a stack of matrices; nothing of the others is read."""
        ...

    def raw_rows(self, start: int, stop: int) -> memoryview:
        """Bytes of rows start..stop in `stored`."""
        ...

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop of a vector, matrix or stack of matrices as float32."""
        ...

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""
        ...

    def packed_rows(self, start: int, stop: int) -> Packed:
        """Rows start..stop in `packing`; never called without one."""
        ...

    def packed_columns(self, start: int, stop: int) -> Packed:
        """Columns start..stop (multiples of the block, or the end) in `packing`; never called without one."""
        ...
