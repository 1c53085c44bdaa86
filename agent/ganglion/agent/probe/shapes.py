"""The products that the probe times: a format, a use, a size. `make_graphs` turns each into a file under `graphs/`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

GRAPHS: Final = Path(__file__).parent / "graphs"
INPUTS: Final = 2048
DECODE_OUTPUTS: Final[dict[tuple[str, str], int]] = {
    # Together far beyond a last-level cache: 128 + 80 + 68 MB, or a quarter of it where memory is short.
    ("large", "fp32"): 16384,
    ("large", "int4-32"): 65536,
    ("large", "int4-128"): 65536,
    ("small", "fp32"): 4096,
    ("small", "int4-32"): 16384,
    ("small", "int4-128"): 16384,
}
PREFILL_OUTPUTS: Final = 2048
PREFILL_ROWS: Final = 128

Size = Literal["large", "small"]


@dataclass(frozen=True, slots=True)
class Shape:
    """One product `[S, inputs] x [inputs, outputs]`; block 0 is float32."""

    name: str  # of the format: a key of DeviceProfile.rates
    use: str  # "prefill", or the size of a decode graph
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
        if not self.block:
            return {"weights": ("float32", (self.inputs, self.outputs))}
        blocks = self.inputs // self.block
        return {
            "weights": ("uint8", (self.outputs, blocks, self.block // 2)),
            "scales": ("float32", (self.outputs * blocks,)),
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes that one row's product streams."""
        if not self.block:
            return 4 * self.inputs * self.outputs
        return self.inputs * self.outputs // 2 + 4 * self.inputs * self.outputs // self.block

    @property
    def flop(self) -> int:
        """Floating-point operations of a row's product."""
        return 2 * self.inputs * self.outputs


_BLOCKS: Final = {"fp32": 0, "int4-32": 32, "int4-128": 128}
SHAPES: Final = (
    *(Shape(name, size, _BLOCKS[name], outputs) for (size, name), outputs in DECODE_OUTPUTS.items()),
    *(Shape(name, "prefill", block, PREFILL_OUTPUTS) for name, block in _BLOCKS.items()),
)
