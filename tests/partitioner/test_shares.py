"""How shares are put together: against concatenation in numpy, for any range; and what does not fit together."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.wire import shares
from ganglion.wire.errors import Corrupt, InvalidDocument
from ganglion.wire.nouns import PieceRef, Range, Segment, Slot
from ganglion.wire.shares import slot_offsets, weights_size, write_weights


def segment_of(store: dict[str, bytes], *slots: tuple[str, str, int, list[np.ndarray]]) -> Segment:
    built = []
    for name, join, rows, arrays in slots:
        refs = []
        for array in arrays:
            data = array.tobytes()
            digest = hashlib.sha256(data).hexdigest()
            store[digest] = data
            refs.append(PieceRef(digest, len(data)))
        built.append(Slot(name=name, join=join, rows=rows, pieces=tuple(refs)))
    return Segment(kind="mlp", axis="columns", groups=len(slots[-1][3]), slots=tuple(built))


@given(
    groups=st.integers(1, 6),
    rows=st.integers(1, 9),
    width=st.integers(1, 5),
    start=st.integers(0, 6),
    stop=st.integers(0, 6),
    block=st.integers(1, 64),
)
def test_written_bytes_equal_numpy_concatenation(groups, rows, width, start, stop, block):
    start, stop = sorted((min(start, groups), min(stop, groups)))
    rng = np.random.default_rng(groups * 100 + rows)
    whole = rng.integers(0, 256, 7, np.uint8)
    outer = [rng.integers(0, 256, (width, rows), np.uint8) for _ in range(groups)]
    inner = [rng.integers(0, 256, (rows, width), np.uint8) for _ in range(groups)]
    store: dict[str, bytes] = {}
    segment = segment_of(
        store, ("norm", "whole", 1, [whole]), ("outer", "rows", 1, outer), ("inner", "columns", rows, inner)
    )
    share = Range(start, stop)
    into = io.BytesIO()
    before, shares.BLOCK_BYTES = shares.BLOCK_BYTES, block
    try:
        write_weights(segment, share, lambda digest: memoryview(store[digest]), into)
    finally:
        shares.BLOCK_BYTES = before
    expected = whole.tobytes()
    if stop > start:
        expected += np.concatenate(outer[start:stop], 0).tobytes() + np.concatenate(inner[start:stop], 1).tobytes()
    assert into.getvalue() == expected
    assert weights_size(segment, share) == len(expected)
    size = (stop - start) * rows * width
    assert slot_offsets(segment, share) == {"norm": 0, "outer": 7, "inner": 7 + size}


def test_what_does_not_fit_together_is_refused():
    store: dict[str, bytes] = {}
    pieces = [np.zeros(6, np.uint8), np.ones(6, np.uint8)]
    segment = segment_of(store, ("w", "columns", 3, pieces))
    with pytest.raises(InvalidDocument, match=r"groups 0\.\.3 of 2 pieces"):
        weights_size(segment, Range(0, 3))
    with pytest.raises(Corrupt, match="has 5 bytes, named with 6"):
        write_weights(segment, Range(0, 2), lambda digest: memoryview(store[digest])[:5], io.BytesIO())
    with pytest.raises(InvalidDocument, match="does not hold 4 rows"):
        weights_size(segment_of(store, ("w", "columns", 4, pieces)), Range(0, 2))
    with pytest.raises(InvalidDocument, match="differ in size"):
        weights_size(segment_of(store, ("w", "rows", 1, [pieces[0], pieces[1][:5]])), Range(0, 1))
    with pytest.raises(InvalidDocument, match="exactly 1"):
        weights_size(segment_of(store, ("w", "whole", 1, pieces)), Range(0, 1))
