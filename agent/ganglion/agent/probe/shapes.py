"""The products that the probe times: a format, a use, a size. `make_graphs` turns each into a file under `graphs/`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

GRAPHS: Final = Path(__file__).parent / "graphs"
INPUTS: Final = 2048
DECODE_OUTPUTS: Final[dict[tuple[str, str], int]] = {
    # Together beyond a last-level cache: 64 + 40 + 34 + 32 + 36 MB, or half of it where memory is short.
    ("large", "fp32"): 8192,
    ("large", "int4-32"): 32768,
    ("large", "int4-128"): 32768,
    ("large", "int8"): 16384,
    ("large", "int8-32"): 16384,
    ("small", "fp32"): 4096,
    ("small", "int4-32"): 16384,
    ("small", "int4-128"): 16384,
    ("small", "int8"): 8192,
    ("small", "int8-32"): 8192,
}
PREFILL_OUTPUTS: Final = 2048

Size = Literal["large", "small"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One product `[S, inputs] x [inputs, outputs]` in the format `name`.

    bits: of its integers, 0 for float32. block: inputs with a scale of their own, 0 for one scale an output, whose
    product rounds the rows.
    """

    name: str  # of the format: a key of DeviceProfile.rates
    use: str  # "prefill", or the size of a decode graph
    bits: int
    block: int
    outputs: int
    inputs: int = INPUTS

    @property
    def file(self) -> str:
        """Under GRAPHS."""
        return f"{self.name}-{self.use}.onnx"

    @property
    def weights(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Initializer -> (dtype, dimensions), in the order of the operator's inputs."""
        if not self.bits:
            return {"weights": ("float32", (self.inputs, self.outputs))}
        if not self.block:
            return {"weights": ("int8", (self.inputs, self.outputs)), "scales": ("float32", (self.outputs,))}
        blocks = self.inputs // self.block
        return {
            "weights": ("uint8", (self.outputs, blocks, self.block * self.bits // 8)),
            "scales": ("float32", (self.outputs * blocks,)),
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes that one row's product streams."""
        return sum(_ITEM_BYTES[kind] * math.prod(dims) for kind, dims in self.weights.values())

    @property
    def flop(self) -> int:
        """Floating-point operations of a row's product, or as many of integers."""
        return 2 * self.inputs * self.outputs


_ITEM_BYTES: Final = {"float32": 4, "uint8": 1, "int8": 1}
_FORMATS: Final = {"fp32": (0, 0), "int4-32": (4, 32), "int4-128": (4, 128), "int8": (8, 0), "int8-32": (8, 32)}
SHAPES: Final = (
    *(Shape(name, size, *_FORMATS[name], outputs) for (size, name), outputs in DECODE_OUTPUTS.items()),
    *(Shape(name, "prefill", *_FORMATS[name], PREFILL_OUTPUTS) for name in _FORMATS),
)
