"""What the spine costs: `python bench/spine.py [--shape llama-3.2-1b] [--work FOLDER]`; it prints figures and JSON.

Whole stack: real processes, HTTP, sealed sessions, greedy. Bare: an ONNX Runtime loop over the same graphs in a process
of its own. Both alternate in one run, medians over rounds. Run it on an otherwise idle machine.

* one device, exact and fast class: ms per token of the stack against the bare loop;
* two devices of one thread each on loopback, tensor parallel, against one device of one thread;
* where a token's time goes: the lead's own timings, and their sum against the wall.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from cluster.harness import Cluster, until  # noqa: E402
from shapes import SHAPES, write_checkpoint  # noqa: E402

from ganglion.models import demo_path  # noqa: E402
from ganglion.proto import admin_pb2, admin_pb2_grpc, lane_pb2  # noqa: E402
from ganglion.wire import rpc  # noqa: E402
from ganglion.wire.identity import Identity  # noqa: E402
from ganglion.wire.session import SessionClient  # noqa: E402

PROMPT = [5, 17, 3, 200, 41, 99, 7, 12]
PARTS = ("queue_s", "compute_s", "exchange_s", "seal_s", "sample_s", "other_s")


def stack_ms_per_token(api: str, model: str, tokens: int) -> float:
    """Ms per token through HTTP: what `tokens` more tokens add to a request.

    A stream's chunks would not do: ids of a random model beyond the tokenizer have no text, and so no chunk.
    """
    taken_s = []
    for count in (1, tokens + 1):
        body = {"model": model, "prompt": PROMPT, "max_tokens": count, "temperature": 0}
        started = time.perf_counter()
        answer = httpx.post(f"{api}/v1/completions", json=body, timeout=600).raise_for_status().json()
        taken_s.append(time.perf_counter() - started)
        if answer["usage"]["completion_tokens"] != count:
            raise RuntimeError(f"{answer['usage']['completion_tokens']} tokens came of {count}: the model ended early")
    return (taken_s[1] - taken_s[0]) * 1e3 / tokens


def bare_ms_per_token(manifest: Path, store: Path, run: Path, threads: int, tokens: int) -> float:
    """The same of the bare loop, in a process of its own."""
    command = [sys.executable, str(ROOT / "bench" / "bare.py"), str(manifest), str(store), str(run)]
    done = subprocess.run(
        [*command, "--threads", str(threads), "--tokens", str(tokens)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


async def timings(cluster: Cluster, model: str, tokens: int) -> dict[str, float]:
    """The lead's own account of one session, in ms per token, asked for as the gateway does."""
    identity = Identity.load(cluster.home / "gateway" / "identity")
    async with rpc.channel(identity.coordinator, identity, peer="coordinator") as channel:
        stub: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        state = await anext(aiter(stub.Watch(admin_pb2.WatchRequest(once=True))))
    deployment = next(each for each in state.deployments if each.model == model)
    client = SessionClient(identity, deployment.lead, deployment.deployment, deployment.epoch)
    request = lane_pb2.Open(request_id="bench", prompt=PROMPT, max_tokens=tokens)
    request.sampling.top_p = 1.0
    request.sampling.top_logprobs = -1
    found: dict[str, float] = {}
    try:
        async with aclosing(client.run(request)) as events:
            async for event in events:
                if event.HasField("finished"):
                    spent = event.finished.timings
                    found = {part: getattr(spent, part) * 1e3 / tokens for part in (*PARTS, "wall_s")}
    finally:
        await client.close()
    return found


class Bench:
    """One cluster, its models, and the rounds."""

    def __init__(self, cluster: Cluster, checkpoint: Path, work: Path, tokens: int, rounds: int) -> None:
        self.cluster, self.checkpoint, self.work = cluster, checkpoint, work
        self.tokens, self.rounds = tokens, rounds
        self.results: dict[str, Any] = {}

    def deploy(self, name: str, *options: str) -> None:
        """Cut and deploy the checkpoint under `name`."""
        self.cluster.cli("run", str(self.checkpoint), "--name", name, "--context", "512", *options, timeout_s=900)
        stack_ms_per_token(self.cluster.api, name, 8)  # warm

    def manifest(self, name: str, device: str) -> Path:
        """The manifest of a deployed model, from the store of the device that cut it."""
        digest = self.cluster.deployment(name)["manifest_digest"]
        return self.cluster.home / "agents" / device / "store" / "manifests" / f"{digest}.json"

    def against_bare(self, kind: str, device: str, threads: int, *options: str) -> None:
        """Whole stack against the bare loop, alternating."""
        self.deploy(kind, "--mode", "single", "--devices", device, *options)
        store = self.cluster.home / "agents" / device / "store"
        stack, bare, parts = [], [], []
        for _ in range(self.rounds):
            stack.append(stack_ms_per_token(self.cluster.api, kind, self.tokens))
            run = self.work / "bare" / kind
            bare.append(bare_ms_per_token(self.manifest(kind, device), store, run, threads, self.tokens))
            parts.append(asyncio.run(timings(self.cluster, kind, self.tokens)))
        middle = statistics.median
        self.results[kind] = {
            "stack_ms": middle(stack),
            "bare_ms": middle(bare),
            "ratio": middle(a / b for a, b in zip(stack, bare, strict=True)),
            "parts_ms": {part: middle(each[part] for each in parts) for part in parts[0]},
        }
        self.cluster.cli("stop", kind)

    def two_against_one(self, devices: tuple[str, str], *options: str) -> None:
        """Two devices of one thread, tensor parallel, against one, alternating."""
        one, two = devices
        self.deploy("one", "--mode", "single", "--devices", one, *options)
        self.deploy("two", "--mode", "tensor", "--devices", f"{one},{two}", "--topology", "mesh", *options)
        single, double, parts = [], [], []
        for _ in range(self.rounds):
            single.append(stack_ms_per_token(self.cluster.api, "one", self.tokens))
            double.append(stack_ms_per_token(self.cluster.api, "two", self.tokens))
            parts.append(asyncio.run(timings(self.cluster, "two", self.tokens)))
        middle = statistics.median
        kind = self.cluster.deployment("two")["numeric_class"]
        self.results[f"two devices, {kind}"] = {
            "one_ms": middle(single),
            "two_ms": middle(double),
            "speedup": middle(a / b for a, b in zip(single, double, strict=True)),
            "parts_ms": {part: middle(each[part] for each in parts) for part in parts[0]},
        }
        for name in ("one", "two"):
            self.cluster.cli("stop", name)


def show(results: dict[str, Any]) -> None:
    """The figures as tables."""
    table = Table("what", "ms/token", "against", "ms/token", "ratio")
    for name, found in results.items():
        if "bare_ms" in found:
            row = (f"{found['stack_ms']:.1f}", "bare loop", f"{found['bare_ms']:.1f}", f"{found['ratio']:.2f}x")
        else:
            row = (f"{found['two_ms']:.1f}", "one device", f"{found['one_ms']:.1f}", f"{found['speedup']:.2f}x faster")
        table.add_row(name, *row)
    heads = [part.removesuffix("_s") for part in PARTS]
    parts = Table("model", *heads, "sum", "wall", title="where a token's time goes, ms")
    for name, found in results.items():
        spent = found["parts_ms"]
        total = sum(spent[part] for part in PARTS)
        parts.add_row(name, *(f"{spent[part]:.2f}" for part in PARTS), f"{total:.2f}", f"{spent['wall_s']:.2f}")
    console = Console()
    console.print(table)
    console.print(parts)


def main() -> None:
    """Run what was asked for and print tables, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--work", type=Path, help="where the checkpoint is kept between runs (default: a new folder)")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the single device")
    parser.add_argument("--only", choices=("bare", "two"), help="one half of it")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ganglion-bench-", dir=chosen.work) as scratch:
        work = Path(scratch)
        checkpoint = write_checkpoint(chosen.work or work, chosen.shape, demo_path("demo"))
        with Cluster(work / "cluster") as cluster:
            cluster.coordinator()
            cluster.join("whole", options=("--threads", str(chosen.threads)))
            cluster.gateway()
            until("measured", lambda: cluster.alive() == ["whole"])
            bench = Bench(cluster, checkpoint, work, chosen.tokens, chosen.rounds)
            if chosen.only != "two":
                bench.against_bare("int4 exact", "whole", chosen.threads, "--format", "int4")
                bench.against_bare("int4 fast", "whole", chosen.threads, "--format", "int4", "--fast")
            if chosen.only != "bare":
                cluster.roles["whole"].stop()
                cluster.join("left", "right")
                until("measured", lambda: cluster.alive() == ["left", "right"])
                bench.two_against_one(("left", "right"), "--format", "int4", "--fast")
                bench.two_against_one(("left", "right"), "--format", "int4")
            results = bench.results
    if "int4 exact" in results:
        results["exact costs"] = results["int4 exact"]["stack_ms"] / results["int4 fast"]["stack_ms"]
        print(f"exact against fast: {results.pop('exact costs'):.2f}x the time of a token")
    show(results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
