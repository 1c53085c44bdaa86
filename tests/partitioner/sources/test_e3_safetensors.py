"""E3: whatever lies in a safetensors file, we read what its own library reads, and refuse the rest by name."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.safetensors import open_safetensors
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Corrupt, GanglionError, InvalidDocument

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(4, dtype=np.float16)


def plain() -> bytes:
    return safetensors.numpy.save({"a": A, "b": B}, metadata={"format": "np"})


def with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def parts(whole: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def library_reads(path: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    try:
        return dict(safetensors.numpy.load(path.read_bytes()))
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, OverflowError):
        return None


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(plain())
    tensors = open_safetensors(path).tensors
    assert np.array_equal(tensors["a"].rows(0, 2), A)
    assert np.array_equal(tensors["b"].rows(0, 4), B.astype(np.float32))


SIZES = [0, 1, 3, 4, 8, 24, 31, 32, 33, -1, 2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_E3_offsets_and_shapes_are_taken_as_the_library_takes_them(data: st.DataObject, tmp_path: Path) -> None:
    header, body = parts(plain())
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(["a", "b"]))
        what = data.draw(st.sampled_from(["data_offsets", "shape", "dtype", "drop", "add"]))
        value = data.draw(st.sampled_from(SIZES))
        if what in ("data_offsets", "shape") and name in header:
            header[name][what][data.draw(st.integers(0, len(header[name][what]) - 1))] = value
        elif what == "dtype" and name in header:
            header[name]["dtype"] = data.draw(st.sampled_from(["F32", "F16", "BF16", "I64", "F64", "F4", "", "f32"]))
        elif what == "drop":
            header.pop(name, None)
        elif what == "add":
            header["c"] = {"dtype": "F32", "shape": [], "data_offsets": [value, value + 4]}
    body = body[: data.draw(st.sampled_from([len(body), len(body) - 1, 0]))]
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(json.dumps(header).encode(), body))
    expected = library_reads(path)
    try:
        found = open_safetensors(path).tensors
    except GanglionError:
        return
    if expected is None:  # types that numpy lacks: the file itself is sound, as the library's own reader says
        with safetensors.safe_open(path, framework="np") as opened:
            assert set(opened.keys()) == set(found)
        return
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        assert bytes(tensor.data) == expected[name].tobytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_E3_damaged_bytes_never_leave_the_error_tree(data: st.DataObject, tmp_path: Path) -> None:
    whole = bytearray(plain())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    del whole[data.draw(st.integers(0, len(whole))) :]
    path = tmp_path / "x.safetensors"
    path.write_bytes(whole)
    try:
        for tensor in open_safetensors(path).tensors.values():
            assert len(tensor.data) <= len(whole)
    except GanglionError:
        return


@pytest.mark.parametrize(
    ("header", "error", "said"),
    [
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
         InvalidDocument, "names 'a' twice"),
        (b'{"a":{"dtype":"F32","shape":[0],"shape":[0],"data_offsets":[0,0]}}', InvalidDocument, "names 'shape' twice"),
        (b'{"a":{"dtype":"F32","shape":[1e3],"data_offsets":[0,0]}}', InvalidDocument, "list of sizes"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', InvalidDocument, "list of sizes"),
        (b'{"a":{"dtype":["F32"],"shape":[0],"data_offsets":[0,0]}}', GanglionError, "F32"),
        (b'{"a":[]}', InvalidDocument, "not described by"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,' + b"9" * 5000 + b"]}}", GanglionError, "x.safetensors"),
        (b'{"__metadata__":{},"__metadata__":{}}', InvalidDocument, "twice"),
        (b" " * 64, Corrupt, "not JSON"),
    ],
)  # fmt: skip
def test_E3_headers_that_are_almost_right(header: bytes, error: type[Exception], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(header, b""))
    with pytest.raises(error, match=said):
        open_safetensors(path)


def poison(dtype: str, kind: str) -> bytes:
    value = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}[kind]
    wide = np.float32(value).tobytes()
    return {"float32": wide, "bfloat16": wide[2:], "float16": np.float16(value).tobytes()}[dtype]


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "tensor",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
    ],
)
def test_E3_numbers_that_are_not_finite_are_found_in_every_tensor(
    tensor: str, kind: str, tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    dtype = {"nan": "float32", "inf": "bfloat16", "-inf": "float16"}[kind]
    folder = shutil.copytree(tiny(dtype), tmp_path / "model")
    file = folder / "model.safetensors"
    header, _ = parts(file.read_bytes())
    start, stop = header[tensor]["data_offsets"]
    bad = poison(dtype, kind)
    with file.open("rb+") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        middle = (stop - start) // 2 // len(bad) * len(bad)
        opened.seek(8 + length + start + middle)
        opened.write(bad)
    sink = DirectorySink(tmp_path / "pieces")
    with pytest.raises(Corrupt, match=f"{tensor}.*not finite"):
        partition(folder, sink, name="x", numeric_class=numeric_class(folder, "fp32"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from checkpoints import make_llama

    made: dict[str, Path] = {}

    def of(dtype: str) -> Path:
        if dtype not in made:
            made[dtype] = make_llama(tmp_path_factory.mktemp(dtype) / "model", dtype=dtype)
        return made[dtype]

    return of
