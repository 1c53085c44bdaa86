"""Frames: what is said is what the step announced, or it is refused before anything is decrypted or allocated."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.wire.errors import Exhausted, GanglionError, Internal, ProtocolViolation
from ganglion.wire.frames import (
    HEADER_BYTES,
    OVERHEAD_BYTES,
    PAYLOAD_BYTES,
    Dtype,
    Ends,
    Expectation,
    Header,
    Kind,
    check,
    check_carried,
    message_header,
    numpy_dtype,
    parse,
    tensor_header,
    wire_dtype,
)
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES
from ganglion.wire.sealing import TAG_BYTES

ENDS = Ends(epoch=7, source=1, destination=2)
TENSORS = [dtype for dtype in Dtype if dtype != Dtype.BYTES]


def frame(header: bytes, size: int) -> bytes:
    return header + bytes(size + TAG_BYTES)


def tensor(rows: int, columns: int, dtype: Dtype = Dtype.F64, step: int = 5, exchange: int = 3) -> bytes:
    array = np.zeros((rows, columns), numpy_dtype(dtype))
    return frame(tensor_header(Kind.PARTIAL, ENDS, step, exchange, array), array.nbytes)


def whole(message: bytes, expected: Expectation, ends: Ends = ENDS) -> Header:
    """A message that came as one piece: its header, then whether it carries what that declares."""
    header = check(message[:HEADER_BYTES], expected, ends)
    check_carried(header.payload_bytes, len(message))
    return header


def expectation(rows: int, columns: int, dtype: Dtype = Dtype.F64) -> Expectation:
    return Expectation(Kind.PARTIAL, 5, 3, dtype, rows, columns)


@given(st.sampled_from(TENSORS), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_parse_of_pack_is_the_same(dtype: Dtype, rows: int, columns: int, step: int) -> None:
    found = whole(tensor(rows, columns, dtype, step), Expectation(Kind.PARTIAL, step, 3, dtype, rows, columns))
    size = rows * columns * numpy_dtype(dtype).itemsize
    assert found == Header(Kind.PARTIAL, dtype, ENDS, step, 3, rows, columns, size)


def test_every_dtype_has_one_code() -> None:
    assert [wire_dtype(numpy_dtype(dtype)) for dtype in TENSORS] == TENSORS


@pytest.mark.parametrize("dtype", [">f8", "O", "c16", "S4", "f16", "?", "u4"])
def test_A10_other_dtypes_do_not_travel(dtype: str) -> None:
    with pytest.raises(Internal):
        wire_dtype(np.dtype(dtype))


def test_A10_a_view_that_is_not_contiguous_does_not_travel() -> None:
    for array in (np.zeros((4, 4)).T[:, :2], np.zeros((4, 4))[:, ::2], np.zeros(4)):
        with pytest.raises(Internal):
            tensor_header(Kind.PARTIAL, ENDS, 1, 1, array)


def test_larger_than_one_frame_is_refused_at_the_sender() -> None:
    with pytest.raises(Exhausted, match=str(PAYLOAD_BYTES)):
        tensor_header(Kind.PARTIAL, ENDS, 1, 1, np.zeros((1, PAYLOAD_BYTES + 1), np.uint8))
    with pytest.raises(Exhausted, match=str(CONTROL_MESSAGE_BYTES)):
        message_header(Kind.STEP, ENDS, 1, 1, CONTROL_MESSAGE_BYTES + 1)


@given(st.data())
@settings(max_examples=300)
def test_A2_A3_any_cut_or_flipped_header_bit_is_refused(data: st.DataObject) -> None:
    message = tensor(4, 8)
    if data.draw(st.booleans(), label="cut"):
        changed = message[: data.draw(st.integers(0, len(message) - 1))]
    else:
        bit = data.draw(st.integers(0, HEADER_BYTES * 8 - 1))
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        changed = bytes(flipped)
    with pytest.raises(ProtocolViolation):
        whole(changed, expectation(4, 8))


@given(st.binary(max_size=300))
def test_A13_random_bytes_raise_only_the_error_of_the_contract(content: bytes) -> None:
    for message in (content, b"G\x01" + content):
        with pytest.raises(ProtocolViolation):
            whole(message, expectation(1, 1))


_RAW = struct.Struct("<2sBBHHQQIIII")


@given(
    st.sampled_from(list(Dtype)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 64),
)
def test_A6_a_shape_that_is_not_its_payload_is_refused_before_allocation(
    dtype: Dtype, rows: int, columns: int, declared: int, carried: int
) -> None:
    header = _RAW.pack(b"G\x01", Kind.PARTIAL, dtype, 1, 2, 7, 5, 3, rows, columns, declared)
    message = frame(header, carried)
    fits = declared == carried and (
        rows == columns == 0 if dtype is Dtype.BYTES else rows * columns * numpy_dtype(dtype).itemsize == carried
    )
    tracemalloc.start()
    try:
        if fits:
            header = parse(message, ENDS)
            check_carried(header.payload_bytes, len(message))
            assert header.payload_bytes == carried
        else:
            with pytest.raises(ProtocolViolation):
                check_carried(parse(message, ENDS).payload_bytes, len(message))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(TENSORS))
def test_A7_a_tensor_right_by_its_own_header_and_not_by_the_step_is_refused(
    rows: int, columns: int, dtype: Dtype
) -> None:
    message = tensor(rows, columns, dtype)
    if (rows, columns, dtype) == (4, 8, Dtype.F64):
        check(message, expectation(4, 8), ENDS)
    else:
        with pytest.raises(ProtocolViolation):
            check(message, expectation(4, 8), ENDS)


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (Expectation(Kind.HIDDEN, 5, 3, Dtype.F64, 4, 8), "kind is PARTIAL, expected HIDDEN"),
        (Expectation(Kind.PARTIAL, 6, 3, Dtype.F64, 4, 8), "step is 5, expected 6"),
        (Expectation(Kind.PARTIAL, 5, 2, Dtype.F64, 4, 8), "exchange is 3, expected 2"),
        (Expectation(Kind.PARTIAL, 5, 3, Dtype.F32, 4, 8), "dtype is F64, expected F32"),
        (Expectation(Kind.PARTIAL, 5, 3, Dtype.F64, 5, 8), r"\[4, 8\], the step says \[5, 8\]"),
        (Expectation(Kind.PARTIAL, 5, 3), "dtype is F64, expected BYTES"),
    ],
)
def test_the_error_names_the_field(expected: Expectation, names: str) -> None:
    with pytest.raises(ProtocolViolation, match=names):
        check(tensor(4, 8), expected, ENDS)


@pytest.mark.parametrize("ends", [Ends(8, 1, 2), Ends(7, 2, 1), Ends(7, 1, 3)])
def test_D2_a_frame_of_another_epoch_or_rank_is_fenced(ends: Ends) -> None:
    with pytest.raises(ProtocolViolation, match="epoch 7 from rank 1 to 2"):
        check(tensor(4, 8), expectation(4, 8), ends)


def test_A8_a_message_may_not_be_larger_than_asked() -> None:
    message = frame(message_header(Kind.CANDIDATES, ENDS, 5, 0, 100), 100)
    assert check(message, Expectation(Kind.CANDIDATES, 5, columns=100), ENDS).payload_bytes == 100
    with pytest.raises(ProtocolViolation, match="100 bytes, at most 99"):
        check(message, Expectation(Kind.CANDIDATES, 5, columns=99), ENDS)


def test_A8_a_size_beyond_one_frame_is_refused_by_the_header_alone() -> None:
    for columns in (PAYLOAD_BYTES + 1, 2**32 - 1):
        header = _RAW.pack(b"G\x01", Kind.PARTIAL, Dtype.U8, 1, 2, 7, 5, 3, 1, columns, columns)
        with pytest.raises(ProtocolViolation, match=f"at most {PAYLOAD_BYTES}"):
            check(header, expectation(1, columns, Dtype.U8), ENDS)


def test_an_expected_header_is_the_one_that_is_sent() -> None:
    assert expectation(4, 8).pack(ENDS) == tensor(4, 8)[:HEADER_BYTES]


def test_a_peer_may_always_end_the_lane_and_only_with_a_message() -> None:
    for kind in (Kind.ERROR, Kind.CLOSE):
        assert check(frame(message_header(kind, ENDS, 0, 0, 3), 3), expectation(4, 8), ENDS).kind is kind
        header = Header(kind, Dtype.U8, ENDS, 5, 3, 1, 3, 3).pack()
        with pytest.raises(ProtocolViolation):
            check(frame(header, 3), expectation(4, 8), ENDS)


def test_A5_a_figure_that_no_header_holds_is_a_defect_of_ours() -> None:
    with pytest.raises(GanglionError):
        message_header(Kind.STEP, ENDS, -1, 0, 1)
    assert OVERHEAD_BYTES == HEADER_BYTES + TAG_BYTES
