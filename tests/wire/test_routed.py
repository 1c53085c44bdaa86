"""Frames of routed rows: what is packed is what is parsed, as large as was counted, and a lie is named."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.wire.errors import Exhausted, ProtocolViolation
from ganglion.wire.frames import OVERHEAD_BYTES, PAYLOAD_BYTES, Ends, Kind, message_header
from ganglion.wire.frames import parse as parse_frame
from ganglion.wire.limits import CONTROL_MESSAGE_BYTES
from ganglion.wire.payload import dtype_of, row_bytes, width_of
from ganglion.wire.routed import (
    FRAME_BYTES,
    RoutedFrame,
    given_bytes,
    pack_routed,
    parse_routed,
    routed_bytes,
    token_bytes,
    touch_bytes,
)

PAYLOADS = ("full", "fp16", "int8")
HIDDEN, EACH = 70, 3


def frame(counts, payload="full", experts=None, seed=0):
    rng = np.random.default_rng(seed)
    pairs = sum(counts)
    width, dtype = width_of(payload, HIDDEN), dtype_of(payload)
    rows = rng.integers(0, 256, len(counts) * width * dtype.itemsize, np.uint8).view(dtype).reshape(len(counts), width)
    experts = np.arange(pairs) % 5 * 2 if experts is None else np.array(experts)
    weights = rng.standard_normal(pairs).astype(np.float32)
    return RoutedFrame(rows, np.array(counts, np.intp), experts.astype(np.uint16), weights)


PLACE = np.array([0, -1, 1, -1, 2, -1, 3, -1, 4], np.int64)  # the even ones lie here


def parse(content, rows=8, payload="full", each=EACH):
    width, dtype = width_of(payload, HIDDEN), dtype_of(payload)
    return parse_routed(bytes(content), rows=rows, each=each, width=width, dtype=dtype, place=PLACE)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, EACH), min_size=1, max_size=8), st.sampled_from(PAYLOADS))
def test_parse_of_pack_is_the_same_and_as_large_as_counted(counts, payload):
    sent = frame(counts, payload)
    content = pack_routed(sent)
    assert len(content) == routed_bytes(len(counts), sum(counts), HIDDEN, payload)
    found = parse(content, payload=payload)
    for name in ("rows", "counts", "experts", "weights"):
        assert getattr(found, name).tobytes() == getattr(sent, name).tobytes()


def lie(change):
    content = bytearray(pack_routed(frame([1, 3, 2])))
    change(content)
    return content


def put(form, at, value):
    return lambda content: struct.pack_into(form, content, at, value)


ROWS_AT = 8 + 4 * 6
EXPERTS_AT = ROWS_AT + 3 * HIDDEN * 4
COUNTS_AT = EXPERTS_AT + 2 * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.__delitem__(slice(5, None)), "of 5 bytes"),
        (put("<I", 0, 0), "of 0 rows, the step has 8"),
        (put("<I", 0, 9), "of 9 rows, the step has 8"),
        (put("<I", 0, 2**32 - 1), "rows, the step has 8"),
        (put("<I", 4, 2), "of 2 pairs for 3 rows"),
        (put("<I", 4, 10), "of 10 pairs for 3 rows, of 1 to 3 experts each"),
        (put("<I", 4, 5), "3 rows and 5 pairs are"),
        (lambda content: content.extend(b"\0"), "3 rows and 6 pairs are"),
        (lambda content: content.pop(), "3 rows and 6 pairs are"),
        (put("<f", 8, float("nan")), "weights that are not finite"),
        (put("<f", 12, float("inf")), "weights that are not finite"),
        (put("<H", EXPERTS_AT, 9), "expert 9 of a layer of 9"),
        (put("<H", EXPERTS_AT, 65535), "expert 65535 of a layer of 9"),
        (put("<H", EXPERTS_AT + 2, 3), "expert 3, which does not lie here"),
        (put("<H", COUNTS_AT, 0), "rows have 0 to 3 experts"),
        (put("<H", COUNTS_AT, 2), "7 in all, with 6 pairs"),
        (put("<H", COUNTS_AT, 4), "rows have 2 to 4 experts"),
    ],
)
def test_a_frame_that_lies(change, message):
    with pytest.raises(ProtocolViolation, match=message):
        parse(lie(change))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=60).map(lambda tail: struct.pack("<II", 1, 1) + tail))
def test_any_bytes_are_refused_or_parsed(content):
    try:
        found = parse(content)
    except ProtocolViolation:
        return
    assert len(content) == routed_bytes(len(found.rows), len(found.experts), HIDDEN)


def test_a_frame_of_rows_may_be_as_large_as_a_tensor():
    ends = Ends(1, 0, 1)
    assert parse_frame(message_header(Kind.ROUTED, ends, 1, 1, PAYLOAD_BYTES), ends).payload_bytes == PAYLOAD_BYTES
    with pytest.raises(Exhausted, match="fewer rows"):
        message_header(Kind.ROUTED, ends, 1, 1, PAYLOAD_BYTES + 1)
    with pytest.raises(Exhausted, match="STEP"):
        message_header(Kind.STEP, ends, 1, 1, CONTROL_MESSAGE_BYTES + 1)


def test_what_a_token_costs():
    assert FRAME_BYTES == OVERHEAD_BYTES
    assert [row_bytes(payload, 128) for payload in PAYLOADS] == [512, 256, 136]
    assert given_bytes(2, 1, 128, exact=True) == 2 * 512 + 1024
    assert given_bytes(2, 1, 128, exact=False, payload="int8") == 3 * 136
    lone = touch_bytes(1, 128, exact=True)
    assert lone == 2 * FRAME_BYTES + 8 + 6 + 2 + 512 + 512
    assert touch_bytes(2, 128, exact=True) == lone + 6 + 512
    none = token_bytes([[], []], 3, 128, exact=True)
    assert token_bytes([[1], [2, 1]], 3, 128, exact=True) - none == 2 * lone + touch_bytes(2, 128, exact=True)
    assert token_bytes([[]], 1, 128, exact=True) == 0
