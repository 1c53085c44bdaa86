"""Rotary position embedding: the cosine and sine caches, in the float32 steps that transformers takes.

Every power, quotient and cosine is computed in float64 and rounded to float32 where transformers' float32 code has a
result, so the caches agree with it to the last bit or the one before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.config import Config
from ganglion.wire.errors import Unsupported

Floats = npt.NDArray[np.float32]

# "dynamic" differs from "default" only beyond max_position_embeddings, which is the context here.
SUPPORTED: Final = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How positions turn: inverse frequencies [head_dim / 2] float32, and what cosine and sine are multiplied with."""

    inverse_frequencies: tuple[float, ...]
    scaling: float

    def rows(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Cosine and sine of positions start..stop, each [stop - start, head_dim / 2] float32."""
        positions = np.arange(start, stop, dtype=np.float32)[:, None]
        angles = (positions * np.array(self.inverse_frequencies, np.float32)).astype(np.float64)
        scaling = np.float32(self.scaling)
        return np.cos(angles).astype(np.float32) * scaling, np.sin(angles).astype(np.float32) * scaling


def read_rope(config: Config, head_dim: int, context: int) -> Rope:
    """Rope of a configuration, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`); raises Unsupported."""
    parameters = config.object("rope_parameters") or config.object("rope_scaling") or Config({}, config.where)
    theta = (parameters if parameters.has("rope_theta") else config).number("rope_theta", 10000.0)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind not in SUPPORTED:
        raise Unsupported(
            f"{config.where}: rope type {kind!r}; supported are {', '.join(SUPPORTED)}", param="rope_type"
        )
    for source in (parameters, config):
        if source.has("partial_rotary_factor") and source.number("partial_rotary_factor") != 1.0:
            raise Unsupported(f"{config.where}: partial_rotary_factor other than 1", param="partial_rotary_factor")
    powers = _powers(theta, head_dim)
    base = (np.float32(1.0) / powers).astype(np.float32)
    if kind == "linear":
        return _rope(base / np.float32(parameters.number("factor")))
    if kind == "llama3":
        return _rope(_llama3(base, parameters, context))
    if kind == "yarn":
        return _yarn(powers, parameters, theta, head_dim, context)
    return _rope(base)


def _rope(frequencies: Floats, scaling: float = 1.0) -> Rope:
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), scaling)


def _powers(theta: float, head_dim: int) -> Floats:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _llama3(base: Floats, parameters: Config, context: int) -> Floats:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth passage between."""
    factor = np.float32(parameters.number("factor"))
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if high <= low:
        raise Unsupported(f"{parameters.where}: high_freq_factor {high} is not above low_freq_factor {low}")
    original = parameters.whole("original_max_position_embeddings", context)
    wavelengths = np.float32(2 * math.pi) / base
    scaled = np.where(wavelengths > original / low, base / factor, base)
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return np.where(medium, between, scaled).astype(np.float32)


def _yarn(powers: Floats, parameters: Config, theta: float, head_dim: int, context: int) -> Rope:
    """YaRN (arXiv 2309.00071): interpolation below, extrapolation above a range of dimensions."""
    original = parameters.whole("original_max_position_embeddings", context)
    factor = parameters.number("factor", context / original)

    def magnitude(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling = magnitude()
    if parameters.has("attention_factor"):
        scaling = parameters.number("attention_factor")
    elif parameters.fields.get("mscale") and parameters.fields.get("mscale_all_dim"):
        scaling = magnitude(parameters.number("mscale")) / magnitude(parameters.number("mscale_all_dim"))

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.number("beta_fast", 32.0)), dimension(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    keep = (np.float32(1) - ramp).astype(np.float32)
    extrapolated = np.float32(1) / powers
    interpolated = np.float32(1) / (np.float32(factor) * powers)
    mixed: Floats = (interpolated * (np.float32(1) - keep) + extrapolated * keep).astype(np.float32)
    return _rope(mixed, scaling)
