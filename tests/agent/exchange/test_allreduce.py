"""Adding in order of rank, wherever this device's own term stands."""

from __future__ import annotations

import numpy as np
import pytest

from ganglion.agent.exchange.allreduce import add_in_order


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("own", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sum_from_the_left_into_any_term(count, own, dtype):
    rng = np.random.default_rng(count)
    terms = [(rng.standard_normal((3, 50)) * 10.0 ** rng.integers(-6, 6)).astype(dtype) for _ in range(count)]
    expected = terms[0].copy()
    for term in terms[1:]:
        expected = expected + term
    into = np.zeros((3, 50), dtype) if own is None or own >= count else terms[own]
    others = [term.copy() for term in terms]
    add_in_order(terms, into)
    assert np.array_equal(into, expected)
    for index, term in enumerate(terms):
        assert term is into or np.array_equal(term, others[index])
