"""How shares are put together: against concatenation in numpy, for any range; and what does not fit together."""

from __future__ import annotations

import hashlib
import io

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.wire import shares
from ganglion.wire.errors import Corrupt, InvalidDocument
from ganglion.wire.nouns import PieceRef, Range, Segment, Slot
from ganglion.wire.shares import graph_name, group_count, slot_offsets, weights_size, write_weights


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
    return Segment(kind="mlp", axis="columns", groups=len(slots[-1][3]) or 7, slots=tuple(built))


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


@given(held=st.sets(st.integers(0, 6)), wide=st.sampled_from(["", "float16"]))
def test_a_set_of_groups_is_its_groups_one_after_the_other(held, wide):
    rng = np.random.default_rng(3)
    whole, numbers = rng.integers(0, 256, 7, np.uint8), rng.standard_normal((7, 12)).astype(np.float16)
    store: dict[str, bytes] = {}
    segment = segment_of(store, ("norm", "whole", 1, [whole]), ("in", "rows", 1, list(numbers)))
    segment = msgspec.structs.replace(
        segment, slots=(segment.slots[0], msgspec.structs.replace(segment.slots[1], stored=wide))
    )
    groups = tuple(sorted(held))
    into = io.BytesIO()
    write_weights(segment, groups, lambda digest: memoryview(store[digest]), into)
    chosen = numbers[list(groups)]
    assert into.getvalue() == whole.tobytes() + (chosen.astype(np.float32) if wide else chosen).tobytes()
    assert (weights_size(segment, groups), group_count(groups)) == (len(into.getvalue()), len(held))
    assert slot_offsets(segment, groups) == {"norm": 0, "in": 7}


@given(held=st.sets(st.integers(0, 6)), own=st.sets(st.integers(0, 6)))
def test_slots_of_some_groups_have_the_pieces_of_those_held(held, own):
    store: dict[str, bytes] = {}
    apart = (tuple(sorted(own)), tuple(sorted(set(range(7)) - own)))
    arrays = [[np.full(size, group, np.uint8) for group in groups] for groups, size in zip(apart, (3, 5), strict=True)]
    segment = segment_of(store, ("a", "rows", 1, arrays[0]), ("b", "rows", 1, arrays[1]), ("which", "marks", 1, []))
    slots = [
        msgspec.structs.replace(slot, groups=groups)
        for slot, groups in zip(segment.slots, (*apart, apart[1]), strict=True)
    ]
    segment = msgspec.structs.replace(segment, kind="mixture", slots=tuple(slots))
    for groups in (tuple(sorted(held)), Range(2, 6)):
        numbers = list(groups) if isinstance(groups, tuple) else [2, 3, 4, 5]
        into = io.BytesIO()
        write_weights(segment, groups, lambda digest: memoryview(store[digest]), into)
        joined = [[one] * 3 for one in numbers if one in own] + [[one] * 5 for one in numbers if one not in own]
        expected = b"".join(map(bytes, joined)) + np.array([one not in own for one in numbers], np.float32).tobytes()
        assert into.getvalue() == expected
        assert weights_size(segment, groups) == len(expected)
        mine = sum(one in own for one in numbers)
        assert slot_offsets(segment, groups) == {"a": 0, "b": 3 * mine, "which": len(expected) - 4 * len(numbers)}
        assert graph_name(segment, groups) == f"mixture/{mine}+{len(numbers) - mine}"
    assert graph_name(segment_of(store, ("w", "rows", 1, arrays[1])), Range(1, 3)) == "mlp/2"


def test_what_does_not_fit_together_is_refused():
    store: dict[str, bytes] = {}
    pieces = [np.zeros(6, np.uint8), np.ones(6, np.uint8)]
    segment = segment_of(store, ("w", "columns", 3, pieces))
    with pytest.raises(InvalidDocument, match=r"groups 0\.\.3 of 2 pieces"):
        weights_size(segment, Range(0, 3))
    with pytest.raises(InvalidDocument, match="group 2 of 2 pieces"):
        weights_size(segment, (0, 2))
    with pytest.raises(Corrupt, match="has 5 bytes, named with 6"):
        write_weights(segment, Range(0, 2), lambda digest: memoryview(store[digest])[:5], io.BytesIO())
    with pytest.raises(InvalidDocument, match="does not hold 4 rows"):
        weights_size(segment_of(store, ("w", "columns", 4, pieces)), Range(0, 2))
    with pytest.raises(InvalidDocument, match="differ in size"):
        weights_size(segment_of(store, ("w", "rows", 1, [pieces[0], pieces[1][:5]])), Range(0, 1))
    some = segment_of(store, ("w", "rows", 1, pieces))
    some = msgspec.structs.replace(some, slots=(msgspec.structs.replace(some.slots[0], groups=(1,)),))
    with pytest.raises(InvalidDocument, match="2 pieces of 1 groups"):
        weights_size(some, (1,))
    with pytest.raises(InvalidDocument, match="exactly 1"):
        weights_size(segment_of(store, ("w", "whole", 1, pieces)), Range(0, 1))
