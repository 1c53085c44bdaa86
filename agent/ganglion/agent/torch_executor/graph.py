"""The graph of an ONNX file as plain Python: nodes, attributes, small tensors, and where the large ones lie."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.executor.graph_file import fields, message, varint
from ganglion.wire.errors import Corrupt

_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("<f4"), 2: np.dtype("u1"), 3: np.dtype("i1"),
    6: np.dtype("<i4"), 7: np.dtype("<i8"), 11: np.dtype("<f8"),
}  # fmt: skip
# TensorProto's typed fields: of little-endian numbers, and of varints.
_FIXED_DATA: Final = {4: np.dtype("<f4"), 10: np.dtype("<f8")}
_VARINT_DATA: Final = (5, 7)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An initializer: `value` where it lies in the graph, else `offset` and `length` in bytes of the weights."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    value: NDArray[Any] | None = None
    offset: int = 0
    length: int = 0

    def read(self, weights: memoryview) -> NDArray[Any]:
        """Its numbers, `weights` being those of the share; raises Corrupt when shape and bytes do not go together."""
        if self.value is not None:
            return self.value
        if self.length != self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64)):
            raise Corrupt(f"graph file: a tensor {self.shape} of {self.dtype} has {self.length} bytes")
        return np.frombuffer(weights[self.offset : self.offset + self.length], self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class Node:
    """One operator; attributes are int, float, str, lists of int or float, or Tensor."""

    op: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in the order in which they run."""

    nodes: tuple[Node, ...]
    tensors: dict[str, Tensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    makers: dict[str, Node] = field(default_factory=dict)  # value -> the node that makes it
    uses: dict[str, int] = field(default_factory=dict)  # value -> how many nodes take it


def read_graph(data: bytes | memoryview) -> Graph:
    """The graph of a model that `check_graph` has accepted; raises Corrupt."""
    nodes: list[Node] = []
    tensors: dict[str, Tensor] = {}
    ends: dict[int, list[str]] = {11: [], 12: []}
    for model_field, body in fields(memoryview(data)):
        if model_field != 7:
            continue
        for number, value in fields(message(body)):
            if number == 1:
                nodes.append(_node(message(value)))
            elif number == 5:
                name, tensor = _tensor(message(value))
                tensors[name] = tensor
            elif number in ends:
                ends[number].append(next(_text(one) for at, one in fields(message(value)) if at == 1))
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    makers = {name: node for node in nodes for name in node.outputs if name}
    return Graph(tuple(nodes), tensors, tuple(ends[11]), tuple(ends[12]), makers, uses)


def _node(data: memoryview) -> Node:
    inputs, outputs, op, attributes = list[str](), list[str](), "", dict[str, Any]()
    for number, value in fields(data):
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 4:
            op = _text(value)
        elif number == 5:
            name, found = _attribute(message(value))
            attributes[name] = found
    return Node(op, tuple(inputs), tuple(outputs), attributes)


def _attribute(data: memoryview) -> tuple[str, Any]:
    name, found, listed = "", None, list[Any]()
    for number, value in fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            found = struct.unpack("<f", message(value))[0]
        elif number == 3:
            found = _signed(value)
        elif number == 4:
            found = _text(value)
        elif number == 5:
            found = _tensor(message(value))[1]
        elif number == 7:
            listed += np.frombuffer(message(value), "<f4").tolist()
        elif number == 8:
            listed += _numbers(value)
    return name, listed or found


def _tensor(data: memoryview) -> tuple[str, Tensor]:
    name, kind, dims = "", 0, list[int]()
    raw, numbers, entries = b"", list[int](), dict[str, str]()
    for number, value in fields(data):
        if number == 1:
            dims += _numbers(value)
        elif number == 2:
            kind = _signed(value)
        elif number == 8:
            name = _text(value)
        elif number == 9 or number in _FIXED_DATA:
            raw += bytes(message(value))
        elif number in _VARINT_DATA:
            numbers += _numbers(value)
        elif number == 13:
            entry = {at: _text(part) for at, part in fields(message(value))}
            entries[entry[1]] = entry.get(2, "")
    if kind not in _DTYPES:
        raise Corrupt(f"graph file: tensor {name[:64]!r} of type {kind}")
    dtype, shape = _DTYPES[kind], tuple(dims)
    if entries:
        return name, Tensor(dtype, shape, None, int(entries["offset"]), int(entries["length"]))
    values = np.array(numbers, dtype) if numbers else np.frombuffer(raw, dtype)
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise Corrupt(f"graph file: tensor {name[:64]!r} holds {values.size} numbers, its shape is {shape}")
    return name, Tensor(dtype, shape, values.reshape(shape))


def _numbers(value: int | memoryview) -> list[int]:
    """One varint, or those packed in bytes."""
    return [_signed(value)] if isinstance(value, int) else list(_packed(value))


def _packed(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = varint(data, position)
        yield _signed(value)


def _signed(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise Corrupt("graph file: bytes where a number was expected")
    return value - (1 << 64) if value >= 1 << 63 else value


def _text(value: int | memoryview) -> str:
    try:
        return bytes(message(value)).decode()
    except UnicodeDecodeError as error:
        raise Corrupt("graph file: a name that is not UTF-8") from error
