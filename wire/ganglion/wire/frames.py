"""Frames of a lane: a fixed header in clear (and authenticated), then a sealed payload. No sockets.

What a frame may be is decided by the step that was announced, never by the frame: its header is compared with an
`Expectation` before anything is decrypted. Tensors are dense, row-major, little-endian, of an enumerated dtype.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.errors import Exhausted, Internal, ProtocolViolation
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES, TENSOR_MESSAGE_BYTES
from ganglion.wire.sealing import TAG_BYTES

if sys.byteorder != "little":
    raise ImportError("ganglion lanes send tensors as they lie in memory, which takes a little-endian machine")


class Kind(IntEnum):
    """What a frame is."""

    STEP = 1  # lead → all: Step
    PARTIAL = 2  # a segment's partial sum
    HIDDEN = 3  # rows handed to a stage
    CANDIDATES = 4  # share → lead: CandidatesReply
    MORE = 5  # lead → share: MoreCandidates
    CLOSE = 6  # the end, wanted
    ERROR = 7  # the end, with an ErrorBody
    ROUTED = 8  # lead → a device with experts: rows and whose they are, see ganglion.wire.routed
    GIVEN = 9  # and back: what the experts give


class Dtype(IntEnum):
    """Element types on the wire."""

    BYTES = 0  # a message, not a tensor
    F32 = 1
    F64 = 2
    F16 = 3
    I32 = 4
    I64 = 5
    I8 = 6
    U8 = 7


_NUMPY: Final[dict[Dtype, np.dtype[np.generic]]] = {
    Dtype.F32: np.dtype(np.float32),
    Dtype.F64: np.dtype(np.float64),
    Dtype.F16: np.dtype(np.float16),
    Dtype.I32: np.dtype(np.int32),
    Dtype.I64: np.dtype(np.int64),
    Dtype.I8: np.dtype(np.int8),
    Dtype.U8: np.dtype(np.uint8),
}
_KINDS: Final = frozenset(int(kind) for kind in Kind)
_DTYPES: Final = frozenset(int(dtype) for dtype in Dtype)
_WIRE: Final = {dtype: code for code, dtype in _NUMPY.items()}

# magic and version, kind, dtype, source, destination, epoch, step, exchange, rows, columns, payload bytes (plaintext)
_HEADER: Final = struct.Struct("<2sBBHHQQIIII")
HEADER_BYTES: Final = _HEADER.size
MAGIC: Final = b"G\x01"
PAYLOAD_BYTES: Final = TENSOR_MESSAGE_BYTES - HEADER_BYTES - TAG_BYTES
OVERHEAD_BYTES: Final = HEADER_BYTES + TAG_BYTES


class Ends(NamedTuple):
    """Who sends to whom, and in which epoch: constant for one direction of one lane."""

    epoch: int
    source: int
    destination: int


class Header(NamedTuple):
    """A frame's header, parsed. `payload_bytes` is the size before sealing."""

    kind: Kind
    dtype: Dtype
    ends: Ends
    step: int
    exchange: int
    rows: int
    columns: int
    payload_bytes: int

    def pack(self) -> bytes:
        """The `HEADER_BYTES` bytes that travel; raises Internal for a figure that no header holds."""
        try:
            return _HEADER.pack(
                MAGIC,
                self.kind,
                self.dtype,
                self.ends.source,
                self.ends.destination,
                self.ends.epoch,
                self.step,
                self.exchange,
                self.rows,
                self.columns,
                self.payload_bytes,
            )
        except struct.error as error:
            raise Internal(f"a frame header cannot hold {self}: {error}") from error


class Expectation(NamedTuple):
    """The one frame that may come next, by the announced step.

    Tensors: `dtype`, `rows`, `columns` say all. Messages (`dtype` BYTES): `columns` is the most bytes allowed.
    """

    kind: Kind
    step: int
    exchange: int = 0
    dtype: Dtype = Dtype.BYTES
    rows: int = 0
    columns: int = CONTROL_MESSAGE_BYTES

    def header(self, ends: Ends) -> Header:
        """The header of the expected tensor."""
        size = self.rows * self.columns * _NUMPY[self.dtype].itemsize
        return Header(self.kind, self.dtype, ends, self.step, self.exchange, self.rows, self.columns, size)

    def pack(self, ends: Ends) -> bytes:
        """That header as it travels: what comes bit for bit like it need not be parsed."""
        return self.header(ends).pack()


def wire_dtype(dtype: np.dtype[np.generic] | type[np.generic]) -> Dtype:
    """The code of a numpy dtype; raises Internal for one that no frame carries (byte-swapped, object, float128)."""
    try:
        return _WIRE[np.dtype(dtype)]
    except KeyError:
        raise Internal(f"dtype {np.dtype(dtype)} does not travel in frames") from None


def numpy_dtype(dtype: Dtype) -> np.dtype[np.generic]:
    """The numpy dtype of a tensor's code."""
    return _NUMPY[dtype]


def tensor_header(kind: Kind, ends: Ends, step: int, exchange: int, array: NDArray[np.generic]) -> bytes:
    """Packed header for `array`: [rows, columns], C-contiguous.

    Raises Internal (not such an array), Exhausted (larger than one frame: announce fewer rows in a step).
    """
    if array.ndim != 2 or not array.flags.c_contiguous:
        raise Internal(f"a frame takes a contiguous array of two dimensions, not shape {array.shape}")
    rows, columns = array.shape
    size = array.nbytes
    if size > PAYLOAD_BYTES:
        raise Exhausted(
            f"a tensor of {size} bytes ({rows} rows of {columns}) exceeds the {PAYLOAD_BYTES} bytes of one frame; "
            "announce fewer rows in a step"
        )
    return Header(kind, wire_dtype(array.dtype), ends, step, exchange, rows, columns, size).pack()


def message_header(kind: Kind, ends: Ends, step: int, exchange: int, size: int) -> bytes:
    """Packed header for a message of `size` bytes; raises Exhausted when it is larger than one may be."""
    routed = kind is Kind.ROUTED  # its size follows from the step that was announced
    most = PAYLOAD_BYTES if routed else CONTROL_MESSAGE_BYTES
    if size > most:
        knob = "; announce fewer rows in a step" if routed else ""
        raise Exhausted(f"a {kind.name} message of {size} bytes exceeds the {most} bytes of one frame{knob}")
    return Header(kind, Dtype.BYTES, ends, step, exchange, 0, 0, size).pack()


def parse(packed: bytes, ends: Ends) -> Header:
    """Header of a received frame, checked against itself and the lane's ends; nothing is decrypted or allocated.

    Raises ProtocolViolation naming the field. A frame of another epoch is fenced here.
    """
    if len(packed) < HEADER_BYTES:
        raise ProtocolViolation(f"a frame of {len(packed)} bytes, expected at least {OVERHEAD_BYTES}")
    magic, kind, dtype, source, destination, epoch, step, exchange, rows, columns, size = _HEADER.unpack_from(packed)
    if magic != MAGIC:
        raise ProtocolViolation(f"a frame that begins with {magic!r}, expected {MAGIC!r}")
    if kind not in _KINDS:
        raise ProtocolViolation(f"a frame of unknown kind {kind}")
    if dtype not in _DTYPES:
        raise ProtocolViolation(f"a frame of unknown dtype {dtype}")
    if Ends(epoch, source, destination) != ends:
        raise ProtocolViolation(
            f"a frame of epoch {epoch} from rank {source} to {destination}, "
            f"expected epoch {ends.epoch} from rank {ends.source} to {ends.destination}"
        )
    if size > PAYLOAD_BYTES:
        raise ProtocolViolation(f"a frame that declares {size} bytes, at most {PAYLOAD_BYTES}")
    described = 0 if dtype == Dtype.BYTES else rows * columns * _NUMPY[Dtype(dtype)].itemsize
    if (rows or columns) if dtype == Dtype.BYTES else described != size:
        raise ProtocolViolation(f"a frame of {size} bytes whose shape [{rows}, {columns}] means {described}")
    return Header(Kind(kind), Dtype(dtype), ends, step, exchange, rows, columns, size)


def check_carried(declared_bytes: int, message_bytes: int) -> None:
    """Raise ProtocolViolation unless a whole message of so many bytes is a frame of the declared payload."""
    if declared_bytes != message_bytes - OVERHEAD_BYTES:
        raise ProtocolViolation(
            f"a frame that declares {declared_bytes} bytes and carries {message_bytes - OVERHEAD_BYTES}"
        )


def check(packed: bytes, expected: Expectation, ends: Ends) -> Header:
    """Header of a received frame that must be the expected one; raises ProtocolViolation naming the field.

    ERROR and CLOSE are returned too, whatever was expected: a peer may always end the lane.
    """
    header = parse(packed, ends)
    if header.dtype == Dtype.BYTES and header.kind in (Kind.ERROR, Kind.CLOSE):
        return header
    for field in ("kind", "step", "exchange", "dtype"):
        found, wanted = getattr(header, field), getattr(expected, field)
        if found != wanted:
            raise ProtocolViolation(
                f"a frame whose {field} is {_named(found)}, expected {_named(wanted)} (step {expected.step}, "
                f"exchange {expected.exchange})"
            )
    if expected.dtype == Dtype.BYTES:
        if header.payload_bytes > expected.columns:
            raise ProtocolViolation(
                f"a {expected.kind.name} message of {header.payload_bytes} bytes, at most {expected.columns}"
            )
    elif (header.rows, header.columns) != (expected.rows, expected.columns):
        raise ProtocolViolation(
            f"a {expected.kind.name} frame of shape [{header.rows}, {header.columns}], the step says "
            f"[{expected.rows}, {expected.columns}]"
        )
    return header


def _named(value: object) -> str:
    return value.name if isinstance(value, IntEnum) else str(value)
