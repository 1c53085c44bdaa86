"""Weights that are other weights seen otherwise: rows in another order, a number added, a matrix turned on its side."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.weights import Floats, Packed, Packing, Stored, Weights
from ganglion.wire.errors import Unsupported

Rows = npt.NDArray[np.intp]


class Computed(ABC):
    """The base of weights whose numbers are computed: float32, no packing unless a subclass has one."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""

    @property
    def stored(self) -> Stored:
        """The type of what `raw_rows` gives."""
        return "float32"

    @property
    def packing(self) -> Packing | None:
        """How it can be had without another rounding."""
        return None

    def part(self, index: int) -> Weights:
        """Matrix `index` of a stack; raises Unsupported where this is not a stack."""
        raise Unsupported(f"tensor {self.name}: a tensor of shape {list(self.shape)} is not cut in matrices")

    def raw_rows(self, start: int, stop: int) -> memoryview:
        """Bytes of rows start..stop in `stored`."""
        return np.ascontiguousarray(self.rows(start, stop)).data.cast("B")

    @abstractmethod
    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""

    def packed_rows(self, start: int, stop: int) -> Packed:
        """Rows start..stop in `packing`; raises Unsupported without one."""
        raise Unsupported(f"tensor {self.name}: its numbers are not in blocks that can be taken over")

    def packed_columns(self, start: int, stop: int) -> Packed:
        """Columns start..stop in `packing`; raises Unsupported without one."""
        raise Unsupported(f"tensor {self.name}: its numbers are not in blocks that can be taken over")


@dataclass(frozen=True)
class View(Computed):
    """The base of weights made of one other: its name, shape and bytes."""

    inner: Weights

    @property
    def name(self) -> str:  # type: ignore[override]
        """The inner one's."""
        return self.inner.name

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The inner one's."""
        return self.inner.shape

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.inner.stored_bytes


@dataclass(frozen=True)
class RopeRows(View):
    """A query or key matrix (or its bias) of `heads` heads whose rows lie pair by pair, in Hugging Face's order.

    `inner` has a head's rows as (0, half), (1, half + 1), ...; here they are 0, 1, ..., half, half + 1, ... Rows move
    whole, so blocks of a row move with it and keep their packing.
    """

    heads: int

    @property
    def stored(self) -> Stored:
        """The inner one's."""
        return self.inner.stored

    @property
    def packing(self) -> Packing | None:
        """The inner one's: a row keeps its blocks."""
        return self.inner.packing

    def raw_rows(self, start: int, stop: int) -> memoryview:
        """Bytes of rows start..stop in `stored`."""
        first, last, order = self._span(start, stop)
        raw = np.frombuffer(self.inner.raw_rows(first, last), np.uint8).reshape(last - first, -1)
        return raw[order].data.cast("B")

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""
        first, last, order = self._span(start, stop)
        return self.inner.rows(first, last)[order]

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""
        return self.inner.columns(start, stop)[self._order()]

    def packed_rows(self, start: int, stop: int) -> Packed:
        """Rows start..stop in `packing`."""
        first, last, order = self._span(start, stop)
        return _reordered(self.inner.packed_rows(first, last), order)

    def packed_columns(self, start: int, stop: int) -> Packed:
        """Columns start..stop in `packing`."""
        return _reordered(self.inner.packed_columns(start, stop), self._order())

    def _order(self) -> Rows:
        return np.arange(self.shape[0]).reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def _span(self, start: int, stop: int) -> tuple[int, int, Rows]:
        """The inner rows of every head that start..stop touches, and where among them each row lies."""
        width = self.shape[0] // self.heads
        first, last = start // width * width, -(-stop // width) * width
        return first, last, self._order()[start:stop] - first


def _reordered(packed: Packed, order: Rows) -> Packed:
    zero_points = None if packed.zero_points is None else packed.zero_points[order]
    return Packed(packed.values[order], packed.scales[order], zero_points)


@dataclass(frozen=True)
class Shifted(View):
    """A vector plus a number: norms that a format stores with one added."""

    add: float

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""
        return self.inner.rows(start, stop) + np.float32(self.add)

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""
        return self.inner.columns(start, stop) + np.float32(self.add)


@dataclass(frozen=True)
class Transposed(View):
    """A matrix turned on its side, or every matrix of a stack."""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The inner one's, the last two exchanged."""
        return (*self.inner.shape[:-2], self.inner.shape[-1], self.inner.shape[-2])

    def part(self, index: int) -> Weights:
        """Matrix `index` of a stack."""
        return Transposed(self.inner.part(index))

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop of a matrix, matrices start..stop of a stack, as float32."""
        if len(self.shape) == 3:
            return self.inner.rows(start, stop).swapaxes(1, 2)
        return self.inner.columns(start, stop).T

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""
        return self.inner.rows(start, stop).T


@dataclass(frozen=True)
class Interleaved(Computed):
    """Two tensors of one shape, their outputs in turn, along `axis`: stacks, matrices of them, or their biases.

    Of a stack [experts, outputs, inputs] and of biases [experts, outputs] it is 1, of a matrix 0.
    """

    name: str
    even: Weights
    odd: Weights
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Twice as many outputs as each has."""
        sizes = list(self.even.shape)
        sizes[self.axis] *= 2
        return tuple(sizes)

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.even.stored_bytes + self.odd.stored_bytes

    def part(self, index: int) -> Weights:
        """Matrix `index` of a stack."""
        return Interleaved(f"{self.name}[{index}]", self.even.part(index), self.odd.part(index), self.axis - 1)

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""
        if self.axis:
            return self._join(lambda inner: inner.rows(start, stop))
        first, last = start // 2, -(-stop // 2)
        return self._join(lambda inner: inner.rows(first, last))[start - 2 * first : stop - 2 * first]

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""
        if self.axis == 0:
            return self._join(lambda inner: inner.columns(start, stop))
        first, last = start // 2, -(-stop // 2)
        return self._join(lambda inner: inner.columns(first, last))[:, start - 2 * first : stop - 2 * first]

    def _join(self, read: Callable[[Weights], Floats]) -> Floats:
        even, odd = read(self.even), read(self.odd)
        sizes = list(even.shape)
        sizes[self.axis] *= 2
        return np.stack([even, odd], axis=self.axis + 1).reshape(sizes)
