"""Predictors learn what there is to learn, and weigh as they are right."""

from __future__ import annotations

import numpy as np
import pytest
from paging_reference import made_up

from ganglion.agent.paging.predict import NAMES, Forecast


def walk(forecast: Forecast, routes: np.ndarray) -> None:
    for token in routes:
        for layer, chosen in enumerate(token):
            forecast.visit(layer, chosen[None])


def test_paths_that_always_follow_are_foretold() -> None:
    rng = np.random.default_rng(0)
    routes = rng.integers(0, 4, (300, 4, 1))
    routes[:, 2] = (routes[:, 0] * 3 + routes[:, 1]) % 4  # layer 2 follows from the two before, and from neither alone
    forecast = Forecast(4, 4)
    walk(forecast, routes)
    assert forecast.precision[NAMES.index("path")] > forecast.precision[NAMES.index("recent")] + 0.1
    for first, second in ((1, 2), (3, 1)):
        forecast.visit(0, np.array([[first]]))
        forecast.visit(1, np.array([[second]]))
        soonest = forecast.expected()
        assert soonest[2].argmin() == (first * 3 + second) % 4
        assert np.unravel_index(soonest.argmin(), soonest.shape)[0] == 2


@pytest.mark.parametrize("right", [True, False])
def test_the_next_router_counts_as_much_as_it_was_right(right: bool) -> None:
    rng = np.random.default_rng(1)
    routes = rng.integers(0, 8, (200, 2))
    said = routes[:, 1] if right else rng.integers(0, 8, 200)
    forecast = Forecast(2, 8)
    for (first, second), guess in zip(routes, said, strict=True):
        forecast.visit(0, np.array([[first]]))
        forecast.hint(1, np.eye(8, dtype=np.float32)[guess])
        soonest = forecast.expected()[1]
        forecast.visit(1, np.array([[second]]))
    measured = forecast.precision[NAMES.index("router")]
    assert measured > 0.95 if right else measured < 0.3
    others = np.delete(soonest, guess)
    assert (soonest[guess] < 2 and others.min() > 10) if right else soonest[guess] > 5


def test_what_is_near_and_frequent_is_expected_sooner() -> None:
    forecast = Forecast(4, 8)
    for _ in range(100):
        for layer in range(4):
            forecast.visit(layer, np.array([[0, 1]]))
    soonest = forecast.expected()
    assert soonest[0, 0] < soonest[2, 0] < soonest[3, 0] < soonest[0, 7]
    forecast.visit(0, np.array([[0, 1]]))
    soonest = forecast.expected()
    assert soonest[1, 0] < soonest[3, 0]
    assert soonest[2, 0] < soonest[3, 0] < soonest[0, 7]


def test_many_rows_need_what_any_of_them_needs() -> None:
    forecast = Forecast(2, 8)
    rng = np.random.default_rng(0)
    for _ in range(40):
        for layer in range(2):
            forecast.visit(layer, np.argsort(rng.random((64, 8)), axis=1)[:, :2])
    soonest = forecast.expected()
    assert np.allclose(soonest[0], 1, atol=0.1)
    assert np.allclose(soonest[1], 2, atol=0.1)


def test_rates_stay_rates() -> None:
    forecast = Forecast(6, 16)
    walk(forecast, made_up(200, 6, 16))
    assert (forecast.expected() >= 1).all()
    assert np.isfinite(forecast.expected()).all()
    assert ((forecast.precision >= 0) & (forecast.precision <= 1)).all()
