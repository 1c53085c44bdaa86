"""Rotary position embedding: the cosine and sine caches, in the float32 steps that transformers takes.

Every power, quotient and cosine is computed in float64 and rounded to float32 where transformers' float32 code has a
result, so the caches agree with it to the last bit or the one before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.config import Config
from ganglion.wire.errors import InvalidDocument, Unsupported

Floats = npt.NDArray[np.float32]

# "dynamic" differs from "default" only beyond max_position_embeddings, which is the context here.
SUPPORTED: Final = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ROTARY_QUANTUM: Final = 16  # ONNX Runtime's rotary embedding turns multiples of 16 dimensions


@dataclass(frozen=True)
class Rope:
    """How positions turn: inverse frequencies [turned / 2] float32, and what cosine and sine are multiplied with."""

    inverse_frequencies: tuple[float, ...]
    scaling: float

    def rows(self, start: int, stop: int) -> tuple[Floats, Floats]:
        """Cosine and sine of positions start..stop, each [stop - start, turned / 2] float32."""
        positions = np.arange(start, stop, dtype=np.float32)[:, None]
        angles = (positions * np.array(self.inverse_frequencies, np.float32)).astype(np.float64)
        scaling = np.float32(self.scaling)
        return np.cos(angles).astype(np.float32) * scaling, np.sin(angles).astype(np.float32) * scaling


def read_ropes(
    config: Config, head_dim: int, context: int, *, partial: bool = False, kinds: Sequence[str] = SUPPORTED
) -> tuple[tuple[int, Rope], ...]:
    """The rope of a configuration, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

    Returns (context, rope) by rising context: a deployment takes the first whose context is long enough. partial:
    whether the family can turn only the first `partial_rotary_factor` of a head. kinds: rope types that it takes.
    Raises Unsupported or InvalidDocument naming type or field.
    """
    parameters = config.object("rope_scaling") or config.object("rope_parameters") or Config({}, config.where)
    return rope_of(parameters, config, head_dim, context, partial=partial, kinds=kinds)


def rope_of(
    parameters: Config,
    config: Config,
    head_dim: int,
    context: int,
    *,
    partial: bool = False,
    kinds: Sequence[str] = SUPPORTED,
) -> tuple[tuple[int, Rope], ...]:
    """As `read_ropes`, of the rope that `parameters` describes; fields that it lacks are looked up in `config`."""
    theta = (parameters if parameters.has("rope_theta") else config).number("rope_theta", 10000.0)
    if theta <= 1:
        raise InvalidDocument(
            f"{config.where}: rope_theta is {theta}, a number above 1 is expected", param="rope_theta"
        )
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind not in kinds:
        raise Unsupported(f"{config.where}: rope type {kind!r}; supported are {', '.join(kinds)}", param="rope_type")
    turned = _turned(parameters, config, head_dim, partial)
    # Where a configuration has the original context outside its rope, transformers takes that one.
    source = config if config.has("original_max_position_embeddings") else parameters
    original = source.whole("original_max_position_embeddings", context)
    powers = _powers(theta, turned)
    base = (np.float32(1.0) / powers).astype(np.float32)
    if kind == "longrope":
        return _longrope(powers, parameters, context, original)
    if kind == "linear":
        rope = _rope(base / np.float32(parameters.number("factor")))
    elif kind == "llama3":
        rope = _rope(_llama3(base, parameters, original))
    elif kind == "yarn":
        rope = _yarn(powers, parameters, theta, context, original)
    else:
        rope = _rope(base)
    return ((context, rope),)


def _turned(parameters: Config, config: Config, head_dim: int, partial: bool) -> int:
    """Dimensions of a head that turn."""
    name = "partial_rotary_factor"
    factor = (parameters if parameters.has(name) else config).number(name, 1.0)
    turned = int(head_dim * factor)
    if factor != 1.0 and (not partial or factor > 1.0 or not turned or turned % ROTARY_QUANTUM):
        raise Unsupported(
            f"{config.where}: {name} {factor} of head dimension {head_dim}"
            + (
                f"; multiples of {ROTARY_QUANTUM} dimensions can turn" if partial else "; this family turns whole heads"
            ),
            param=name,
        )
    return turned


def _rope(frequencies: Floats, scaling: float = 1.0) -> Rope:
    return Rope(tuple(float(f) for f in frequencies.astype(np.float32)), scaling)


def _powers(theta: float, head_dim: int) -> Floats:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _longrope(powers: Floats, parameters: Config, context: int, original: int) -> tuple[tuple[int, Rope], ...]:
    """LongRoPE (arXiv 2402.13753): short factors for contexts up to the original one, long factors beyond it."""
    factor = parameters.number("factor", context / original)
    if original == 1:
        raise Unsupported(
            f"{parameters.where}: an original context of 1 token", param="original_max_position_embeddings"
        )
    scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    scaling = parameters.number("attention_factor", scaling)

    def scaled(name: str) -> Rope:
        return _rope(np.float32(1.0) / (_factors(parameters, name, len(powers)) * powers), scaling)

    short, long = (min(original, context), scaled("short_factor")), (context, scaled("long_factor"))
    return (short, long) if original < context else (short,)


def _factors(parameters: Config, name: str, count: int) -> Floats:
    given = parameters.fields.get(name)
    found = given if isinstance(given, list) else []
    if len(found) != count or not all(type(one) in (int, float) and math.isfinite(one) and one > 0 for one in found):
        raise InvalidDocument(f"{parameters.where}: {name} is not a list of {count} numbers above 0", param=name)
    return np.array(found, np.float32)


def _llama3(base: Floats, parameters: Config, original: int) -> Floats:
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth passage between."""
    factor = np.float32(parameters.number("factor"))
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if high <= low:
        raise Unsupported(f"{parameters.where}: high_freq_factor {high} is not above low_freq_factor {low}")
    wavelengths = np.float32(2 * math.pi) / base
    scaled = np.where(wavelengths > original / low, base / factor, base)
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelengths < original / high) & ~(wavelengths > original / low)
    return np.where(medium, between, scaled).astype(np.float32)


def _yarn(powers: Floats, parameters: Config, theta: float, context: int, original: int) -> Rope:
    """YaRN (arXiv 2309.00071): interpolation below, extrapolation above a range of dimensions."""
    turned = 2 * len(powers)
    factor = parameters.number("factor", context / original)

    def magnitude(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    scaling = magnitude()
    if parameters.has("attention_factor"):
        scaling = parameters.number("attention_factor")
    elif parameters.fields.get("mscale") and parameters.fields.get("mscale_all_dim"):
        scaling = magnitude(parameters.number("mscale")) / magnitude(parameters.number("mscale_all_dim"))

    def dimension(rotations: float) -> float:
        return turned * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.number("beta_fast", 32.0)), dimension(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    span = (high - low) or 0.001
    ramp = np.clip((np.arange(turned // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    keep = (np.float32(1) - ramp).astype(np.float32)
    extrapolated = np.float32(1) / powers
    interpolated = np.float32(1) / (np.float32(factor) * powers)
    mixed: Floats = (interpolated * (np.float32(1) - keep) + extrapolated * keep).astype(np.float32)
    return _rope(mixed, scaling)
