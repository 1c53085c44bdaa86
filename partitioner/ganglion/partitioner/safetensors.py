"""A strict reader of safetensors files by memory map: no tensor is in memory before a group of it is asked for.

Format: https://github.com/huggingface/safetensors#format. What the format forbids (holes, overlaps, duplicate names,
bytes beyond the end) is refused here with the file and the figure.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.weights import Floats, Packed, Stored, finite
from ganglion.wire.errors import Corrupt, InvalidDocument, Unsupported

HEADER_BYTES: Final = 100 << 20
AT_ONCE: Final = 1 << 17  # numbers: what is made of them on the way stays in the processor's cache
ELEMENTS: Final = 2**40  # of one tensor

ITEM_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8,
}  # fmt: skip
READABLE: Final[dict[str, Stored]] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, still on disk: `Weights`. `dtype` as the format writes it, for example "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @property
    def elements(self) -> int:
        """How many numbers."""
        return self.data.nbytes // ITEM_BYTES[self.dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes that reading all of it reads."""
        return self.data.nbytes

    @property
    def stored(self) -> Stored:
        """The type of the numbers; raises Unsupported where weights are not read from it."""
        if self.dtype not in READABLE:
            raise Unsupported(f"tensor {self.name}: dtype {self.dtype}; weights are read from {', '.join(READABLE)}")
        return READABLE[self.dtype]

    @property
    def packing(self) -> None:
        """None: plain numbers have no blocks."""

    def part(self, index: int) -> Tensor:
        """Matrix `index` of a stack of matrices; nothing of the others is read."""
        return Tensor(f"{self.name}[{index}]", self.dtype, self.shape[1:], self.raw_rows(index, index + 1))

    def raw_rows(self, start: int, stop: int) -> memoryview:
        """Bytes of rows start..stop as stored."""
        row = self.data.nbytes // max(1, self.shape[0])
        return self.data[start * row : stop * row]

    def rows(self, start: int, stop: int) -> Floats:
        """Rows start..stop of a vector, matrix or stack as float32; raises Corrupt when a number is not finite."""
        raw = np.frombuffer(self.raw_rows(start, stop), self._numpy())
        return self._floats(raw.reshape(stop - start, *self.shape[1:]))

    def columns(self, start: int, stop: int) -> Floats:
        """Columns start..stop of a matrix as float32 [rows, stop - start]; raises Corrupt when one is not finite."""
        whole = np.frombuffer(self.data, self._numpy()).reshape(self.shape)
        return self._floats(whole[:, start:stop])

    def packed_rows(self, start: int, stop: int) -> Packed:
        """Raises Unsupported: there is no packing."""
        raise Unsupported(f"tensor {self.name}: {self.dtype} numbers are not in blocks")

    def packed_columns(self, start: int, stop: int) -> Packed:
        """Raises Unsupported: there is no packing."""
        raise Unsupported(f"tensor {self.name}: {self.dtype} numbers are not in blocks")

    def _numpy(self) -> np.dtype[Any]:
        return np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[self.stored])

    def _floats(self, stored: npt.NDArray[Any]) -> Floats:
        found = np.empty(stored.shape, np.float32)
        step = max(1, AT_ONCE * len(stored) // max(1, stored.size))
        for at in range(0, len(stored), step):
            part, into = stored[at : at + step], found[at : at + step]
            if self.dtype == "BF16":  # a bfloat16 is the upper half of a float32
                np.left_shift(part, np.uint32(16), out=into.view(np.uint32), dtype=np.uint32)
            else:
                into[...] = part
            finite(self.name, into)
        return found


@dataclass(frozen=True)
class SafetensorsFile:
    """A mapped file: its header's bytes and its tensors by name."""

    header: bytes
    tensors: dict[str, Tensor]


def open_safetensors(path: Path) -> SafetensorsFile:
    """Map `path` and check its header; raises Corrupt or InvalidDocument naming the file and the figure."""
    size = path.stat().st_size
    if size < 8:
        raise Corrupt(f"{path}: {size} bytes, a safetensors file has at least 8 (is the download complete?)")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise InvalidDocument(f"{path}: header of {length} bytes, at most {HEADER_BYTES} are accepted")
        if 8 + length > size:
            raise Corrupt(f"{path}: header of {length} bytes in a file of {size} bytes (is the download complete?)")
        header = file.read(length)
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    entries = _parse_header(path, header)
    return SafetensorsFile(header, _tensors(path, entries, mapped[8 + length :]))


def _parse_header(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            raise InvalidDocument(f"{path}: header names {next(n for n in names if names.count(n) > 1)!r} twice")
        return found

    try:
        parsed = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path}: header is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidDocument(f"{path}: header is not an object")
    parsed.pop("__metadata__", None)
    return parsed


def _tensors(path: Path, entries: dict[str, Any], data: memoryview) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        dtype, shape, start, stop = _entry(path, name, entry)
        elements = 1
        for length in shape:
            elements *= length
            if elements > ELEMENTS:
                raise InvalidDocument(f"{path}: tensor {name} has shape {list(shape)}, over {ELEMENTS} elements")
        if stop > data.nbytes:
            raise Corrupt(
                f"{path}: tensor {name} ends at byte {stop} of {data.nbytes} bytes of data (is the download complete?)"
            )
        if stop - start != elements * ITEM_BYTES[dtype]:
            needed = elements * ITEM_BYTES[dtype]
            raise Corrupt(f"{path}: tensor {name} {dtype}{list(shape)} needs {needed} bytes, it has {stop - start}")
        spans.append((start, stop, name))
        tensors[name] = Tensor(name, dtype, shape, data[start:stop])
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            what = "a hole" if start > end else "an overlap"
            raise Corrupt(
                f"{path}: {what} before tensor {name}: it starts at byte {start}, the last one ended at {end}"
            )
        end = stop
    if end != data.nbytes:
        raise Corrupt(f"{path}: {data.nbytes - end} bytes after the last tensor belong to none")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    def whole(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InvalidDocument(f"{path}: tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Unsupported(f"{path}: tensor {name} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(whole(length) for length in shape):
        raise InvalidDocument(f"{path}: tensor {name} has the shape {shape!r}, a list of sizes is expected")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(whole(o) for o in offsets):
        raise InvalidDocument(f"{path}: tensor {name} has the offsets {offsets!r}, two positions are expected")
    if offsets[0] > offsets[1]:
        raise InvalidDocument(f"{path}: tensor {name} ends at byte {offsets[1]}, before its start {offsets[0]}")
    return dtype, tuple(shape), offsets[0], offsets[1]
