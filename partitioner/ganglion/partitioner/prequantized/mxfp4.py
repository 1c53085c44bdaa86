"""gpt-oss's experts in MXFP4 (OCP Microscaling Formats 1.0): 32 numbers of 4 bits and a power of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.config import Config
from ganglion.partitioner.prequantized.grouped import companion, integers
from ganglion.partitioner.safetensors import Tensor
from ganglion.partitioner.views import Computed, Transposed
from ganglion.partitioner.weights import Floats, Weights, finite
from ganglion.wire.errors import Corrupt

Wrap = Callable[[dict[str, Tensor]], dict[str, Weights]]
BLOCK: Final = 32
NUMBERS: Final = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32
)
BIAS: Final = 127


@dataclass(frozen=True)
class Mxfp4(Computed):
    """Matrices [outputs, inputs], or a stack of them: uint8 [..., outputs, blocks, 16] and exponents [..., blocks]."""

    name: str
    blocks: npt.NDArray[Any]
    exponents: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Sizes in numbers."""
        return (*self.blocks.shape[:-2], self.blocks.shape[-2] * BLOCK)

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.blocks.nbytes + self.exponents.nbytes

    def part(self, index: int) -> Mxfp4:
        """Matrix `index` of a stack."""
        return Mxfp4(f"{self.name}[{index}]", self.blocks[index], self.exponents[index])

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop as float32."""
        return self._numbers(self.blocks[start:stop], self.exponents[start:stop])

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]."""
        first, last = start // BLOCK, -(-stop // BLOCK)
        numbers = self._numbers(self.blocks[:, first:last], self.exponents[:, first:last])
        return numbers[:, start - first * BLOCK : stop - first * BLOCK]

    def _numbers(self, blocks: npt.NDArray[Any], exponents: npt.NDArray[Any]) -> Floats:
        codes = np.stack([blocks & np.uint8(15), blocks >> np.uint8(4)], axis=-1).reshape(*blocks.shape[:-1], BLOCK)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            numbers = np.ldexp(NUMBERS[codes], exponents.astype(np.int32)[..., None] - BIAS)
        return finite(self.name, numbers.reshape(*blocks.shape[:-2], -1).astype(np.float32, copy=False))


def read_mxfp4(config: Config) -> Wrap:
    """How the tensors of a checkpoint in MXFP4 read: the stacks as [experts, inputs, outputs], as without it."""
    del config

    def wrap(tensors: dict[str, Tensor]) -> dict[str, Weights]:
        found: dict[str, Weights] = dict(tensors)
        for name in [name for name in tensors if name.endswith("_blocks")]:
            base, blocks = name.removesuffix("_blocks"), tensors[name]
            scales = companion(tensors, f"{base}_scales")
            if len(blocks.shape) < 3 or blocks.shape[-1] != BLOCK // 2 or scales.shape != blocks.shape[:-1]:
                raise Corrupt(f"tensor {name}: shape {list(blocks.shape)} does not fit scales {list(scales.shape)}")
            stack = Mxfp4(base, integers(blocks, *blocks.shape), integers(scales, *scales.shape))
            found[base] = Transposed(stack)
            del found[name], found[f"{base}_scales"]
        return found

    return wrap
