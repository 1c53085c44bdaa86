"""Tensors in ggml's block types: numbers by rows or columns, and blocks re-packed bit for bit for MatMulNBits.

Dequantizing is the `gguf` package's. A block type can be taken over where its numbers are (value - zero) * scale with
one scale for 16 or 32 neighbors and a zero in the middle: Q4_0, Q5_0, Q8_0, and of the K types Q3_K and Q6_K, whose
scales (a float16 times an integer of 6 or 8 bits) are float32 without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ganglion.partitioner.weights import Bytes, Floats, Packed, Packing, Stored, finite
from ganglion.wire.errors import Unsupported

Kind = GGMLQuantizationType
PLAIN: Final[dict[Kind, Stored]] = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
READABLE: Final = (
    *PLAIN,
    Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
    Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS,
    Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4,
)  # fmt: skip


@dataclass(frozen=True)
class BlockTensor:
    """One tensor of a GGUF file, still on disk: `Weights`. `name` as Hugging Face's checkpoints have it."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    data: memoryview

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.data.nbytes

    @property
    def stored(self) -> Stored:
        """The stored type, float32 for blocks."""
        return PLAIN.get(self.kind, "float32")

    @property
    def packing(self) -> Packing | None:
        """How a matrix can be had without another rounding."""
        return PACKINGS[self.kind][0] if self.kind in PACKINGS and len(self.shape) == 2 else None

    def part(self, index: int) -> BlockTensor:
        """Matrix `index` of a stack of matrices; nothing of the others is read."""
        size = self.data.nbytes // self.shape[0]
        data = self.data[index * size : (index + 1) * size]
        return BlockTensor(f"{self.name}[{index}]", self.kind, self.shape[1:], data)

    def raw_rows(self, start: int, stop: int) -> memoryview:
        """Bytes of rows start..stop in `stored`."""
        if self.kind not in PLAIN:
            return self.rows(start, stop).data.cast("B")
        size = self.data.nbytes // self.shape[0]
        return self.data[start * size : stop * size]

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop of a vector, matrix or stack as float32; raises Corrupt when a number is not finite."""
        if len(self.shape) == 1:
            vector: Floats = self.columns(start, stop)[0]
            return vector
        size = self.data.nbytes // self.shape[0]
        raw = np.frombuffer(self.data[start * size : stop * size], np.uint8).reshape(-1, self._row_bytes())
        return self._floats(raw).reshape(stop - start, *self.shape[1:])

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]; raises Corrupt when one is not finite."""
        block, _ = GGML_QUANT_SIZES[self.kind]
        first = start // block * block
        return self._floats(self._blocks(start, stop))[:, start - first : stop - first]

    def packed_rows(self, start: int, stop: int) -> Packed:
        """Rows start..stop in `packing`; raises Unsupported without one."""
        raw = np.frombuffer(self.data, np.uint8).reshape(-1, self._row_bytes())[start:stop]
        return self._packed(raw)

    def packed_columns(self, start: int, stop: int) -> Packed:
        """Columns start..stop (multiples of the packing's block, or the end) in `packing`."""
        block, _ = GGML_QUANT_SIZES[self.kind]
        whole = self._packed(self._blocks(start, stop))
        if self.packing is None or self.packing.block == block:
            return whole
        first, ours = start // block * block, slice(None)
        ours = slice((start - first) // self.packing.block, -(-(stop - first) // self.packing.block))
        return Packed(np.ascontiguousarray(whole.values[:, ours]), np.ascontiguousarray(whole.scales[:, ours]))

    def _row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * block_bytes

    def _blocks(self, start: int, stop: int) -> Bytes:
        """The bytes of every block that columns start..stop touch, [rows, bytes]."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        raw = np.frombuffer(self.data, np.uint8).reshape(-1, self._row_bytes())
        return np.ascontiguousarray(raw[:, start // block * block_bytes : -(-stop // block) * block_bytes])

    def _floats(self, raw: Bytes) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            floats = dequantize(raw, self.kind)
        return finite(self.name, floats.astype(np.float32, copy=False))

    def _packed(self, raw: Bytes) -> Packed:
        if self.kind not in PACKINGS:
            raise Unsupported(f"tensor {self.name}: {self.kind.name} blocks cannot be taken over")
        packing, unpack = PACKINGS[self.kind]
        outputs, block_bytes = raw.shape[0], GGML_QUANT_SIZES[self.kind][1]
        values, scales = unpack(raw.reshape(-1, block_bytes))
        values = values.reshape(outputs, -1, packing.block)
        if packing.bits == 4:
            values = values[..., 0::2] | values[..., 1::2] << np.uint8(4)
        return Packed(np.ascontiguousarray(values), finite(self.name, scales.reshape(outputs, -1)))


def _float16(raw: Bytes) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _halves(raw: Bytes) -> Bytes:
    """Nibbles of 16 bytes: elements 0..15 are the low ones, 16..31 the high ones."""
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=1)


def _q4_0(blocks: Bytes) -> tuple[Bytes, Floats]:
    return _halves(blocks[:, 2:]), _float16(blocks[:, :2])


def _q5_0(blocks: Bytes) -> tuple[Bytes, Floats]:
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little") << np.uint8(4)
    return (_halves(blocks[:, 6:]) | high) + np.uint8(128 - 16), _float16(blocks[:, :2])


def _q8_0(blocks: Bytes) -> tuple[Bytes, Floats]:
    return blocks[:, 2:] + np.uint8(128), _float16(blocks[:, :2])  # wraps: two's complement to offset 128


def _shifted(raw: Bytes, shifts: list[int], mask: int) -> Bytes:
    """[blocks, groups, bytes] -> [blocks, groups, shifts, bytes]: the fields of every byte, shift after shift."""
    return raw[:, :, None, :] >> np.array(shifts, np.uint8)[:, None] & np.uint8(mask)


def _q3_k(blocks: Bytes) -> tuple[Bytes, Floats]:
    """hmask [32], quants [64], scales [12] of 6 bits, float16: 16 blocks of 16, values -4..3, scales -32..31."""
    count = len(blocks)
    low = _shifted(blocks[:, 32:96].reshape(count, 2, 32), [0, 2, 4, 6], 3).reshape(count, 256)
    high = _shifted(blocks[:, :32].reshape(count, 1, 32), list(range(8)), 1).reshape(count, 256)
    packed = blocks[:, 96:108]
    lower = _shifted(packed[:, :8].reshape(count, 1, 8), [0, 4], 15).reshape(count, 16)
    upper = _shifted(packed[:, 8:].reshape(count, 1, 4), [0, 2, 4, 6], 3).reshape(count, 16)
    scales = (lower | upper << np.uint8(4)).astype(np.float32) - np.float32(32)
    values: Bytes = (low | high << np.uint8(2)) + np.uint8(8 - 4)
    return values, np.multiply(_float16(blocks[:, 108:]), scales, dtype=np.float32)


def _q6_k(blocks: Bytes) -> tuple[Bytes, Floats]:
    """low bits [128], high bits [64], scales int8 [16], float16: 16 blocks of 16, values -32..31."""
    count = len(blocks)
    low = _shifted(blocks[:, :128].reshape(count, 2, 64), [0, 4], 15).reshape(count, 256)
    high = _shifted(blocks[:, 128:192].reshape(count, 2, 32), [0, 2, 4, 6], 3).reshape(count, 256)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (low | high << np.uint8(4)) + np.uint8(128 - 32), _float16(blocks[:, 208:]) * scales


PACKINGS: Final[dict[Kind, tuple[Packing, Callable[[Bytes], tuple[Bytes, Floats]]]]] = {
    Kind.Q4_0: (Packing(4, 32), _q4_0),
    Kind.Q5_0: (Packing(8, 32), _q5_0),
    Kind.Q8_0: (Packing(8, 32), _q8_0),
    Kind.Q3_K: (Packing(4, 16), _q3_k),
    Kind.Q6_K: (Packing(8, 16), _q6_k),
}
