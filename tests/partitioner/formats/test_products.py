"""One segment in every format against numpy: what is rounded, how integers are multiplied, what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from checkpoints import make_llama

from ganglion.agent.executor.loader import start_runtime
from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.classes import Layout, lay_out
from ganglion.partitioner.quality.stream import cut_segment, start
from ganglion.partitioner.quantize import Format, dequantize, parse_format, quantize
from ganglion.partitioner.quantize.recipe import Rules
from ganglion.wire.nouns import WEIGHTS_FILE, NumericClass

RNG = np.random.default_rng(2)
FORMATS = ["fp32", "fp16", "int8", "int8-16", "int8-32", "int8-32z", "int4-16", "int4-32", "int4-32z"]
SIZES = {"hidden_size": 48, "head_dim": 16, "intermediate_size": 100, "num_hidden_layers": 1, "mlp_bias": True}


def open_session(graph: bytes, weights: bytes) -> Any:
    start_runtime(1)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [weights], [len(weights)])
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def laid_out(folder: Path, name: str, *, exact: bool, rules: Rules | None = None, **config: Any) -> Layout:
    form = parse_format(name)
    # A class has no zero points of its own; a rule has them for every tensor.
    if form.zero_points:
        rules = Rules((("*", form),))
    chosen = NumericClass(format=form.kind, block=form.block, exact=exact)
    return lay_out(open_checkpoint(make_llama(folder, **SIZES | config)), chosen, rules or Rules())


def product(rows: np.ndarray, weights: np.ndarray, form: Format) -> np.ndarray:
    """rows [S, inputs] times weights [outputs, inputs], rounded as the format rounds both, in float64."""
    if form.kind in ("fp32", "fp16"):
        numbers = weights.astype(np.float16) if form.kind == "fp16" else weights
        return rows.astype(np.float64) @ numbers.astype(np.float64).T
    packed = quantize(weights, form)
    if form.per_row:
        largest = np.maximum(np.abs(rows).max(1, keepdims=True), np.float32(1e-8))
        integers = np.rint(rows * (np.float32(127) / largest)).astype(np.int64)
        sums = integers @ packed.values.astype(np.int64).T
        return sums * packed.scales.astype(np.float64) * (largest.astype(np.float64) / 127)
    # MatMulNBits rounds rows to 8 bits too, by blocks.
    blocks = -(-rows.shape[1] // form.block)
    padded = np.zeros((len(rows), blocks * form.block), np.float32)
    padded[:, : rows.shape[1]] = rows
    by_block = padded.reshape(len(rows), blocks, form.block)
    step = np.maximum(np.abs(by_block).max(2, keepdims=True) / 127, 1e-30)
    rounded = (np.rint(by_block / step) * step).reshape(len(rows), -1)[:, : rows.shape[1]]
    return rounded.astype(np.float64) @ dequantize(packed, form, rows.shape[1]).astype(np.float64).T


def expected_partial(layout: Layout, res: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """What the MLP leaves, group by group."""
    plan, checkpoint = layout.layers[0][1], layout.checkpoint
    form = layout.recipe.of(plan.joined[0])

    def tensor(name: str) -> np.ndarray:
        found = checkpoint.tensors[name]
        return found.rows(0, found.shape[0])

    mlp = "model.layers.0.mlp."
    rows = res + delta.astype(np.float32)
    norm = tensor("model.layers.0.post_attention_layernorm.weight")
    normed = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-6) * norm
    gate, up = (product(normed, tensor(f"{mlp}{n}_proj.weight"), form) for n in ("gate", "up"))
    gate, up = gate + tensor(f"{mlp}gate_proj.bias"), up + tensor(f"{mlp}up_proj.bias")
    inner = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    down, width = tensor(f"{mlp}down_proj.weight"), plan.summed.width
    left = np.zeros(res.shape) + tensor(f"{mlp}down_proj.bias")
    for at in range(0, inner.shape[1], width):
        left += product(inner[:, at : at + width], np.ascontiguousarray(down[:, at : at + width]), form)
    return left


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_segment_is_what_numpy_says(name: str, exact: bool, tmp_path: Path) -> None:
    layout = laid_out(tmp_path, name, exact=exact)
    plan = layout.layers[0][1]
    (session,) = start(plan, layout, layout.recipe, cut_segment(plan, layout, layout.recipe), open_session)
    res = RNG.standard_normal((7, 48)).astype(np.float32)
    res[3] *= 1e-12  # a row that is nothing
    res[4, 5] = 60  # one with an outlier
    delta = RNG.standard_normal((7, 48)).astype(np.float64 if exact else np.float32)
    delta[3] = 0
    partial = session.run(["partial"], {"res": res, "delta": delta})[0]
    assert partial.dtype == delta.dtype
    expected = expected_partial(layout, res, delta)
    # What is left are roundings of rows to 8 bits that fall the other way.
    tolerance = 1e-5 if name.startswith("fp") else 2e-2 if "z" in name or "-" in name else 5e-3
    assert np.abs(partial - expected).max() < tolerance * np.abs(expected).max()
    without = partial - expected_partial(layout, res * 0, delta * 0)
    assert np.abs(without).max() > 0.1 * np.abs(expected).max()  # the comparison is about something


def test_halves_of_a_bfloat16_source_are_its_own_and_of_float32_are_rounded(tmp_path: Path) -> None:
    for dtype, exact in (("bfloat16", True), ("float16", True), ("float32", False)):
        layout = laid_out(tmp_path / dtype, "fp16", exact=True, dtype=dtype)
        plain = laid_out(tmp_path / dtype, "fp32", exact=True, dtype=dtype)
        plan = layout.layers[0][0]
        stored = cut_segment(plan, layout, layout.recipe)["q"][0]
        numbers = cut_segment(plan, plain, plain.recipe)["q"][0]
        wide = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else stored.astype(np.float32)
        assert stored.itemsize == 2
        assert np.array_equal(wide, numbers) == exact
        assert np.abs(wide - numbers).max() < 1e-3


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from ganglion.wire.errors import Unsupported

    make_llama(tmp_path, **SIZES)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.tensor(1e6)
    save_file(tensors, file)
    layout = lay_out(open_checkpoint(tmp_path), NumericClass(format="fp16", block=0, exact=True))
    with pytest.raises(Unsupported, match=r"up_proj.weight: holds 1e\+06, float16 goes up to 65504; use fp32"):
        cut_segment(layout.layers[0][1], layout, layout.recipe)
