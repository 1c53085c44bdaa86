"""Looks for what a coordinator must never see: text, token ids and activation rows, in any of the usual encodings."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = np.ndarray[Any, np.dtype[np.float32]]
TEXT_CHARACTERS = 10  # neighbouring characters that make a leak
IDS = 6  # neighbouring ids that make a leak
FLOATS = 8  # neighbouring numbers of a row that make a leak
TOLERANCE = {"<f2": 4e-3, "<f4": 1e-3, "<f8": 1e-3}  # relative: another kernel's rounding is the same activation


def varint(number: int) -> bytes:
    """Protobuf's encoding of an unsigned integer."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


ID_ENCODINGS = {
    "varint": varint,
    "int32": lambda number: struct.pack("<i", number),
    "int64": lambda number: struct.pack("<q", number),
}


def encode_ids(ids: Sequence[int], encoding: str) -> bytes:
    """`ids` one after the other."""
    return b"".join(ID_ENCODINGS[encoding](number) for number in ids)


def leaks(data: bytes, *, text: Sequence[str], ids: Sequence[Sequence[int]], rows: Rows) -> list[str]:
    """What of this is in `data`, by kind; `rows`: [n, hidden] float32."""
    found = []
    for each in text:
        windows = (each[at : at + TEXT_CHARACTERS] for at in range(max(1, len(each) - TEXT_CHARACTERS + 1)))
        if any(window.encode() in data for window in windows):
            found.append("text")
    for each_ids in ids:
        for encoding in ID_ENCODINGS:
            windows_of_ids = (each_ids[at : at + IDS] for at in range(max(1, len(each_ids) - IDS + 1)))
            if any(encode_ids(window, encoding) in data for window in windows_of_ids):
                found.append(encoding)
    found += [dtype for dtype in TOLERANCE if _has_row(data, rows, dtype)]
    return sorted(set(found))


def _has_row(data: bytes, rows: Rows, dtype: str) -> bool:
    """Whether the first FLOATS numbers of any row stand in `data`, at any offset."""
    size = np.dtype(dtype).itemsize
    wanted = rows[:, :FLOATS].astype(np.float64)
    for shift in range(size):
        usable = (len(data) - shift) // size * size
        if usable < FLOATS * size:
            continue
        with np.errstate(all="ignore"):
            numbers = np.frombuffer(data[shift : shift + usable], dtype).astype(np.float64)
            starts = len(numbers) - FLOATS + 1
            for row in wanted:
                bound = TOLERANCE[dtype] * np.abs(row) + 1e-6
                hits = np.flatnonzero(np.abs(numbers[:starts] - row[0]) <= bound[0])
                if any(bool(np.all(np.abs(numbers[at : at + FLOATS] - row) <= bound)) for at in hits):
                    return True
    return False
