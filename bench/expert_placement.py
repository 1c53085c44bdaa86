"""Placing a mixture's experts on several devices: devices touched by a token, by round robin, by load, by programme.

    python bench/expert_placement.py --routes tests/data/routes.npz [--devices 4] [--limit 120] [--json FILE]
    python bench/expert_placement.py --scale [--limit 60]

The file holds `routes` [tokens, layers, chosen] (numbers of experts) and `domains` [tokens]. Half of the tokens, drawn
at random, are placed for; devices touched are counted on the other half too, and there by domain. Devices are alike and
have memory for a part each of the experts; then for a quarter more, which takes replicas. --scale: 128 experts in 48
layers, 8 of a token, made up with as many clusters as devices.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ganglion.partitioner.expert_placement import SLACK, ExpertHost, ExpertLayer, evaluate, place_experts
from ganglion.partitioner.expert_placement_routes import RouteSets, sets_of
from ganglion.partitioner.expert_placement_search import Room, by_load, fair_limits, round_robin

REPORTED_SETS = 256  # of a layer, in a report of routes


@dataclass
class Row:
    """One way to place; touched: devices of a token in a layer, on the tokens placed for, on the others, by domain."""

    name: str
    touched: float
    held_out: float
    by_domain: dict[int, float] = field(default_factory=dict)
    busiest: float = 0.0  # rows of the busiest device, to its fair part, held out
    bound: float | None = None
    proved: bool = False
    seconds: float = 0.0


class Trace:
    """Tokens in two halves."""

    def __init__(self, path: Path) -> None:
        stored = np.load(path)
        self.routes = stored["routes"].astype(np.int64)
        self.domains = stored["domains"]
        self.experts = (
            int(stored["experts"])
            if "experts" in stored and stored["experts"].ndim == 0
            else int(self.routes.max()) + 1
        )
        order = np.random.default_rng(0).permutation(len(self.routes))
        self.first, self.second = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])

    def sets(self, tokens: np.ndarray) -> list[RouteSets]:
        return [sets_of(self.routes[tokens, layer], self.experts) for layer in range(self.routes.shape[1])]


def weigh(trace: Trace, hosts: list[ExpertHost], name: str, held: list[Any], **more: Any) -> Row:
    """Count what a placement touches."""

    def touched(tokens: np.ndarray) -> float:
        return float(np.mean([one.touched for one in evaluate(trace.sets(tokens), held, hosts)]))

    domains = {
        int(domain): touched(trace.second[trace.domains[trace.second] == domain]) for domain in np.unique(trace.domains)
    }
    out = evaluate(trace.sets(trace.second), held, hosts)
    busiest = max(float(one.rows.sum(axis=0).max() / one.rows.sum() * len(hosts)) for one in out)
    return Row(name, touched(trace.first), touched(trace.second), domains, busiest, **more)


def owners(held_by: np.ndarray, devices: int) -> list[list[int]]:
    return [np.flatnonzero(held_by == device).tolist() for device in range(devices)]


def compare(trace: Trace, devices: int, limit_s: float) -> list[Row]:
    placed_for = trace.sets(trace.first)
    room = Room(
        (-(-trace.experts // devices),) * devices,
        trace.experts,
        fair_limits(placed_for[0], (1.0,) * devices, 1e9),
        (1.0,) * devices,
        (1.0,) * devices,
    )
    hosts = [ExpertHost(1.0, 10**9) for _ in range(devices)]
    rows = [
        weigh(trace, hosts, "round robin", [owners(round_robin(one.experts, room), devices) for one in placed_for]),
        weigh(trace, hosts, "load only", [owners(by_load(one, room), devices) for one in placed_for]),
    ]
    layers = [ExpertLayer(1, one) for one in placed_for]
    for spare, slack, what in (
        (0.0, SLACK, ""),
        (0.0, 1.0, ", twice the fair part"),
        (0.25, SLACK, ", 25 % replicas"),
        (0.25, 1.0, ", both"),
    ):
        each = int(trace.experts * (1 + spare)) // devices * len(layers)
        for limit, how in ((0.0, "descent"), (limit_s, "programme")):
            began = time.perf_counter()
            on = [ExpertHost(1.0, each)] * devices
            placed = place_experts(layers, on, spare=spare, slack=slack, time_limit_s=limit)
            seconds = time.perf_counter() - began
            rows.append(
                weigh(
                    trace,
                    hosts,
                    how + what,
                    [one.held for one in placed.layers],
                    seconds=seconds,
                    bound=placed.bound if limit else None,
                    proved=placed.proved and limit > 0,
                )
            )
            for remark in placed.remarks:
                print(f"{how}{what}: {remark}")
    return rows


def made_up(experts: int, layers: int, chosen: int, clusters: int, tokens: int = 2000) -> list[ExpertLayer]:
    """Tokens that prefer the experts of one cluster, another for every layer; only the most frequent sets are known."""
    found = []
    for layer in range(layers):
        random = np.random.default_rng(layer)
        place = random.permutation(experts)
        popular = random.dirichlet(np.full(experts, 2.0))
        routes = np.empty((tokens, chosen), np.int64)
        for token in range(tokens):
            mine = place[np.arange(experts // clusters) + random.integers(clusters) * (experts // clusters)]
            weights = popular.copy()
            weights[mine] *= 1 + 4 * clusters
            routes[token] = random.choice(experts, chosen, replace=False, p=weights / weights.sum())
        counted = sets_of(routes, experts)
        found.append(ExpertLayer(1, RouteSets(experts, counted.sets[:REPORTED_SETS], counted.tokens[:REPORTED_SETS])))
    return found


def scale(console: Console, limit_s: float) -> None:
    layers, devices = made_up(128, 48, 8, 4), 4
    robin = [[list(range(device, 128, devices)) for device in range(devices)]] * len(layers)
    hosts = [ExpertHost(1.0, 32 * len(layers))] * devices
    table = Table("placement", "devices touched", "bound", "gap", "seconds", title="128 experts, 48 layers, 4 devices")
    touched = np.mean([one.touched for one in evaluate([one.routes for one in layers], robin, hosts)])
    table.add_row("round robin", f"{touched:.3f}", "", "", "")
    for limit, how in ((0.0, "descent"), (limit_s, f"programme, {limit_s:.0f} s at most")):
        began = time.perf_counter()
        placed = place_experts(layers, hosts, spare=0.0, time_limit_s=limit)
        took = f"{time.perf_counter() - began:.1f}"
        bound = (f"{placed.bound:.3f}", f"{placed.gap:.0%}") if limit else ("", "")
        table.add_row(how, f"{placed.touched:.3f}", *bound, took)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routes", type=Path, default=Path("tests/data/routes.npz"))
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds of the integer programme, all layers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scale", action="store_true")
    asked = parser.parse_args()
    console = Console()
    if asked.scale:
        scale(console, asked.limit)
        return
    trace = Trace(asked.routes)
    rows = compare(trace, asked.devices, asked.limit)
    robin = rows[0]
    domains = sorted(robin.by_domain)
    tokens, layers, chosen = trace.routes.shape
    table = Table(
        "placement",
        "touched",
        "held out",
        "fewer than round robin",
        "optimum",
        "busiest device",
        "s",
        *(f"domain {domain}" for domain in domains),
        title=f"{trace.experts} experts, {layers} layers, top {chosen}, {asked.devices} devices, {tokens} tokens",
    )
    for row in rows:
        known = "" if row.bound is None else "this" if row.proved else f">= {row.bound:.3f}"
        table.add_row(
            row.name,
            f"{row.touched:.3f}",
            f"{row.held_out:.3f}",
            f"{1 - row.held_out / robin.held_out:.1%}",
            known,
            f"{row.busiest:.2f}",
            f"{row.seconds:.1f}" if row.seconds else "",
            *(f"{row.by_domain[domain]:.3f}" for domain in domains),
        )
    console.print(table)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
