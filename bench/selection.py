"""The selector of edge experts: time, proofs, agreement with brute force: `python bench/selection.py [--instances N]`.

Random instances of several kinds (how qualities and costs hang together, how tight the limits are), 4 to 24 kinds of
requests, for one answer (best) and for answers side by side (coverage). Up to 12 experts every subset is also tried;
from 24 on what counts is the time (of this thread's processor) and how often the optimum is proved within the
selector's work. One thread; no network, no processes.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from ganglion.coordinator.selection.objective import Problem, is_allowed, problem_of, value
from ganglion.coordinator.selection.selector import solve

CLOCK = time.thread_time
KINDS = ("uniform", "domains", "correlated", "alike")
LIMITS = ("tight", "medium", "loose")
SIZES = (12, 24, 64)


def instance(rng: np.random.Generator, kind: str, limits: str, objective: str, experts: int) -> Problem:
    """A random instance. uniform: any quality, any cost. domains: every expert is good at a few kinds. correlated: the
    better the dearer. alike: nearly the same qualities and costs."""
    rows = int(rng.integers(4, 25))
    share = rng.dirichlet(np.ones(rows))
    base = rng.uniform(0.1, 0.7, experts)
    if kind == "uniform":
        quality = rng.uniform(0.0, 0.95, (rows, experts))
        costs = rng.uniform(0.2, 4.0, (2, experts))
    elif kind == "domains":
        home = rng.random((rows, experts)) < 0.15
        quality = np.clip(np.where(home, 0.8, 0.25) + rng.normal(0.0, 0.08, (rows, experts)), 0.0, 1.0)
        costs = rng.lognormal(0.0, 0.8, (2, experts))
    elif kind == "correlated":
        quality = np.clip(base + rng.normal(0.0, 0.08, (rows, experts)), 0.0, 1.0)
        costs = np.vstack([4.0 * base**2 * rng.lognormal(0.0, 0.2, experts), base * rng.lognormal(0.0, 0.5, experts)])
    else:
        quality = np.clip(0.5 + rng.normal(0.0, 0.03, (rows, experts)), 0.0, 1.0)
        costs = rng.uniform(0.9, 1.1, (2, experts))
    members = {"tight": 2.0, "medium": 4.0, "loose": 8.0}[limits]
    if objective == "best":
        return problem_of("best", share, quality, np.zeros((0, experts)), np.zeros(0), most=int(members))
    room = members * np.median(costs, axis=1) * rng.uniform(0.8, 1.2, 2)
    # The chance to be in time spans orders of magnitude: most experts are far inside the limit, some at its edge.
    costs[1] = costs[1] * rng.lognormal(-1.5, 1.5, experts)
    fits = np.all(costs <= room[:, None], axis=0)
    most = int(rng.choice([0, 3, 5])) if limits != "loose" else 0
    return problem_of("coverage", share, quality[:, fits], costs[:, fits], room, most=most)


def brute_force(problem: Problem) -> float:
    """The value of the best of all subsets."""
    everyone = range(problem.experts)
    subsets = (list(each) for size in range(problem.most + 1) for each in itertools.combinations(everyone, size))
    return max(value(problem, subset) for subset in subsets if is_allowed(problem, subset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=20, help="of every kind, limit, objective and size")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    rng = np.random.default_rng(asked.seed)
    table = Table("experts", "objective", "instances", "limits", "median ms", "p95 ms", "worst ms", "nodes", "proved",
                  "to 0.001", "worst gap", "kind of the gap", "brute force")  # fmt: skip
    all_agree = True
    for size, objective, limits in itertools.product(SIZES, ("best", "coverage"), LIMITS):
        (
            times,
            nodes,
            proved,
            gaps,
            agree,
            checked,
        ) = [], [], 0, [(0.0, "")], 0, 0
        for kind in KINDS:
            for _ in range(asked.instances):
                problem = instance(rng, kind, limits, objective, size)
                began = CLOCK()
                found = solve(problem)
                times.append(1e3 * (CLOCK() - began))
                nodes.append(found.nodes)
                proved += found.optimal
                gaps.append((found.gap, kind))
                if size <= 12:
                    checked += 1
                    agree += found.optimal and abs(brute_force(problem) - found.value) <= 1e-9
        count = len(times)
        all_agree &= agree == checked
        gap, kind = max(gaps)
        table.add_row(
            str(size), objective, str(count), limits, f"{statistics.median(times):.1f}",
            f"{np.quantile(times, 0.95):.1f}", f"{max(times):.1f}", f"{statistics.median(nodes):.0f}",
            f"{100 * proved / count:.0f} %", f"{100 * sum(one <= 1e-3 for one, _ in gaps[1:]) / count:.0f} %",
            f"{gap:.4f}", kind, f"{agree} of {checked}" if checked else "-",
        )  # fmt: skip
    Console(width=150).print(table)
    if not all_agree:
        print("a subset was not the best one", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
