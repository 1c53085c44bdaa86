"""Rows that are run elsewhere, and added: the sums of one device bit for bit, wherever their experts lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.exchange.parcels import Travel, add, ask, give
from ganglion.agent.executor.mixing import mix
from ganglion.wire.routed import parse_routed

HIDDEN, EXPERTS, K = 68, 6, 3


def experts_of(seed):
    """Experts that give a row the same bits in any batch."""
    matrices = np.random.default_rng(seed).standard_normal((EXPERTS, HIDDEN, HIDDEN)).astype(np.float32)

    def run(held):
        def experts(rows, place):
            pairs = zip(rows, place.tolist(), strict=True)
            return np.stack([np.tanh(matrices[held[at]] @ row) for row, at in pairs]).astype(np.float32)

        return experts

    return run


def through_frames(case, travel, devices):
    """The sums by way of frames, of every device in turn, and the bytes that came back."""
    rows, chosen, weights, ranks, run = case
    into = np.zeros((len(rows), HIDDEN), np.float64 if travel.exact else np.float32)
    came = 0
    for rank in range(devices):
        held = sorted(set(chosen[ranks == rank].tolist()))
        if not held:
            continue
        place = np.full(EXPERTS, -1, np.int64)
        place[held] = np.arange(len(held))
        asked, payload = ask(rows, chosen, weights, ranks == rank, travel)
        routed = parse_routed(
            bytes(payload), rows=len(rows), each=K, width=travel.width, dtype=travel.dtype, place=place
        )
        content = give(routed, place, run(held), travel)
        assert content.dtype == np.uint8
        assert content.shape == (1, asked.given_bytes(travel))
        came += content.size
        add(content, asked, travel, into)
    return into, came


def case_of(seed, rows, devices):
    rng = np.random.default_rng(seed)
    chosen = np.array([rng.permutation(EXPERTS)[:K] for _ in range(rows)], np.int64)
    weights = rng.random((rows, K)).astype(np.float32)
    ranks = rng.integers(0, devices, (rows, K))
    return rng.standard_normal((rows, HIDDEN)).astype(np.float32), chosen, weights, ranks, experts_of(seed)


def on_one_device(case, dtype):
    rows, chosen, weights, _, run = case
    repeated = np.repeat(rows, K, axis=0)
    given_rows = run(range(EXPERTS))(repeated, chosen.ravel())
    into = np.zeros((len(rows), HIDDEN), dtype)
    mix(given_rows, np.repeat(np.arange(len(rows)), K), weights.ravel(), into)
    return into


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 4))
def test_exact_sums_are_those_of_one_device_bit_for_bit(seed, rows, devices):
    case = case_of(seed, rows, devices)
    found, _ = through_frames(case, Travel(HIDDEN, exact=True, payload="full"), devices)
    assert np.array_equal(found, on_one_device(case, np.float64))


@pytest.mark.parametrize(("payload", "tolerance"), [("full", 1e-6), ("fp16", 3e-3), ("int8", 4e-2)])
def test_fast_sums_are_near_and_fewer_bytes(payload, tolerance):
    case = case_of(3, 9, 3)
    found, came = through_frames(case, Travel(HIDDEN, exact=False, payload=payload), 3)
    expected = on_one_device(case, np.float32)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    whole = through_frames(case, Travel(HIDDEN, exact=False, payload="full"), 3)[1]
    assert came / whole == pytest.approx({"full": 1, "fp16": 0.5, "int8": (HIDDEN + 8) / (4 * HIDDEN)}[payload])


def test_rows_are_not_changed_by_what_travels():
    rows, chosen, weights, ranks, _ = case_of(4, 5, 2)
    rows[0, 0] = 1e6  # beyond float16
    before = rows.copy()
    ask(rows, chosen, weights, ranks == 1, Travel(HIDDEN, exact=False, payload="fp16"))
    assert np.array_equal(rows, before)
