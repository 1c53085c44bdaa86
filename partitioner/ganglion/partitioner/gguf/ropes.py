"""Rope of a GGUF file as config.json's `rope_parameters`: scalings by name, or by factors of every frequency."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from ganglion.partitioner.gguf.metadata import Metadata
from ganglion.partitioner.weights import Floats, Weights
from ganglion.wire.errors import InvalidDocument, Unsupported

THETA: Final = 10000.0
LLAMA3_CONTEXT: Final = 8192  # what every Llama 3.1 to 3.3 was trained on before its frequencies were scaled
CLOSE: Final = 1e-5


def rope_parameters(metadata: Metadata, tensors: dict[str, Weights], width: int, context: int) -> dict[str, Any]:
    """The `rope_parameters` of heads that turn `width` of their dimensions; raises Unsupported or InvalidDocument."""
    theta = metadata.positive(".rope.freq_base", THETA)
    base: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if "rope_factors_long.weight" in tensors or "rope_factors_short.weight" in tensors:
        return base | _longrope(metadata, tensors, width, context)
    kind = metadata.text(".rope.scaling.type", "linear" if metadata.has(".rope.scale_linear") else "none")
    if "rope_freqs.weight" in tensors:
        if kind not in {"none", "llama3"}:
            raise Unsupported(f"{metadata.path}: rope scaling {kind} and factors of the frequencies at once")
        return base | _by_factors(_factors(metadata, tensors, "rope_freqs.weight", width), theta, width, context)
    if kind == "none":
        return base
    if kind == "linear":
        factor = metadata.number(".rope.scaling.factor", metadata.number(".rope.scale_linear", 1.0))
        return base if factor in {0.0, 1.0} else base | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return base | _yarn(metadata)
    if kind == "longrope":
        raise InvalidDocument(f"{metadata.path}: rope scaling longrope without its factors")
    raise Unsupported(f"{metadata.path}: rope scaling {kind!r}; supported are none, linear, yarn and longrope")


def _yarn(metadata: Metadata) -> dict[str, Any]:
    if metadata.number(".rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise Unsupported(f"{metadata.path}: {metadata.architecture}.rope.scaling.yarn_ext_factor other than 1")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": metadata.positive(".rope.scaling.factor"),
        "original_max_position_embeddings": metadata.whole(".rope.scaling.original_context_length"),
    }
    names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    for name, key in names.items():
        if metadata.has(f".rope.scaling.{key}"):
            found[name] = metadata.number(f".rope.scaling.{key}")
    return found


def _longrope(metadata: Metadata, tensors: dict[str, Weights], width: int, context: int) -> dict[str, Any]:
    """LongRoPE (arXiv 2402.13753): factors for short and for long texts."""
    original = metadata.whole(".rope.scaling.original_context_length", context)
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "short_factor": _decimals(_factors(metadata, tensors, "rope_factors_short.weight", width)),
        "long_factor": _decimals(_factors(metadata, tensors, "rope_factors_long.weight", width)),
    }
    usual = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original > 1 else 1.0
    magnitude = metadata.number(".rope.scaling.attn_factor", usual)
    if abs(magnitude - usual) > CLOSE * usual:
        found["attention_factor"] = magnitude
    return found


def _by_factors(factors: Floats, theta: float, width: int, context: int) -> dict[str, Any]:
    """Llama 3.1's scaling where its usual parameters give these factors; otherwise the factors themselves.

    A file holds the factors only. Original contexts that give equal factors are one scaling, so the first is taken.
    """
    factor = float(str(factors.max()))
    for original in (LLAMA3_CONTEXT, *(1 << power for power in range(5, 21))):
        if np.allclose(_llama3(factor, original, theta, width), factors, rtol=CLOSE, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": context,
        "short_factor": _decimals(factors),
        "long_factor": _decimals(factors),
        "attention_factor": 1.0,
    }


def _llama3(factor: float, original: int, theta: float, width: int) -> Floats:
    """What each frequency is divided by, with low and high frequency factors 1 and 4."""
    turns = original * theta ** -(np.arange(0, width, 2) / width) / (2 * math.pi)
    smooth = (turns - 1) / 3
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(turns > 4, 1, np.where(turns < 1, factor, between)).astype(np.float32)


def _factors(metadata: Metadata, tensors: dict[str, Weights], name: str, width: int) -> Floats:
    if name not in tensors:
        raise InvalidDocument(f"{metadata.path}: tensor {name} is missing")
    found = tensors[name]
    if found.shape != (width // 2,):
        raise InvalidDocument(
            f"{metadata.path}: tensor {name} has shape {list(found.shape)}, [{width // 2}] is expected"
        )
    factors = found.rows(0, width // 2)
    if not (factors > 0).all():
        raise InvalidDocument(f"{metadata.path}: tensor {name} holds {factors.min()}, numbers above 0 are expected")
    return factors


def _decimals(factors: Floats) -> list[float]:
    return [float(str(factor)) for factor in factors]
