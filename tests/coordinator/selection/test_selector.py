"""The selector against the dumb reference: every subset."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from ganglion.coordinator.selection.bounds import best_bound
from ganglion.coordinator.selection.coverage import Nodes, coverage_bounds, coverage_children
from ganglion.coordinator.selection.objective import (
    Problem,
    State,
    dominators,
    is_allowed,
    log_miss,
    problem_of,
    value,
)
from ganglion.coordinator.selection.selector import PROVED, solve

SEEDS = range(200)


def random_problem(seed: int, experts: int | None = None) -> Problem:
    """Any objective, alike or specialised experts, tight to loose limits, ties and dominated experts."""
    rng = np.random.default_rng(seed)
    count = experts or int(rng.integers(1, 13))
    rows = int(rng.integers(1, 25))
    share = rng.dirichlet(np.full(rows, 0.7))
    if seed % 4 == 0:
        quality = rng.uniform(0.0, 1.0, (rows, count))
    elif seed % 4 == 1:
        quality = np.where(rng.random((rows, count)) < 0.2, 0.9, 0.2) + rng.uniform(-0.1, 0.1, (rows, count))
    elif seed % 4 == 2:
        quality = np.clip(rng.uniform(0.1, 0.8, count) + rng.normal(0.0, 0.03, (rows, count)), 0.0, 1.0)
    else:
        quality = rng.integers(0, 3, (rows, count)) / 2.0  # many ties
    costs = rng.lognormal(0.0, 0.7, (2, count)) if seed % 3 else rng.integers(1, 4, (2, count)).astype(float)
    limits = costs.max(axis=1) * rng.uniform(1.0, 5.0, 2)
    limits[rng.random(2) < 0.3] = np.inf
    most = int(rng.integers(0, count + 1))
    if seed % 2:
        return problem_of("best", share, quality, np.zeros((0, count)), np.zeros(0), most=most)
    return problem_of("coverage", share, quality, costs, limits, most=most)


def subsets(problem: Problem) -> list[list[int]]:
    everyone = range(problem.experts)
    found = (list(each) for size in range(problem.most + 1) for each in itertools.combinations(everyone, size))
    return [each for each in found if is_allowed(problem, each)]


@functools.cache
def best_value(seed: int) -> float:
    problem = random_problem(seed)
    return max(value(problem, each) for each in subsets(problem))


@pytest.mark.parametrize("cells", [40_000, 0], ids=["as it is", "tree alone"])
def test_it_equals_brute_force(cells: int) -> None:
    nodes = 0
    for seed in SEEDS:
        problem = random_problem(seed)
        found = solve(problem, work=100_000, subset_cells=cells)
        best = best_value(seed)
        assert is_allowed(problem, list(found.members)), seed
        assert found.value == pytest.approx(best, abs=1e-9), seed
        assert found.optimal, seed
        nodes += found.nodes
    assert nodes > (0 if cells else len(SEEDS) // 2)  # the tree was climbed


def test_without_time_the_gap_is_honest() -> None:
    open_gaps = 0
    for seed in range(0, 40, 2):
        problem = random_problem(seed, experts=10)
        best = max(value(problem, each) for each in subsets(problem))
        found = solve(problem, work=0, subset_cells=0)
        assert found.value <= best + 1e-9 <= found.bound + 2e-9, seed
        assert found.optimal == (found.gap <= PROVED)
        open_gaps += not found.optimal
    assert open_gaps > 0


def test_the_same_problem_has_the_same_answer() -> None:
    problem = random_problem(8, experts=12)
    assert len({solve(problem) for _ in range(3)}) == 1


def test_no_experts_no_subset() -> None:
    problem = problem_of("best", np.ones(1), np.zeros((1, 0)), np.zeros((0, 0)), np.zeros(0), most=0)
    assert solve(problem).members == ()


def test_members_that_add_nothing_are_left_out() -> None:
    quality = np.array([[0.9, 0.9, 0.2], [0.1, 0.1, 0.8]])
    problem = problem_of("best", np.array([0.5, 0.5]), quality, np.zeros((0, 3)), np.zeros(0), most=0)
    assert solve(problem).members == (0, 2)  # of equal ones the first


def test_sixty_four_experts_within_the_work() -> None:
    for seed in range(0, 24, 2):
        problem = random_problem(seed, experts=64)
        found = solve(problem)
        assert is_allowed(problem, list(found.members))
        assert found.gap < 0.05


@pytest.mark.parametrize("objective", ["best", "coverage"])
def test_values_are_monotone_and_submodular(objective: str) -> None:
    rng = np.random.default_rng(3)
    problem = problem_of(
        objective, rng.dirichlet(np.ones(5)), rng.random((5, 6)), np.zeros((0, 6)), np.zeros(0), most=0
    )
    everyone = set(range(6))
    for size in range(5):
        for small in itertools.combinations(everyone, size):
            large = [*small, *sorted(everyone - set(small))[:1]]
            for added in everyone - set(large):
                gain = value(problem, [*small, added]) - value(problem, list(small))
                later = value(problem, [*large, added]) - value(problem, large)
                assert gain >= later - 1e-12
                assert later >= -1e-12
                state = State(problem)
                for each in small:
                    state = state.plus(each)
                if small:
                    assert state.value() == pytest.approx(value(problem, list(small)), abs=1e-12)
                    assert state.gains(np.array([added]))[0] == pytest.approx(gain, abs=1e-12)


def test_bounds_hold_at_any_point() -> None:
    for seed in range(40):
        problem = random_problem(seed, experts=7)
        rng = np.random.default_rng(seed)
        everyone = np.arange(7)
        allowed = subsets(problem)
        state = State(problem)
        if problem.objective == "best":
            point = rng.random(problem.share.size)
            best = best_bound(problem, state.left, everyone, problem.most, point, steps=3, enough=0.0)
            bound, each_bound, children = best.bound, best.each, np.ones(7)
        else:
            costs = np.vstack([problem.costs, np.ones((1, 7))])
            room = np.append(np.full(problem.costs.shape[0], 1.0), float(problem.most))
            logs, everybody = log_miss(problem), np.ones((2, 7), np.bool_)
            share, rooms = np.stack([problem.share * state.left] * 2), np.stack([room] * 2)
            nodes = Nodes(share, rooms, everybody, rng.random((2, 7)), rng.random((2, room.size)))
            children = coverage_children(nodes, np.stack([everyone] * 2), logs, costs)[0][1]
            bounds, eaches = coverage_bounds(nodes, logs, costs, steps=3, enough=0.0)
            bound, each_bound = float(bounds[1]), eaches[1]
        for subset in allowed:
            assert value(problem, subset) <= bound + 1e-9
            for each in subset:
                assert value(problem, subset) <= each_bound[each] + 1e-9
            if subset:
                assert value(problem, subset) <= children[min(subset)] + 1e-9


def test_domination_is_a_strict_order() -> None:
    for seed in range(0, 30, 3):
        over = dominators(random_problem(seed, experts=10))
        assert not np.any(over & over.T)
        assert np.all((over @ over)[~over] == 0)  # transitive
