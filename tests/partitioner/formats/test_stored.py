"""Pieces in 16 bits become float32 in `weights.bin`; the cost model weighs what is loaded, by the format's rates."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_llama

from ganglion.partitioner.cost import ModelSize, decode_rate, rate_key
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import InvalidDocument
from ganglion.wire.nouns import DeviceProfile, FormatRate, NumericClass, PieceRef, Range, Segment, Slot
from ganglion.wire.shares import slot_offsets, weights_size, write_weights


def segment_of(stored: str, sizes: list[int], join: str = "rows") -> Segment:
    pieces = tuple(PieceRef(f"{at:064x}", size) for at, size in enumerate(sizes))
    half = Slot(name="w", join=join, rows=1, pieces=pieces, stored=stored)  # type: ignore[arg-type]
    after = Slot(name="after", join="rows", rows=1, pieces=tuple(PieceRef(f"{99:064x}", 4) for _ in sizes))
    return Segment(kind="mlp", axis="columns", groups=len(sizes), slots=(half, after))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_halves_are_widened(stored: str) -> None:
    numbers = np.random.default_rng(0).standard_normal((3, 70)).astype(np.float32)
    numbers[0, :3] = [0, -0.0, 6e-5]
    if stored == "bfloat16":
        halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        expected = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        halves = numbers.astype(np.float16)  # type: ignore[assignment]
        expected = halves.astype(np.float32)
    content = {f"{at:064x}": memoryview(row.tobytes()) for at, row in enumerate(halves)}
    content[f"{99:064x}"] = memoryview(b"last")
    segment, share = segment_of(stored, [140] * 3), Range(1, 3)
    into = io.BytesIO()
    write_weights(segment, share, content.__getitem__, into)
    assert into.getvalue() == expected[1:].tobytes() + b"lastlast"
    assert weights_size(segment, share) == len(into.getvalue())
    assert slot_offsets(segment, share) == {"w": 0, "after": 560}


def test_halves_that_are_none_are_refused() -> None:
    for segment in (segment_of("float16", [141]), segment_of("bfloat16", [140, 140], "columns")):
        with pytest.raises(InvalidDocument, match="slot w: pieces of"):
            weights_size(segment, Range(0, 1))


def test_a_model_in_halves_weighs_as_float32_and_travels_as_half(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "m", dtype="bfloat16", tie_word_embeddings=False)
    sizes, stored = {}, {}
    for weight_format in ("fp32", "fp16"):
        chosen = numeric_class(path, weight_format)  # type: ignore[arg-type]
        manifest = partition(path, DirectorySink(tmp_path / "pieces"), name="m", numeric_class=chosen)
        g, size = manifest.geometry, ModelSize(manifest)
        sizes[weight_format] = size.share_bytes(
            size.all_layers, Range(0, g.head_groups), Range(0, g.column_groups), Range(0, g.vocab_groups), kv_tokens=0
        )
        slots = [slot for layer in manifest.layers for segment in layer.segments for slot in segment.slots]
        stored[weight_format] = sum(piece.size for slot in slots for piece in slot.pieces)
    assert sizes["fp16"] == sizes["fp32"]
    assert 0.5 <= stored["fp16"] / stored["fp32"] < 0.52  # norms stay as they are


def test_rates_are_those_of_the_format() -> None:
    rates = {"fp32": 20e9, "int4-32": 9e9, "int8": 14e9, "int8-32": 12e9}
    profile = DeviceProfile(
        host_id="0" * 32, hostname="h", system="s", kernel_family="k", cores=1, threads=1, memory_bytes=1 << 30,
        memory_budget_bytes=1 << 30, disk_free_bytes=0, disk_read_bytes_per_s=0, memory_bytes_per_s=30e9,
        rates={key: FormatRate(decode_bytes_per_s=rate, prefill_flop_per_s=1e9) for key, rate in rates.items()},
        providers=(), version="0",
    )  # fmt: skip
    expected = {
        ("fp16", 0): ("fp32", 20e9),
        ("int8", 0): ("int8", 14e9),
        ("int8", 32): ("int8-32", 12e9),
        ("int8", 16): ("int8-16", 12e9),  # the slowest of its format
        ("int4", 16): ("int4-16", 9e9),
    }
    for (weight_format, block), (key, rate) in expected.items():
        numeric = NumericClass(format=weight_format, block=block, exact=True, exceptions="0123abcd")  # type: ignore[arg-type]
        assert rate_key(numeric) == key
        assert decode_rate(profile, numeric) == rate
