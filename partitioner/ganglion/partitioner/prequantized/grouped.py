"""Matrices of unsigned codes with a scale for each group of inputs: what GPTQ, AWQ and compressed-tensors store."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.safetensors import Tensor
from ganglion.partitioner.views import Computed
from ganglion.partitioner.weights import Bytes, Floats, Packed, Packing, finite
from ganglion.wire.errors import Corrupt, Unsupported

Integers = npt.NDArray[np.int32]
BLOCKS: Final[tuple[Literal[128, 64, 32, 16], ...]] = (128, 64, 32, 16)


@dataclass(frozen=True)
class Grouped(Computed):
    """A matrix [outputs, inputs] of codes 0 .. 2^bits - 1: a number is (code - zero) * scale, in float32.

    parts: the stored tensors, for the bytes. group: inputs that share a scale. order: of every input its group where
    that is not input // group.
    """

    name: str
    shape: tuple[int, ...]
    bits: Literal[4, 8]
    group: int
    parts: tuple[Tensor, ...]
    order: Integers | None

    @abstractmethod
    def codes(self, outputs: slice, start: int, stop: int) -> Bytes:
        """Codes [outputs, stop - start] of inputs start..stop."""

    @abstractmethod
    def scales(self, outputs: slice) -> Floats:
        """Scales [outputs, groups]."""

    @abstractmethod
    def zeros(self, outputs: slice) -> Integers | None:
        """Zeros [outputs, groups], None where all are 2^(bits - 1)."""

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return sum(part.stored_bytes for part in self.parts)

    @property
    def packing(self) -> Packing | None:
        """How it can be had without another rounding; looks at all zeros once."""
        return self._packing

    @cached_property
    def _packing(self) -> Packing | None:
        if self.order is not None:
            return None
        outputs, inputs = self.shape
        zeros = self.zeros(slice(0, outputs))
        middle = zeros is None or bool((zeros == 1 << self.bits - 1).all())
        if zeros is not None and not middle and (zeros.min() < 0 or zeros.max() >= 1 << self.bits):
            return None
        if self.bits == 8 and self.group == inputs and middle:
            return Packing(8, 0)
        for block in BLOCKS:
            if self.group % block == 0:
                return Packing(self.bits, block, zero_points=not middle)
        return None

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""
        return self._numbers(slice(start, stop), 0, self.shape[1])

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop as float32 [rows, stop - start]."""
        return self._numbers(slice(0, self.shape[0]), start, stop)

    def packed_rows(self, start: int, stop: int) -> Packed:
        """Rows start..stop in `packing`; raises Unsupported without one."""
        return self._packed(slice(start, stop), 0, self.shape[1])

    def packed_columns(self, start: int, stop: int) -> Packed:
        """Columns start..stop (multiples of the packing's block, or the end) in `packing`."""
        return self._packed(slice(0, self.shape[0]), start, stop)

    def _numbers(self, outputs: slice, start: int, stop: int) -> Floats:
        groups = np.arange(start, stop) // self.group if self.order is None else self.order[start:stop]
        numbers = self.codes(outputs, start, stop).astype(np.float32)
        zeros = self.zeros(outputs)
        numbers -= np.float32(1 << self.bits - 1) if zeros is None else zeros.astype(np.float32)[:, groups]
        with np.errstate(over="ignore", invalid="ignore"):
            numbers *= self.scales(outputs)[:, groups]
        return finite(self.name, numbers)

    def _packed(self, outputs: slice, start: int, stop: int) -> Packed:
        packing = self.packing
        if packing is None:
            raise Unsupported(f"tensor {self.name}: its groups are not those of a product of blocks")
        block = packing.block or self.shape[1]
        codes = self.codes(outputs, start, stop)
        blocks = -(-(stop - start) // block)
        groups = (start + block * np.arange(blocks)) // self.group
        if not packing.block:
            return Packed(np.ascontiguousarray(codes)[:, None, :], finite(self.name, self.scales(outputs)))
        if missing := blocks * block - codes.shape[1]:
            codes = np.pad(codes, ((0, 0), (0, missing)))
        values = _in_bytes(codes, self.bits).reshape(codes.shape[0], blocks, -1)
        zeros = self.zeros(outputs) if packing.zero_points else None
        points = None if zeros is None else _in_bytes(zeros[:, groups].astype(np.uint8), self.bits)
        return Packed(values, finite(self.name, np.ascontiguousarray(self.scales(outputs)[:, groups])), points)


def _in_bytes(codes: Bytes, bits: int) -> Bytes:
    """Codes [outputs, count], of 4 bits two in a byte, the even one low."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    even, odd = codes[:, 0::2], codes[:, 1::2]
    if even.shape[1] > odd.shape[1]:
        odd = np.pad(odd, ((0, 0), (0, 1)))
    return even | odd << np.uint8(4)


def codes_of(words: npt.NDArray[Any], bits: int) -> Bytes:
    """The codes in 32-bit words along the last axis, the lowest bits first."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    return np.stack([raw & np.uint8(15), raw >> np.uint8(4)], axis=-1).reshape(*raw.shape[:-1], -1)


def integers(tensor: Tensor, *shape: int) -> npt.NDArray[Any]:
    """An integer tensor as an array, which must have `shape`; raises Corrupt when it is of another type or shape."""
    kinds = {"I32": "<i4", "I64": "<i8", "I8": "<i1", "U8": "<u1"}
    if tensor.dtype not in kinds or tensor.shape != shape:
        raise Corrupt(f"tensor {tensor.name}: {tensor.dtype}{list(tensor.shape)}, integers {list(shape)} are expected")
    return np.frombuffer(tensor.data, kinds[tensor.dtype]).reshape(shape)


def companion(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor `name` that belongs to a quantized one; raises Corrupt when it is missing."""
    if name not in tensors:
        raise Corrupt(f"tensor {name} is missing; a quantized matrix needs it")
    return tensors[name]


def inputs_per_group(name: str, inputs: int, groups: int, group: int) -> int:
    """Inputs that share a scale where config.json says `group` (-1 for all); raises Corrupt when sizes do not fit."""
    size = inputs if group == -1 else group
    if size < 1 or -(-inputs // size) != groups or (inputs % size and groups > 1):
        raise Corrupt(f"tensor {name}: {groups} groups of {size} for {inputs} inputs")
    return size
