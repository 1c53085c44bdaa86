"""Where each expert lies in the file that ONNX Runtime maps, and which pages of it are its own.

Of a graph that ONNX Runtime has written with its weights packed, a *range* is bytes of the external file that kernels
read: a packed copy, or an initializer that is not packed. Kernels keep experts one after the other in equal strides
(verified when a part is made: see `parts`). Strides are not whole pages, so a page at a seam is two experts'; seams and
what is not laid out by experts stay in memory, and the pages between seams come and go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ganglion.agent.executor.graph_file import fields, message, varint
from ganglion.wire.errors import Corrupt

PAGE: Final = 4096
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

Span = tuple[int, int]
"""Offset and length in bytes."""


@dataclass(frozen=True, slots=True)
class Initializer:
    """An initializer in the external file: where it lies, and the packed copies that kernels read in its place."""

    name: str
    dims: tuple[int, ...]
    span: Span
    packed: tuple[Span, ...]


def initializers(graph: bytes | memoryview) -> tuple[Initializer, ...]:
    """The initializers of an ONNX file that lie outside it; raises Corrupt."""
    found = []
    for number, value in fields(memoryview(graph)):
        if number == _MODEL_GRAPH:
            for field, tensor in fields(message(value)):
                if field == _GRAPH_INITIALIZER and (one := _initializer(message(tensor))) is not None:
                    found.append(one)
    return tuple(found)


def _initializer(tensor: memoryview) -> Initializer | None:
    dims: list[int] = []
    name, entries = "", dict[str, str]()
    for number, value in fields(tensor):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _numbers(value)
        elif number == _TENSOR_NAME:
            name = bytes(message(value)).decode()
        elif number == _TENSOR_EXTERNAL:
            entry = {field: bytes(message(part)).decode() for field, part in fields(message(value))}
            entries[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
    if not entries:
        return None
    try:
        span = int(entries["offset"]), int(entries["length"])
        # "prepacked_N": a name, then for each buffer offset;length;checksum, all between bars
        texts = [text for key, text in sorted(entries.items()) if key.startswith("prepacked")]
        packed = [one.split(";") for text in texts for one in text.split("|")[1:]]
        return Initializer(name, tuple(dims), span, tuple((int(one[0]), int(one[1])) for one in packed))
    except (KeyError, ValueError, IndexError) as error:
        raise Corrupt(f"graph file: initializer {name!r} says {entries} of where it lies") from error


def _numbers(packed: memoryview) -> Iterator[int]:
    position = 0
    while position < len(packed):
        value, position = varint(packed, position)
        yield value


@dataclass(frozen=True, slots=True)
class Layout:
    """The ranges of a graph of `experts` experts that kernels read.

    paged: those laid out by experts, in the order in which an expert's pages lie in a record. fixed: bytes that stay in
    memory. unread: ranges that kernels were seen not to read once their packed copies are there.
    """

    experts: int
    paged: tuple[Span, ...]
    fixed: tuple[Span, ...]
    unread: tuple[Span, ...]

    def strides(self, expert: int) -> tuple[Span, ...]:
        """The bytes of an expert, seams included."""
        return tuple(
            (offset + expert * (length // self.experts), length // self.experts) for offset, length in self.paged
        )

    def pages(self, expert: int) -> tuple[Span, ...]:
        """The whole pages that are this expert's alone, one span a range (of no length where it has none)."""
        return tuple(inner_pages(span) for span in self.strides(expert))

    def record_bytes(self) -> int:
        """Pages of the expert that has most, in bytes: what a slot holds."""
        return max(sum(length for _, length in self.pages(expert)) for expert in range(self.experts))

    def resident(self) -> tuple[Span, ...]:
        """What stays in memory: seams of experts, then `fixed`."""
        seams: list[Span] = []
        for number, (offset, length) in enumerate(self.paged):
            at = offset
            for expert in range(self.experts):
                first, size = self.pages(expert)[number]
                if size:
                    seams.append((at, first - at))
                    at = first + size
            seams.append((at, offset + length - at))
        return tuple(span for span in (*seams, *self.fixed) if span[1])


def layout_of(written: Sequence[Initializer], experts: int, unread: Sequence[str]) -> Layout:
    """The layout of a graph's initializers; `unread`: names of those without a packed copy that kernels do not read."""
    paged: list[Span] = []
    fixed: list[Span] = []
    skipped: list[Span] = []
    for one in written:
        for span in one.packed or (one.span,):
            if one.name in unread and not one.packed:
                skipped.append(span)
            elif one.dims[:1] == (experts,) and span[1] % experts == 0 and span[1] >= PAGE * experts:
                paged.append(span)
            else:
                fixed.append(span)
    return Layout(experts, tuple(paged), tuple(fixed), tuple(skipped))


def inner_pages(span: Span) -> Span:
    """The whole pages of a span; of no length where it has none."""
    offset, length = span
    first, last = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
    return (first, last - first) if last > first else (first, 0)
