"""Checkpoints that are quantized already: their tensors by the ordinary names, re-packed without another rounding.

A matrix `x.weight` that is stored as codes and scales reads as `Weights`; where its groups are blocks of a product
(`Packing`) they are taken over bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.prequantized.awq import read_awq
from ganglion.partitioner.prequantized.compressed import read_compressed
from ganglion.partitioner.prequantized.gptq import read_gptq
from ganglion.partitioner.prequantized.mxfp4 import read_mxfp4
from ganglion.partitioner.safetensors import Tensor
from ganglion.partitioner.weights import Weights
from ganglion.wire.errors import Unsupported

FIELD: Final = "quantization_config"
METHODS: Final[dict[str, Callable[[Config], Callable[[dict[str, Tensor]], dict[str, Weights]]]]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed,
    "mxfp4": read_mxfp4,
}


def quantization_of(config: Config) -> Callable[[dict[str, Tensor]], dict[str, Weights]] | None:
    """How the tensors of a checkpoint read, None where it is not quantized; raises Unsupported naming the methods."""
    described = config.object(FIELD)
    if described is None:
        return None
    method = described.text("quant_method", "(none named)")
    if method not in METHODS:
        raise Unsupported(
            f"{config.where}: an already quantized checkpoint, method {method}; supported are {', '.join(METHODS)} (or "
            "use the one in bfloat16 or float32)",
            param=FIELD,
        )
    return METHODS[method](described)


def without_quantization(config: Config) -> Config:
    """The configuration as if nothing were quantized, which is how its tensors read; raises as `quantization_of`."""
    if quantization_of(config) is None:
        return config
    return Config({name: value for name, value in config.fields.items() if name != FIELD}, config.where)
