"""A strict reader of a GGUF file's header by memory map: metadata and tensor infos, every size checked before use.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Counts and lengths are compared with the bytes that
are left before anything is allocated or walked, so the time and memory of a hostile header are those of its own bytes.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ganglion.wire.errors import Corrupt, InvalidDocument, Unsupported

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
HEADER_BYTES: Final = 512 << 20
STRING_BYTES: Final = 64 << 20
KEY_BYTES: Final = 65535
NAME_BYTES: Final = 256
KEYS: Final = 1 << 16
TENSORS: Final = 1 << 20
STRINGS: Final = 1 << 22  # of one array
DIMENSIONS: Final = 4
ELEMENTS: Final = 2**40  # of one tensor
ALIGNMENT: Final = 32
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip

Value = bool | int | float | str | tuple[str, ...] | npt.NDArray[Any]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: sizes outermost first (the file has them innermost first), and its bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: memoryview


@dataclass(frozen=True)
class GgufFile:
    """A mapped file: its header's bytes, its metadata by key, its tensors by name."""

    path: Path
    header: memoryview
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def open_gguf(path: Path) -> GgufFile:
    """Map `path` and check its header; raises Corrupt, InvalidDocument or Unsupported with file and figure."""
    size = path.stat().st_size
    if size < 24:
        raise Corrupt(f"{path}: {size} bytes, a GGUF file has at least 24 (is the download complete?)")
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    reader = _Reader(path, whole[:HEADER_BYTES], cut=size > HEADER_BYTES)
    if bytes(reader.take(4, "the magic")) != MAGIC:
        raise InvalidDocument(f"{path}: not a GGUF file, it begins with {bytes(whole[:4])!r}")
    version = reader.number("<I", "the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = f"{swapped}, big-endian" if swapped in VERSIONS else str(version)
        raise Unsupported(f"{path}: GGUF version {found}; supported are {', '.join(map(str, VERSIONS))}, little-endian")
    tensor_count = reader.count("<Q", "tensors", TENSORS, 24)
    key_count = reader.count("<Q", "metadata keys", KEYS, 13)
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = reader.text("a metadata key", KEY_BYTES)
        if key in metadata:
            raise InvalidDocument(f"{path}: metadata key {key[:80]!r} twice")
        metadata[key] = reader.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 16 or alignment & (alignment - 1):
        raise InvalidDocument(f"{path}: general.alignment {alignment!r}, a power of two from 8 to 65536 is expected")
    infos = [_info(path, reader, alignment) for _ in range(tensor_count)]
    header = whole[: reader.at]
    data = whole[min(-(-reader.at // alignment) * alignment, size) :]
    return GgufFile(path, header, metadata, _tensors(path, infos, data))


def _info(path: Path, reader: _Reader, alignment: int) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    """Name, type, sizes outermost first, offset in the data, bytes."""
    name = reader.text("a tensor's name", NAME_BYTES)
    dimensions = reader.number("<I", f"the dimensions of tensor {name}")
    if not 1 <= dimensions <= DIMENSIONS:
        raise InvalidDocument(f"{path}: tensor {name} has {dimensions} dimensions, 1 to {DIMENSIONS} are expected")
    shape = tuple(reader.number("<Q", f"the shape of tensor {name}") for _ in range(dimensions))[::-1]
    elements = 1
    for length in shape:
        elements *= length
        if not 1 <= length <= ELEMENTS or elements > ELEMENTS:
            raise InvalidDocument(
                f"{path}: tensor {name} has shape {list(shape)}, 1 to {ELEMENTS} elements are allowed"
            )
    code = reader.number("<I", f"the type of tensor {name}")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise Unsupported(f"{path}: tensor {name} has the unknown type {code}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise InvalidDocument(
            f"{path}: tensor {name} {kind.name} has rows of {shape[-1]}, blocks of {block} do not fit"
        )
    offset = reader.number("<Q", f"the offset of tensor {name}")
    if offset % alignment:
        raise InvalidDocument(f"{path}: tensor {name} starts at byte {offset}, no multiple of {alignment}")
    return name, kind, shape, offset, elements // block * block_bytes


def _tensors(
    path: Path, infos: list[tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]], data: memoryview
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name, kind, shape, offset, size in sorted(infos, key=lambda info: info[3]):
        if offset + size > data.nbytes:
            raise Corrupt(
                f"{path}: tensor {name} ends at byte {offset + size} of {data.nbytes} bytes of data (is the download "
                "complete?)"
            )
        if offset < end:
            raise Corrupt(f"{path}: tensor {name} starts at byte {offset}, the one before it ends at {end}")
        if name in tensors:
            raise InvalidDocument(f"{path}: tensor {name} twice")
        tensors[name] = TensorInfo(name, kind, shape, data[offset : offset + size])
        end = offset + size
    return tensors


@dataclass
class _Reader:
    """A position in the header's bytes; `cut` where the file goes on beyond what a header may have."""

    path: Path
    data: memoryview
    cut: bool
    at: int = 0

    def take(self, count: int, what: str) -> memoryview:
        left = self.data.nbytes - self.at
        if count > left:
            if self.cut:
                raise InvalidDocument(f"{self.path}: a header over {HEADER_BYTES} bytes (at {what})")
            raise Corrupt(
                f"{self.path}: {what} needs {count} bytes at byte {self.at} and {left} are left (is the download "
                "complete?)"
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, layout: str, what: str) -> int:
        found: int = struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]
        return found

    def count(self, layout: str, what: str, limit: int, least_bytes: int) -> int:
        """A number of things of at least `least_bytes` each: refused before the first of them is read."""
        found = self.number(layout, f"the number of {what}")
        if found > limit:
            raise InvalidDocument(f"{self.path}: {found} {what}, at most {limit} are accepted")
        left = self.data.nbytes - self.at
        if found * least_bytes > left:
            raise Corrupt(f"{self.path}: {found} {what} in {left} bytes (is the download complete?)")
        return found

    def text(self, what: str, limit: int) -> str:
        length = self.number("<Q", f"the length of {what}")
        if length > limit:
            raise InvalidDocument(f"{self.path}: {what} has {length} bytes, at most {limit} are accepted")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise Corrupt(f"{self.path}: {what} is not UTF-8: {error.reason}") from error

    def value(self, key: str) -> Value:
        what = f"metadata {key[:80]}"
        kind = self.number("<I", what)
        if kind == STRING:
            return self.text(what, STRING_BYTES)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise InvalidDocument(f"{self.path}: {what} has the unknown type {kind}")
        dtype = np.dtype(SCALARS[kind])
        found = np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()
        if kind == BOOL:
            if found > 1:
                raise InvalidDocument(f"{self.path}: {what} is the boolean {found}, 0 or 1 are expected")
            return bool(found)
        value: int | float = found
        return value

    def _array(self, what: str) -> Value:
        kind = self.number("<I", what)
        if kind == STRING:
            return self._strings(what, self.count("<Q", f"strings in {what}", STRINGS, 8))
        if kind not in SCALARS:
            raise InvalidDocument(f"{self.path}: {what} is an array of type {kind}; numbers or strings are expected")
        dtype = np.dtype(SCALARS[kind])
        length = self.count("<Q", f"numbers in {what}", HEADER_BYTES, dtype.itemsize)
        return np.frombuffer(self.take(length * dtype.itemsize, what), dtype)

    def _strings(self, what: str, count: int) -> tuple[str, ...]:
        """`count` strings; a vocabulary has some hundred thousand, so this is `text` without its calls."""
        found: list[str] = []
        data, at, end = self.data, self.at, self.data.nbytes
        for _ in range(count):
            length = int.from_bytes(data[at : at + 8], "little")
            if at + 8 + length > end:  # `text` says what is wrong
                break
            try:
                found.append(str(data[at + 8 : at + 8 + length], "utf-8"))
            except UnicodeDecodeError as error:
                raise Corrupt(f"{self.path}: a string in {what} is not UTF-8: {error.reason}") from error
            at += 8 + length
        self.at = at
        while len(found) < count:
            found.append(self.text(f"a string in {what}", STRING_BYTES))
        return tuple(found)
