"""Rounding to each integer format against a dumb one, number by number; the search never does worse."""

from __future__ import annotations

import numpy as np
import pytest

from ganglion.partitioner.quantize import Format, dequantize, parse_format, quantize
from ganglion.wire.errors import InvalidRequest

RNG = np.random.default_rng(5)
NAMES = ["int4-16", "int4-32", "int4-128", "int4-32z", "int8", "int8-16", "int8-32", "int8-64z"]


def dumb(row: np.ndarray, form: Format) -> list[float]:
    """The numbers that a rounded row stands for."""
    out: list[float] = []
    step = form.block or len(row)
    for start in range(0, len(row), step):
        part = [float(number) for number in row[start : start + step]]
        if form.zero_points:
            low, high = min(0.0, *part), max(0.0, *part)
            scale = (high - low) / (2**form.bits - 1)
            zero = round(-low / scale) if scale else 0
            levels = [max(-zero, min(2**form.bits - 1 - zero, round(x / scale))) if scale else 0 for x in part]
        elif form.bits == 4:
            scale = max(part, key=abs) / -8
            levels = [max(-8, min(7, round(x / scale))) if scale else 0 for x in part]
        else:
            scale = max(abs(x) for x in part) / (127 if form.block else 64)
            levels = [round(x / scale) if scale else 0 for x in part]
        out += [level * scale for level in levels]
    return out


@pytest.mark.parametrize("inputs", [32, 100, 256])
@pytest.mark.parametrize("name", NAMES)
def test_every_format_equals_the_dumb_one(name: str, inputs: int) -> None:
    form = parse_format(name)
    assert form.name == name
    weights = RNG.standard_normal((5, inputs)).astype(np.float32)
    weights[0] = 0
    weights[1] = np.abs(weights[1])
    weights[2, 3] = 40
    packed = quantize(weights, form)
    numbers = dequantize(packed, form, inputs)
    assert numbers.shape == weights.shape
    for row, given in zip(numbers, weights, strict=True):
        steps = np.abs(np.diff(np.unique(np.array(dumb(given, form)))))
        near = np.abs(row - np.array(dumb(given, form)))
        # A number half-way between two levels may go either way: scales are float32.
        assert near.max() <= (steps.max() if len(steps) else 0) * 1.001 + 1e-6
        assert (near > 1e-5).mean() < 0.02


def test_integer_products_do_not_saturate_without_vnni() -> None:
    """Pairs of products of a row (0..255) and a weight are added in 16 bits there."""
    weights = np.array([[1, -1, 0.5, 0, -0.2, 1]], np.float32)
    values = quantize(weights, parse_format("int8")).values.astype(int)
    assert np.abs(values).max() == 64
    assert 255 * np.abs(values).max() * 2 <= 32767


def test_names_that_are_no_formats_are_refused() -> None:
    for name in ("int4", "int5", "fp32-32", "int8-48", "int4-32zz", "fp16z", ""):
        with pytest.raises(InvalidRequest, match="format"):
            parse_format(name)


@pytest.mark.parametrize("outliers", [0, 20])
@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_search_finds_smaller_errors_and_is_deterministic(block: int, outliers: int) -> None:
    form = parse_format(f"int4-{block}")
    weights = RNG.standard_normal((300, 512)).astype(np.float32)
    weights[:, RNG.integers(0, 512, outliers)] *= 8
    weights[0, :block] = 0

    def errors(rounding: str) -> np.ndarray:
        packed = quantize(weights, form, rounding)  # type: ignore[arg-type]
        again = quantize(weights.copy(), form, rounding)  # type: ignore[arg-type]
        assert packed.values.tobytes() == again.values.tobytes()
        off = dequantize(packed, form, 512) - weights
        return np.square(off, dtype=np.float64).reshape(-1, block).sum(1)

    nearest, search = errors("nearest"), errors("search")
    assert search.sum() < 0.97 * nearest.sum()
    assert np.mean(search <= nearest * 1.0001 + 1e-9) > 0.97


def test_the_search_equals_a_dumb_search() -> None:
    """A block at a time, with float64 and every candidate tried."""
    form = parse_format("int4-16")
    weights = RNG.standard_normal((20, 16)).astype(np.float32)
    found = dequantize(quantize(weights, form, "search"), form, 16)
    for row, given in zip(found, weights.astype(np.float64), strict=True):
        extreme = max(given, key=abs)
        best = np.inf
        for target in np.arange(70, 105, 5) / 10:
            levels = np.clip(np.rint(given * (-target / extreme)), -8, 7)
            scale = given @ levels / (levels @ levels)
            best = min(best, float(np.square(levels * scale - given).sum()))
        assert np.square(row - given).sum() <= best * 1.001  # rounding again with the fitted scale may gain more
