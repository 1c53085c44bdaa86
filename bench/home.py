"""Speculation inside a home: one model over two agents, with and without a drafter: `python bench/home.py [--quick]`.

Two agents of one thread, each at an end of bench/link.py's link (1 ms round trip), share the demo model tensor
parallel: every token costs as many exchanges as there are sums. A drafter at the lead makes one pass, and so one set of
exchanges, of several tokens. Real processes, HTTP, held-out code as prompts; deployments take turns within each round,
figures are medians over prompts and rounds. Tokens are compared; a difference ends the run. It needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from cluster.harness import Cluster, until  # noqa: E402
from link import ADDRESSES, Link  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from speculation import prompts  # noqa: E402

from ganglion.cli.admin import admin  # noqa: E402
from ganglion.cli.api import open_client, stream_of  # noqa: E402
from ganglion.cli.deploying import DRAFTER, Wish, cut, deploy, local_agent, request_of  # noqa: E402
from ganglion.cli.sourcing import Source  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.wire.nouns import Manifest, PlanOptions  # noqa: E402

DRAFTERS = {"none": "", "n-grams": "ngram", "demo-drafter": "model"}
PARTS = ("compute", "exchange", "sample", "draft", "other")


def deploy_all(cluster: Cluster) -> None:
    """The demo model over both agents, once for every drafter, each under a name of its own."""
    agent = local_agent(cluster.home)

    def piece(name: str, wish: Wish) -> Manifest:
        return cut(cluster.home, agent.home, Source(demo_path(name), name, str(demo_path(name))), wish=wish)

    target, drafter = piece("demo", Wish()), piece("demo-drafter", DRAFTER)

    async def begin() -> None:
        async with admin(cluster.home) as line:
            for name, kind in DRAFTERS.items():
                options = PlanOptions(mode="tensor", devices=("near", "far"), topology="mesh", drafter=kind)
                named = msgspec.structs.replace(target, name=name)
                await deploy(line, request_of(named, options, agent, drafter if kind == "model" else None))

    asyncio.run(begin())


async def ask(client: Any, api: str, model: str, prompt: list[int], tokens: int, temperature: float) -> dict[str, Any]:
    """Ids, and where the lead's time went."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": 7,
        "ignore_eos": True, "return_token_ids": True, "return_timings": True,
    }  # fmt: skip
    ids: list[int] = []
    timings: dict[str, Any] = {}
    async for chunk in stream_of(client, api, "completions", body):
        ids += chunk.ids
        timings = chunk.timings or timings
    # The prompt's part is the same everywhere: what is compared is the time of tokens after the first.
    spent = {part: timings[f"{part}_s"] * 1e3 / len(ids) for part in PARTS}
    passes = timings["speculation"]["passes"] / len(ids) if timings.get("speculation") else 1.0
    speed = (len(ids) - 1) / (timings["wall_s"] - timings["ttft_s"])
    return {"ids": ids, "tokens_s": speed, "passes": passes, "spent_ms": spent}


async def measure(cluster: Cluster, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    asked = prompts(chosen.prompts, 96)
    async with open_client() as client:
        for temperature in (0.0, 0.7, 1.0):
            told: dict[str, dict[str, Any]] = {}
            seen: dict[str, list[dict[str, Any]]] = {name: [] for name in DRAFTERS}
            compared = 0
            for number in range(chosen.rounds + 1):  # the first one warms up
                for prompt in asked:
                    told = {
                        name: await ask(client, cluster.api, name, prompt, chosen.tokens, temperature)
                        for name in DRAFTERS
                    }
                    for name, one in told.items():
                        if one["ids"] != told["none"]["ids"]:
                            raise SystemExit(f"bench/home.py: {name}, T={temperature:g}: other tokens than without it")
                        compared += len(one["ids"]) if name != "none" else 0
                        if number:
                            seen[name].append(one)
            found.append(
                {
                    "temperature": temperature,
                    "tokens_s": {
                        name: statistics.median(one["tokens_s"] for one in some) for name, some in seen.items()
                    },
                    "passes": {name: statistics.median(one["passes"] for one in some) for name, some in seen.items()},
                    "spent_ms": {
                        name: {part: statistics.median(one["spent_ms"][part] for one in some) for part in PARTS}
                        for name, some in seen.items()
                    },
                    "compared": compared,
                }
            )
    return found


def show(found: list[dict[str, Any]]) -> None:
    table = Table("T", *(f"{name} tok/s" for name in DRAFTERS), *(f"{name} x" for name in DRAFTERS if name != "none"))
    for one in found:
        speeds = one["tokens_s"]
        table.add_row(
            f"{one['temperature']:g}",
            *(f"{speeds[name]:.1f}" for name in DRAFTERS),
            *(f"{speeds[name] / speeds['none']:.2f}" for name in DRAFTERS if name != "none"),
        )
    Console(width=120).print(table)
    table = Table("T", "drafter", "passes/token", *(f"{part} ms/token" for part in PARTS))
    for one in found:
        for name, spent in one["spent_ms"].items():
            figures = [f"{one['passes'][name]:.2f}", *(f"{spent[part]:.2f}" for part in PARTS)]
            table.add_row(f"{one['temperature']:g}", name, *figures)
    Console(width=120).print(table)
    print(f"{sum(one['compared'] for one in found)} positions compared, all equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--delay-ms", type=float, default=0.5, help="one way")
    parser.add_argument("--mbit", type=float, default=1000.0)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.prompts, chosen.rounds, chosen.tokens = 2, 1, 64
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end with it
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="home-")))
        link = stack.enter_context(Link(chosen.delay_ms / 1e3, chosen.mbit * 125e3))
        print(f"link asked: {chosen.delay_ms:g} ms one way, {chosen.mbit:g} Mbit/s; found: {link.measure()}")
        link.enter(0)
        cluster = stack.enter_context(Cluster(scratch / "cluster"))
        cluster.coordinator("--bind", ADDRESSES[0])
        cluster.gateway()
        cluster.join("near", options=("--bind", ADDRESSES[0], "--threads", "1"))
        program = cluster.program
        cluster.program = [*link.command(1), *program]
        cluster.join("far", options=("--bind", ADDRESSES[1], "--threads", "1"))
        cluster.program = program
        until("measured", lambda: cluster.alive() == ["far", "near"], timeout_s=120)
        deploy_all(cluster)
        found = asyncio.run(measure(cluster, chosen))
    show(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
