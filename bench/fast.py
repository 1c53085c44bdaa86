"""Deployments side by side, and beside what people would use instead: `python bench/fast.py PART --work FOLDER`.

Real processes, HTTP, sealed lanes, greedy, full answers; everything that is compared takes turns within each round, and
figures are medians over the rounds. Tokens that must be equal (the same prompt in the same exact class, on any plan, in
any batch, and of the bare loop) are compared, and a difference ends the run. Run it on an otherwise idle machine.

  single    one device: int4 exact and fast, against the bare loop over the same graphs and llama.cpp Q4_0
  prefill   one device: int8, prompts of 512 tokens, against llama.cpp Q8_0
  two       two agents of one thread on loopback against one, for each kind of lane; the shares without any exchange,
            and windows of 8 tokens; llama.cpp over RPC and distributed-llama over two processes of one thread
  sessions  one device: int8, eight sessions at once
  chat      one device: the second turn of a chat, and streams while prompts arrive
  link      two agents of one thread in two network namespaces, joined by bench/link.py; needs root
  machine   says only what this machine is
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

from cluster.harness import Cluster, until  # noqa: E402
from link import ADDRESSES, Link  # noqa: E402
from loops import BareLoop  # noqa: E402
from rivals import DistributedLlama, LlamaRpc  # noqa: E402
from shapes import SHAPES, write_checkpoint  # noqa: E402

from ganglion.cli import output, views  # noqa: E402
from ganglion.cli.admin import admin  # noqa: E402
from ganglion.cli.bench import report  # noqa: E402
from ganglion.cli.bench.asking import Asker  # noqa: E402
from ganglion.cli.bench.deployed import Deployed  # noqa: E402
from ganglion.cli.bench.figures import Spread, ratios  # noqa: E402
from ganglion.cli.bench.machine import machine, machine_line  # noqa: E402
from ganglion.cli.bench.measures import Sizes  # noqa: E402
from ganglion.cli.bench.memory import held, workers  # noqa: E402
from ganglion.cli.bench.rivals import Converted, LlamaBench, Rival, Wanted, open_rivals  # noqa: E402
from ganglion.cli.bench.running import Asked, Ours, Runner, Theirs  # noqa: E402
from ganglion.cli.deploying import Wish, cut, deploy, local_agent, request_of  # noqa: E402
from ganglion.cli.sourcing import Source  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.wire.errors import GanglionError  # noqa: E402
from ganglion.wire.nouns import Manifest, PlanOptions, digest  # noqa: E402

EXACT = Wish(weights="int4")
FAST = Wish(weights="int4", fast=True, block=64)  # with float32 scales 4.5 bits a weight, as Q4_0 has
INT8, INT8_FAST = Wish(weights="int8"), Wish(weights="int8", fast=True)


class Bench:
    """One cluster, what is deployed on it, and what it is compared with."""

    def __init__(self, cluster: Cluster, work: Path, chosen: argparse.Namespace, stack: ExitStack) -> None:
        self.cluster, self.work, self.chosen, self.stack = cluster, work, chosen, stack
        self.checkpoint = write_checkpoint(work, chosen.shape, demo_path("demo"))
        self.converted = Converted(self.checkpoint, work)
        self.rivals: list[Rival] = []
        self.missing: list[str] = []
        self._deployed: list[str] = []

    def cut(self, wish: Wish) -> Manifest:
        """The checkpoint in a class, in the store of the first agent here."""
        source = Source(self.checkpoint, self.chosen.shape, str(self.checkpoint))
        return cut(self.cluster.home, local_agent(self.cluster.home).home, source, wish=wish)

    def deploy(self, name: str, manifest: Manifest, **options: Any) -> None:
        """Under a name of its own, so that several plans of one model stand side by side."""
        named = msgspec.structs.replace(manifest, name=name)
        asked = PlanOptions(**{"context": self.chosen.context, **options})

        async def begin() -> None:
            async with admin(self.cluster.home) as line:
                await deploy(line, request_of(named, asked, local_agent(self.cluster.home)))

        asyncio.run(begin())
        self._deployed.append(name)

    def against(self, make: Callable[[], Rival]) -> None:
        """Something to compare with; what is not here is said."""
        try:
            rival = make()
        except GanglionError as error:
            self.missing.append(error.message)
            return
        self.stack.callback(rival.close)
        self.rivals.append(rival)

    def bare(self, manifest: Manifest, **how: Any) -> None:
        """The bare loop over a cut model."""
        store = local_agent(self.cluster.home).home / "store"
        self.against(lambda: BareLoop(store, digest(manifest), self.work, **how))

    def llama_cpp(self, kind: Any, threads: int) -> None:
        """llama.cpp where its folder was named, and what --against names."""
        if self.chosen.llama_cpp is None:
            self.missing.append("llama.cpp: name its folder with --llama-cpp")
        else:
            folder = self.chosen.llama_cpp
            self.against(lambda: LlamaBench(folder, *_spread(self.converted.gguf(kind), kind), threads))
        wanted = [Wanted.of(text) for text in self.chosen.against]
        found, missing = open_rivals(wanted, self.converted, kind, threads, self.chosen.context)
        for rival in found:
            self.stack.callback(rival.close)
        self.rivals += found
        self.missing += missing

    def run(self, measures: Sequence[str], **sizes: Any) -> dict[str, Any]:
        """Measure everything that is deployed, and print it."""
        document = asyncio.run(self._run(tuple(measures), sizes))
        show(document)
        return document

    async def _run(self, measures: tuple[str, ...], sizes: dict[str, Any]) -> dict[str, Any]:
        import httpx

        async with admin(self.cluster.home) as line:
            fleet = await line.fleet()
        names, states = views.names_of(fleet.devices), {state.model: state for state in fleet.deployments}
        plain = Sizes(self.chosen.tokens, (), (), arriving=0, arrivals=0, running=0, turn=0)
        asked = Asked(measures, replace(plain, **sizes), self.chosen.rounds, self.chosen.seed)
        async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
            ours = [
                Ours(name, Deployed.of(states[name], names), Asker(client, self.cluster.api, name))
                for name in self._deployed
            ]
            runner = Runner(ours, [Theirs(rival) for rival in self.rivals], asked, _progress)
            await runner.run()
        found = [report.ours_document(each, self._memory(each.deployed), runner.meter.source) for each in ours]
        return {
            "machine": machine(),
            "rounds": asked.rounds,
            "tokens": self.chosen.tokens,
            "seed": asked.seed,
            "ours": found,
            "to_first": [_to_first(ours[0], each) for each in ours[1:]],
            "ceilings": _ceilings(runner.theirs),
            "against": [[report.against_document(each, theirs) for theirs in runner.theirs] for each in ours],
            "missing": self.missing,
            "checks": runner.checks + _same_as_bare(ours, runner.theirs),
        }

    def _memory(self, of: Deployed) -> list[dict[str, Any]]:
        found = workers(self.cluster.home, of.deployment, of.epoch)
        memory = ((name, held(pid)) for name, pid in sorted(found.items()))
        return [{"device": name, **one} for name, one in memory if one is not None]


def _spread(converted: tuple[Path, float], kind: Any) -> tuple[Path, Any, float]:
    return converted[0], kind, converted[1]


def _progress(what: str, done: int, total: int) -> None:
    print(f"  {done:3d} of {total}  {what}", file=sys.stderr, flush=True)


def _to_first(first: Ours, other: Ours) -> dict[str, Any]:
    """How many times as fast as the first deployment, of each round."""
    if not (first.found.decode and other.found.decode):
        return {"name": other.name, "first": first.name, "decode": None}
    rates = [Spread.of([1 / each.tpot_s for each in one.found.decode]) for one in (other, first)]
    return {"name": other.name, "first": first.name, "decode": ratios(*rates).document}


def _ceilings(theirs: Sequence[Theirs]) -> list[dict[str, Any]]:
    """How many times as fast shares are that never exchange as the whole loop, of each round."""
    found = {each.rival.about.name: each for each in theirs}
    document = []
    for name, each in found.items():
        whole = found.get(name.replace("2 shares, no exchange", "bare loop"))
        if whole is not None and whole is not each:
            rates = [Spread.of([1 / one.tpot_s for one in of.found.decode]) for of in (each, whole)]
            document.append({"name": name, "first": whole.rival.about.name, "decode": ratios(*rates).document})
    return document


def _same_as_bare(ours: Sequence[Ours], theirs: Sequence[Theirs]) -> list[str]:
    """The bare loop's tokens against the stack's of the same class; raises SystemExit where exact ones differ."""
    said = []
    for each in ours:
        numeric = each.deployed.plan.numeric_class
        for loop in theirs:
            if loop.rival.about.name != "bare loop" or loop.rival.about.weights != numeric.name:
                continue
            pairs = zip(each.found.decode, loop.found.decode, strict=True)
            equal = [one.ids == other.ids for one, other in pairs]
            if numeric.exact and not all(equal):
                raise SystemExit(f"{each.name}: the bare loop gives other tokens in the exact class {numeric.name}")
            said.append(f"{each.name} and the bare loop: equal tokens, {sum(equal)} times of {len(equal)}")
    return said


def show(document: dict[str, Any]) -> None:
    """The figures as tables."""
    output.answer(machine_line(document["machine"]))
    for ours, against in zip(document["ours"], document["against"], strict=True):
        of = ours["deployment"]
        where = of["mode"] + " on " + ", ".join(f"{name} ({threads})" for name, threads in of["devices"].items())
        output.answer(f"\n{ours['name']}: {of['numeric_class']}, {of['bits_per_weight']:.4g} bits a weight, {where}")
        output.answer_table(report.COLUMNS, report.ours_rows(ours), empty="nothing was measured")
        rows = [row for theirs in against for row in report.against_rows(ours, theirs)]
        if rows:
            output.answer_table(report.AGAINST_COLUMNS, rows, empty="")
    output.answer("")
    for each in (*document["to_first"], *document["ceilings"]):
        if each["decode"]:
            spread = Spread.of(each["decode"]["rounds"])
            output.answer(f"{each['name']} is {spread.shown(2)} times as fast as {each['first']}")
    for theirs in document["against"][0] if document["against"] else []:
        output.answer(f"{theirs['name']} {theirs['version']}: {theirs['threads']} threads, {theirs['instructions']}")
    for line in (*document["checks"], *(f"not compared: {each}" for each in document["missing"])):
        output.answer(line)


# --- the parts


def start(bench: Bench, *agents: tuple[str, int], lanes: str | None = None) -> None:
    """Agents, each with so many threads, once measured."""
    for name, threads in agents:
        more = () if lanes is None else ("--lanes", lanes)
        bench.cluster.join(name, options=("--threads", str(threads), *more))
    names = {name for name, _ in agents}
    until("measured", lambda: names <= set(bench.cluster.alive()), timeout_s=120)


def single(bench: Bench) -> dict[str, Any]:
    start(bench, ("whole", bench.chosen.threads))
    for name, wish in (("int4 exact", EXACT), ("int4 fast", FAST)):
        manifest = bench.cut(wish)
        bench.deploy(name.replace(" ", "-"), manifest, mode="single")
        bench.bare(manifest, threads=bench.chosen.threads)
    bench.llama_cpp("Q4_0", bench.chosen.threads)
    return bench.run(("decode", "memory"))


def prefill(bench: Bench) -> dict[str, Any]:
    start(bench, ("whole", bench.chosen.threads))
    for name, wish in (("int8-exact", INT8), ("int8-fast", INT8_FAST)):
        bench.deploy(name, bench.cut(wish), mode="single")
    bench.llama_cpp("Q8_0", bench.chosen.threads)
    return bench.run(("prefill",), prompts=(512,))


def two(bench: Bench) -> dict[str, Any]:
    known = "--lanes" in bench.cluster.run("join", "--help").stdout
    manifest = None
    for lanes in ("grpc", "socket") if known else (None,):
        left, right = (f"{end}-{lanes}" if lanes else end for end in ("left", "right"))
        start(bench, (left, 1), (right, 1), lanes=lanes)
        if manifest is None:
            manifest = bench.cut(EXACT if bench.chosen.exact else FAST)
            bench.deploy("one", manifest, mode="single", devices=(left,))
        bench.deploy(
            f"two-{lanes}" if lanes else "two", manifest, mode="tensor", devices=(left, right), topology="mesh"
        )
    assert manifest is not None
    for rows in (1, 8):
        for shares in (1, 2):
            bench.bare(manifest, threads=1, shares=shares, rows=rows)
    chosen = bench.chosen
    if chosen.llama_cpp is None:
        bench.missing.append("llama.cpp over RPC: name its folder with --llama-cpp")
    else:
        for mode in ("layer", "tensor"):
            bench.against(lambda mode=mode: LlamaRpc(chosen.llama_cpp, bench.converted, mode=mode))
    if chosen.distributed_llama is None:
        bench.missing.append("distributed-llama: name its folder with --distributed-llama")
    else:
        bench.against(lambda: DistributedLlama(chosen.distributed_llama, bench.converted, chosen.context))
    return bench.run(("decode",))


def sessions(bench: Bench) -> dict[str, Any]:
    start(bench, ("whole", bench.chosen.threads))
    for name, wish in (("int8-exact", INT8), ("int8-fast", INT8_FAST)):
        bench.deploy(name, bench.cut(wish), mode="single", sessions=8)
    return bench.run(("decode", "concurrent"), sessions=(1, 8))


def chat(bench: Bench) -> dict[str, Any]:
    start(bench, ("whole", bench.chosen.threads))
    manifest = bench.cut(INT8_FAST)
    context = min(4096, manifest.geometry.context)
    bench.deploy("int8-fast", manifest, mode="single", context=context)
    return bench.run(("second-turn", "arrivals"), turn=1000, arriving=context // 2, arrivals=1, running=context // 2)


def over_link(bench: Bench) -> dict[str, Any]:
    """The near agent, coordinator and gateway at one end (where this process is too), the far agent at the other."""
    cluster, link = bench.cluster, bench.chosen.link
    cluster.join("near", options=("--bind", ADDRESSES[0]))
    program = cluster.program
    cluster.program = [*link.command(1), *program]
    cluster.join("far", options=("--bind", ADDRESSES[1]))
    cluster.program = program
    until("measured", lambda: cluster.alive() == ["far", "near"], timeout_s=120)
    # The store of the near agent takes the pieces, whatever the names.
    manifest = bench.cut(EXACT if bench.chosen.exact else FAST)
    bench.deploy("one", manifest, mode="single", devices=("near",))
    bench.deploy("tensor", manifest, mode="tensor", devices=("near", "far"), topology="mesh")
    bench.deploy("pipeline", manifest, mode="pipeline", devices=("near", "far"))
    return bench.run(("decode",))


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "single": single,
    "prefill": prefill,
    "two": two,
    "sessions": sessions,
    "chat": chat,
    "link": over_link,
}


def main() -> None:
    """Run one part and print tables, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "machine"))
    parser.add_argument("--work", type=Path, help="where checkpoint and converted files are kept")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of a single device")
    parser.add_argument("--exact", action="store_true", help="two and link: the exact class")
    parser.add_argument("--llama-cpp", type=Path, help="folder with llama-bench and the rpc server")
    parser.add_argument("--distributed-llama", type=Path, help="folder with dllama")
    parser.add_argument("--against", action="append", default=[], help="single and prefill: as of ganglion bench")
    parser.add_argument("--delay-ms", type=float, default=0.2, help="link: one way")
    parser.add_argument("--mbit", type=float, default=1000.0, help="link: of each direction")
    chosen = parser.parse_args()
    if chosen.part == "machine":
        print(machine_line(machine()))
        return
    if chosen.work is None:
        parser.error("--work is needed")
    chosen.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its processes end with it
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-", dir=chosen.work)))
        bind: tuple[str, ...] = ()
        if chosen.part == "link":
            chosen.link = stack.enter_context(Link(chosen.delay_ms / 1e3, chosen.mbit * 125e3))
            found = chosen.link.measure()
            print(f"link asked: {chosen.delay_ms:g} ms one way, {chosen.mbit:g} Mbit/s; found: {found}")
            chosen.link.enter(0)
            bind = ("--bind", ADDRESSES[0])
        cluster = stack.enter_context(Cluster(scratch / "cluster"))
        cluster.coordinator(*bind)
        cluster.gateway()
        try:
            document = PARTS[chosen.part](Bench(cluster, chosen.work, chosen, stack))
        except GanglionError as error:
            raise SystemExit(f"bench/fast.py: {error.message}") from error
    print(json.dumps(document))


if __name__ == "__main__":
    main()
