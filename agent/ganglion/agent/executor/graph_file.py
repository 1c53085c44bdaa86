"""A strict look at an ONNX file before ONNX Runtime opens it: its weights lie in `weights.bin` and nowhere else (E2).

A walk over the protobuf wire format (field numbers of onnx.proto3), so that a device needs no onnx package. What could
carry weights or code out of sight (subgraphs, functions, sparse or attribute tensors outside the file) is refused.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ganglion.wire.errors import Corrupt
from ganglion.wire.nouns import WEIGHTS_FILE

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS = 5, 10
_ATTRIBUTE_REFUSED: Final = {6: "a subgraph", 11: "a subgraph", 22: "a sparse tensor", 23: "a sparse tensor"}
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_LOCATION_EXTERNAL = 1
_TAG_LIMIT = 1 << 32


def check_graph(data: bytes | memoryview, weights_bytes: int) -> bool:
    """Raise Corrupt unless every external tensor of the model lies within a `weights.bin` of `weights_bytes` bytes.

    Returns whether there are any.
    """
    graphs, external = 0, False
    for number, value in fields(memoryview(data)):
        if number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            raise Corrupt("graph file: holds functions or training information; plain graphs only")
        if number == _MODEL_GRAPH:
            graphs += 1
            external = _check_graph(message(value), weights_bytes)
    if graphs != 1:
        raise Corrupt(f"graph file: holds {graphs} graphs, expected 1")
    return external


def check_file(path: Path, size_bytes: int) -> None:
    """Raise Corrupt unless `path` is a plain file of `size_bytes` bytes under this one name: no link, pipe or device.

    What was put together is what ONNX Runtime then maps: it follows links and opens whatever it finds.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Corrupt(f"{path}: not a plain file ({os.strerror(error.errno or 0)})") from error
    try:
        found = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        raise Corrupt(f"{path}: not a plain file of one name ({found.st_nlink} names)")
    if found.st_size != size_bytes:
        raise Corrupt(f"{path}: {found.st_size} bytes, expected {size_bytes}")


def _check_graph(graph: memoryview, weights_bytes: int) -> bool:
    found = False
    for number, value in fields(graph):
        if number == _GRAPH_SPARSE:
            raise Corrupt("graph file: holds a sparse initializer")
        if number == _GRAPH_INITIALIZER:
            found |= _check_tensor(message(value), weights_bytes)
        elif number == _GRAPH_NODE:
            for field, attribute in fields(message(value)):
                if field == _NODE_ATTRIBUTE:
                    found |= _check_attribute(message(attribute), weights_bytes)
    return found


def _check_attribute(attribute: memoryview, weights_bytes: int) -> bool:
    found = False
    for number, value in fields(attribute):
        if number in _ATTRIBUTE_REFUSED:
            raise Corrupt(f"graph file: a node's attribute holds {_ATTRIBUTE_REFUSED[number]}")
        if number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            found |= _check_tensor(message(value), weights_bytes)
    return found


def _check_tensor(tensor: memoryview, weights_bytes: int) -> bool:
    entries: dict[str, str] = {}
    external = False
    for number, value in fields(tensor):
        if number == _TENSOR_EXTERNAL:
            entry = {field: bytes(message(part)) for field, part in fields(message(value))}
            key = _text(entry.get(_ENTRY_KEY, b""))
            if key in entries:
                raise Corrupt(f"graph file: external data names {key!r} twice")
            entries[key] = _text(entry.get(_ENTRY_VALUE, b""))
        elif number == _TENSOR_LOCATION:
            external = value == _LOCATION_EXTERNAL
    if not external:
        if entries:
            raise Corrupt("graph file: external data of a tensor that is not marked external")
        return False
    if set(entries) != {"location", "offset", "length"}:
        raise Corrupt(f"graph file: external data gives {sorted(entries)}; expected location, offset and length")
    if entries["location"] != WEIGHTS_FILE:
        raise Corrupt(f"graph file: external data lies in {entries['location']!r}; only {WEIGHTS_FILE!r} is allowed")
    offset, length = _decimal(entries["offset"]), _decimal(entries["length"])
    if offset + length > weights_bytes:
        raise Corrupt(
            f"graph file: external data at {offset} of {length} bytes; {WEIGHTS_FILE} has {weights_bytes} bytes"
        )
    return True


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message in their order: number, and a number or bytes; raises Corrupt."""
    position, size = 0, len(data)
    while position < size:
        tag, position = varint(data, position)
        number, wire = tag >> 3, tag & 7
        # Parsers that keep 32 bits of a tag would read another field than we do.
        if tag >= _TAG_LIMIT or number == 0:
            raise Corrupt(f"graph file: field number {number} at byte {position}")
        if wire == _VARINT:
            value, position = varint(data, position)
            yield number, value
            continue
        if wire == _BYTES:
            length, position = varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise Corrupt(f"graph file: wire type {wire} at byte {position}")
        if length > size - position:
            raise Corrupt(f"graph file: ends {length - (size - position)} bytes too early")
        yield number, data[position : position + length]
        position += length


def varint(data: memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it; raises Corrupt."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise Corrupt("graph file: ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise Corrupt("graph file: a number of more than 10 bytes")


def message(value: int | memoryview) -> memoryview:
    """A field that must be bytes; raises Corrupt for a number."""
    if isinstance(value, int):
        raise Corrupt("graph file: a number where a message was expected")
    return value


def _text(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise Corrupt("graph file: external data that is not ASCII") from error


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Corrupt(f"graph file: external data gives {text[:20]!r} where a number was expected")
    return int(text)
