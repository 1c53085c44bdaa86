"""Numbers that a source has in blocks of its own are taken over bit for bit, in rows, in columns, through a cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_llama

from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.classes import lay_out
from ganglion.partitioner.quantize import dequantize, parse_format, quantize
from ganglion.partitioner.quantize.blocks import pack_zeros, unpacked
from ganglion.partitioner.quantize.repack import padded, read_columns, read_rows, repack
from ganglion.partitioner.slots import cut_joined, cut_summed
from ganglion.partitioner.weights import Packed, Packing
from ganglion.wire.nouns import NumericClass

RNG = np.random.default_rng(3)


@dataclass(frozen=True)
class PackedWeights:
    """A matrix whose numbers are blocks; what it is as floats is what `numbers` says."""

    name: str
    packing: Packing
    packed: Packed
    shape: tuple[int, ...]
    stored: str = "float32"

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def stored_bytes(self) -> int:
        return self.packed.values.nbytes

    @property
    def numbers(self) -> np.ndarray:
        values = unpacked(self.packed.values, self.packing.bits).astype(np.float32)
        zeros: Any = 8 if self.packing.bits == 4 else 128
        if self.packed.zero_points is not None:
            found = unpacked(self.packed.zero_points, self.packing.bits)[:, : values.shape[1]]
            zeros = found[..., None].astype(np.float32)
        return ((values - zeros) * self.packed.scales[..., None]).reshape(len(values), -1)[:, : self.shape[1]]

    def part(self, index: int) -> Any:
        raise NotImplementedError

    def raw_rows(self, start: int, stop: int) -> memoryview:
        return np.ascontiguousarray(self.numbers[start:stop]).data.cast("B")

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.numbers[start:stop]

    def columns(self, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self.numbers[:, start:stop])

    def packed_rows(self, start: int, stop: int) -> Packed:
        zeros = self.packed.zero_points
        return Packed(
            self.packed.values[start:stop],
            self.packed.scales[start:stop],
            zeros[start:stop] if zeros is not None else None,
        )

    def packed_columns(self, start: int, stop: int) -> Packed:
        block = self.packing.block or self.shape[1]
        assert start % block == 0
        assert stop % block == 0 or stop == self.shape[1]
        blocks = slice(start // block, -(-stop // block))
        zeros = self.packed.zero_points
        if zeros is not None:
            one_each = unpacked(zeros, self.packing.bits)[:, : self.packed.scales.shape[1]]
            zeros = pack_zeros(one_each[:, blocks], self.packing.bits)
        return Packed(self.packed.values[:, blocks], self.packed.scales[:, blocks], zeros)


def made(outputs: int, inputs: int, packing: Packing, name: str = "w") -> PackedWeights:
    block = packing.block or inputs
    blocks = -(-inputs // block)
    values = RNG.integers(0, 256, (outputs, blocks, block * packing.bits // 8), dtype=np.uint8)
    scales = RNG.standard_normal((outputs, blocks)).astype(np.float32)
    zeros = None
    if packing.zero_points:
        zeros = pack_zeros(RNG.integers(0, 2**packing.bits, (outputs, blocks), dtype=np.uint8), packing.bits)
    return PackedWeights(name, packing, Packed(values, scales, zeros), (outputs, inputs))


HELD = [
    (Packing(4, 32), "int4-32"),
    (Packing(4, 32), "int4-16"),
    (Packing(4, 128), "int4-32"),
    (Packing(4, 32), "int4-32z"),
    (Packing(4, 32), "int8-32"),
    (Packing(4, 64, True), "int4-32z"),
    (Packing(4, 128, True), "int8-16"),
    (Packing(8, 32), "int8-32"),
    (Packing(8, 32, True), "int8-16z"),
    (Packing(8, 0), "int8-32"),
    (Packing(8, 0), "int8-64z"),
]


@pytest.mark.parametrize(("packing", "name"), HELD)
def test_rows_and_columns_keep_their_numbers(packing: Packing, name: str) -> None:
    form = parse_format(name)
    assert form.holds(packing)
    inputs = 320 if packing.block == 64 else 384 if packing.block else 100
    weights: Any = made(12, inputs, packing)
    whole = repack(weights.packed, packing, form)
    assert np.array_equal(dequantize(whole, form, inputs), weights.numbers)
    rows = padded(read_rows(weights, 3, 8, form), form, 7, inputs)
    assert np.array_equal(dequantize(rows, form, inputs)[:5], weights.numbers[3:8])
    assert not dequantize(rows, form, inputs)[5:].any()
    for start, stop in ((0, form.block), (form.block, 3 * form.block), (form.block, inputs)):
        columns = read_columns(weights, start, min(stop, inputs), form)
        found = dequantize(columns, form, min(stop, inputs) - start)
        assert np.array_equal(found, weights.numbers[:, start:stop])


def test_what_a_format_does_not_hold_is_not_taken_over() -> None:
    for packing, name in (
        (Packing(8, 32), "int4-32"),
        (Packing(4, 32), "int4-64"),
        (Packing(4, 32, True), "int4-32"),
        (Packing(8, 32, True), "int8-32"),
        (Packing(8, 32), "int8"),
        (Packing(4, 32), "fp16"),
        (None, "int4-32"),
    ):
        assert not parse_format(name).holds(packing)


def checkpoint_of(folder: Path, packing: Packing, head: Packing | None, **config: Any) -> Any:
    """A tiny checkpoint whose layers' matrices are in blocks, and its output matrix in others (None: plain)."""
    opened = open_checkpoint(make_llama(folder, **config))
    tensors: dict[str, Any] = dict(opened.tensors)
    for name, tensor in opened.tensors.items():
        if len(tensor.shape) == 2 and "embed" not in name:
            chosen = head if name == "lm_head.weight" else packing
            if chosen is not None:
                tensors[name] = made(*tensor.shape, chosen, name)
    return replace(opened, tensors=tensors)


EXACT_INT4 = NumericClass(format="int4", block=32, exact=True)
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}


@pytest.mark.parametrize(("packing", "form"), [(Packing(4, 32), "int4-32"), (Packing(4, 64, True), "int4-32z")])
def test_a_cut_takes_blocks_over(packing: Packing, form: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, packing, Packing(8, 32), **SIZES)
    layout = lay_out(checkpoint, EXACT_INT4)
    recipe = layout.recipe
    assert recipe.of(layout.head.joined[0]).name == "int8-32"  # wider where its maker stored it wider
    assert recipe.numeric_class.exceptions
    for plan in (*layout.layers[0], layout.head):
        for matrix in plan.linears:
            chosen = recipe.of(matrix)
            assert chosen.name == (form if plan is not layout.head else "int8-32")
            numbers = checkpoint.tensors[f"{matrix.tensor}.weight"].numbers
            summed = matrix is plan.summed
            cut_one = cut_summed if summed else cut_joined
            size = numbers.shape[1] if summed else numbers.shape[0]
            for group in range(plan.groups):
                cut = cut_one(matrix, checkpoint, recipe, group)
                parts = [cut.get(f"{matrix.slot}{suffix}") for suffix in ("", "_scales", "_zeros")]
                inputs = matrix.width if summed else matrix.inputs
                found = dequantize(Packed(*parts), chosen, inputs)  # type: ignore[arg-type]
                span = slice(group * matrix.width, min((group + 1) * matrix.width, size))
                expected = numbers[:, span] if summed else numbers[span]
                assert np.array_equal(found[: expected.shape[0], : expected.shape[1]], expected)


def test_a_group_that_begins_within_a_block_takes_smaller_ones(tmp_path: Path) -> None:
    """Two query heads of 24 a group: columns 0..48, 48..96, in blocks of 32 at the source."""
    checkpoint = checkpoint_of(tmp_path, Packing(4, 32), None, **SIZES | {"head_dim": 48, "num_key_value_heads": 4})
    layout = lay_out(checkpoint, EXACT_INT4)
    attention, mlp = layout.layers[0]
    assert layout.recipe.of(attention.summed).name == "int4-16"
    assert layout.recipe.of(attention.joined[0]).name == "int4-32"
    assert layout.recipe.of(layout.head.joined[0]).name == "int8-32"
    assert attention.kind == "attention+o=int4-16"
    assert mlp.kind == "mlp"


def test_plain_numbers_and_other_classes_are_rounded_as_ever(tmp_path: Path) -> None:
    plain = open_checkpoint(make_llama(tmp_path / "plain", **SIZES))
    assert not lay_out(plain, EXACT_INT4).recipe.exceptions
    packed = checkpoint_of(tmp_path / "packed", Packing(8, 32), Packing(8, 32), **SIZES)
    assert not lay_out(packed, NumericClass(format="int8", block=32, exact=True)).recipe.exceptions
    # Asked for 4 bits, a model of 8 is rounded again.
    assert not lay_out(packed, EXACT_INT4).recipe.exceptions
    matrix = lay_out(packed, EXACT_INT4).layers[0][0].joined[0]
    cut = cut_joined(matrix, packed, lay_out(packed, EXACT_INT4).recipe, 0)
    numbers = packed.tensors[f"{matrix.tensor}.weight"].numbers[: matrix.width]
    assert np.array_equal(cut[matrix.slot], quantize(numbers, parse_format("int4-32")).values)
