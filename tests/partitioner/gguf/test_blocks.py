"""Every block type: the numbers that the gguf package says, and blocks taken over for MatMulNBits bit for bit."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from ganglion.partitioner.gguf.blocks import PACKINGS, READABLE, BlockTensor
from ganglion.partitioner.gguf.header import open_gguf
from ganglion.partitioner.views import RopeRows
from ganglion.partitioner.weights import Packed, Packing
from ganglion.wire.errors import Corrupt, Unsupported

QUANTIZABLE = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
    Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4,
)  # fmt: skip
OUTPUTS, INPUTS, EXPERTS = 12, 768, 3


def stored(kind: Kind, outputs: int) -> np.ndarray:
    """Rows of `kind` [outputs, bytes]: quantized where the package can, otherwise random blocks with finite numbers."""
    random = np.random.default_rng(int(kind) + 1)
    if kind in QUANTIZABLE:
        return gguf.quants.quantize(random.normal(0, 0.7, (outputs, INPUTS)).astype(np.float32), kind).view(np.uint8)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    count = outputs * INPUTS // block
    candidates = random.integers(0, 256, (4 * count, block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(candidates, kind)
    kept = candidates[np.isfinite(numbers).all(axis=1)][:count]
    assert len(kept) == count
    return kept.reshape(outputs, -1)


def write(path: Path, kind: Kind, rows: np.ndarray, *shape: int) -> BlockTensor:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", rows.reshape(*shape[:-1], -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = open_gguf(path).tensors["x"]
    assert info.shape == shape
    return BlockTensor("model.x", info.kind, info.shape, info.data)


def numbers_of(packed: Packed, packing: Packing) -> np.ndarray:
    """One number after the other: (value - zero) * scale in float32."""
    outputs, blocks, held = packed.values.shape
    found = np.empty((outputs, blocks, packing.block), np.float32)
    for output in range(outputs):
        for block in range(blocks):
            for index in range(packing.block):
                if packing.bits == 8:
                    value = int(packed.values[output, block, index]) - 128
                else:
                    value = (int(packed.values[output, block, index // 2]) >> 4 * (index % 2) & 15) - 8
                found[output, block, index] = np.float32(value) * packed.scales[output, block]
    assert held == packing.block * packing.bits // 8
    return found.reshape(outputs, -1)


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_numbers(kind, tmp_path):
    rows = stored(kind, OUTPUTS)
    tensor = write(tmp_path / "matrix.gguf", kind, rows, OUTPUTS, INPUTS)
    expected = gguf.quants.dequantize(rows, kind)
    assert tensor.elements == OUTPUTS * INPUTS
    assert tensor.stored_bytes == rows.nbytes
    assert np.array_equal(tensor.rows(0, OUTPUTS), expected)
    assert np.array_equal(tensor.rows(5, 7), expected[5:7])
    for start, stop in ((0, INPUTS), (0, 1), (31, 33), (250, 515), (INPUTS - 3, INPUTS)):
        assert np.array_equal(tensor.columns(start, stop), expected[:, start:stop])
    raw = np.frombuffer(tensor.raw_rows(3, 5), np.uint8)
    plain = kind in {Kind.F32, Kind.F16, Kind.BF16}
    assert np.array_equal(raw, (rows[3:5] if plain else expected[3:5].view(np.uint8)).reshape(-1))
    assert tensor.stored == {Kind.F16: "float16", Kind.BF16: "bfloat16"}.get(kind, "float32")
    vector = write(tmp_path / "vector.gguf", kind, rows[0], INPUTS)
    assert np.array_equal(vector.rows(40, 300), expected[0, 40:300])


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_stacks(kind, tmp_path):
    rows = stored(kind, EXPERTS * OUTPUTS)
    tensor = write(tmp_path / "stack.gguf", kind, rows, EXPERTS, OUTPUTS, INPUTS)
    expected = gguf.quants.dequantize(rows, kind).reshape(EXPERTS, OUTPUTS, INPUTS)
    assert tensor.packing is None
    assert np.array_equal(tensor.rows(1, 3), expected[1:3])
    for expert in range(EXPERTS):
        part = tensor.part(expert)
        assert part.shape == (OUTPUTS, INPUTS)
        assert np.array_equal(part.rows(2, 9), expected[expert, 2:9])
        assert np.array_equal(part.columns(30, 34), expected[expert][:, 30:34])
        assert (part.packing is not None) == (kind in PACKINGS)


@pytest.mark.parametrize("kind", PACKINGS, ids=lambda kind: kind.name)
def test_blocks_taken_over(kind, tmp_path):
    rows = stored(kind, OUTPUTS)
    tensor = write(tmp_path / "matrix.gguf", kind, rows, OUTPUTS, INPUTS)
    expected = gguf.quants.dequantize(rows, kind)
    assert tensor.packing is not None
    packed = tensor.packed_rows(0, OUTPUTS)
    assert packed.values.shape == (
        OUTPUTS,
        INPUTS // tensor.packing.block,
        tensor.packing.block * tensor.packing.bits // 8,
    )
    assert packed.scales.shape == packed.values.shape[:2]
    assert packed.zero_points is None
    assert np.array_equal(numbers_of(packed, tensor.packing), expected)
    some = tensor.packed_rows(4, 6)
    assert np.array_equal(some.values, packed.values[4:6])
    assert np.array_equal(some.scales, packed.scales[4:6])
    for start, stop in ((0, INPUTS), (64, 128), (32, 544), (INPUTS - 32, INPUTS)):
        columns = tensor.packed_columns(start, stop)
        assert np.array_equal(numbers_of(columns, tensor.packing), expected[:, start:stop])
    turned = RopeRows(tensor, 3)  # three heads of four rows
    order = [row for head in range(3) for row in (4 * head, 4 * head + 2, 4 * head + 1, 4 * head + 3)]
    assert turned.packing == tensor.packing
    assert np.array_equal(turned.rows(0, OUTPUTS), expected[order])
    assert np.array_equal(turned.packed_rows(2, 9).values, packed.values[order][2:9])
    assert np.array_equal(turned.packed_rows(2, 9).scales, packed.scales[order][2:9])
    assert np.array_equal(numbers_of(turned.packed_columns(64, 96), tensor.packing), expected[order][:, 64:96])


def test_what_is_not_exact_is_not_taken_over(tmp_path):
    tensor = write(tmp_path / "matrix.gguf", Kind.Q4_1, stored(Kind.Q4_1, OUTPUTS), OUTPUTS, INPUTS)
    assert tensor.packing is None
    with pytest.raises(Unsupported, match=r"model\.x: Q4_1 blocks"):
        tensor.packed_rows(0, 1)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.F16, Kind.Q6_K], ids=lambda kind: kind.name)
def test_numbers_that_are_not_finite(kind, tmp_path):
    rows = stored(kind, OUTPUTS).copy()
    rows[7, -2:] = np.array([np.inf], np.float16).view(np.uint8)  # the last scale of Q6_K, the last number of F16
    rows[7, :2] = rows[7, -2:]  # the first scale of Q8_0
    tensor = write(tmp_path / "matrix.gguf", kind, rows, OUTPUTS, INPUTS)
    tensor.rows(0, 7)
    with pytest.raises(Corrupt, match=r"model\.x: holds numbers that are not finite"):
        tensor.rows(7, 8)
    if tensor.packing is not None:
        with pytest.raises(Corrupt, match="not finite"):
            tensor.packed_rows(0, OUTPUTS)
