"""One mixture on two devices of one thread: whole on one, its columns shared, its experts shared.

Real worker processes on plans that are made by hand, sealed lanes on loopback, greedy answers; what is compared takes
turns within each round, and figures are medians over the rounds. Tokens of one cut in an exact class must be equal on
any number of devices, or the run ends. Bytes are those that the lead's lanes count, both ways, between an answer of one
token and the whole one; beside them what ganglion.wire.routed counts from the routes of the same tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]

from mixtures import write_mixture  # noqa: E402
from worker_processes import Answered, Workers, new_world  # noqa: E402

from ganglion.agent.exchange.assign import Holders, assign, speeds_of  # noqa: E402
from ganglion.agent.executor.embedding import EmbeddingTable  # noqa: E402
from ganglion.agent.executor.executor import Executor  # noqa: E402
from ganglion.agent.executor.loader import load_shard, start_runtime  # noqa: E402
from ganglion.agent.store import ManifestShelf, PieceStore  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.wire.identity import Identity  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest  # noqa: E402
from ganglion.wire.nouns.plan import Payload  # noqa: E402
from ganglion.wire.routed import token_bytes  # noqa: E402
from ganglion.wire.shares import every_expert, whole_share  # noqa: E402

Cut = Literal["columns", "whole"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `parallel`."""
    parser.add_argument("--work", type=Path, required=True, help="where checkpoint and pieces are kept")
    parser.add_argument("--shape", default="middle", help="of a random mixture, see bench/mixtures.py")
    parser.add_argument("--checkpoint", type=Path, help="a mixture that stands, in place of a random one")
    parser.add_argument("--weights", default="int4", choices=("fp32", "int4", "int8"))
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--payload", default="full", choices=("full", "fp16", "int8"), help="of a fast class")
    parser.add_argument("--lanes", default="auto", choices=("auto", "grpc", "socket"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt whose first token is timed")


@dataclass(slots=True)
class Setting:
    """A way to run the model, and what was found of it."""

    name: str
    cut: Cut
    plan: Plan
    nodes: Sequence[Identity]
    workers: Workers
    tpot_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    token_bytes: list[float] = field(default_factory=list)


def plan_of(manifest: Manifest, nodes: Sequence[Identity], *, payload: Payload, by_experts: bool) -> Plan:
    """Columns and heads in equal parts, or everything but experts on the first and experts in turn."""
    layers = Range(0, manifest.geometry.layers)
    ids = [one.node_id for one in nodes]
    whole = whole_share(manifest, ids[0], layers)
    if len(ids) == 1:
        shares: tuple[Share, ...] = (whole,)
    elif by_experts:
        none = Range(0, 0)
        held = [
            tuple(numbers[rank :: len(ids)] for numbers in every_expert(manifest.layers)) for rank in range(len(ids))
        ]
        shares = tuple(
            Share(
                device=one,
                heads=none if rank else whole.heads,
                columns=none if rank else whole.columns,
                vocab=none if rank else whole.vocab,
                experts=held[rank],
            )
            for rank, one in enumerate(ids)
        )
    else:
        shares = tuple(
            Share(
                device=one,
                heads=_part(whole.heads, rank, len(ids)),
                columns=_part(whole.columns, rank, len(ids)),
                vocab=_part(whole.vocab, rank, len(ids)),
            )
            for rank, one in enumerate(ids)
        )
    return Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=1024,
        sessions=1,
        kv_tokens=1024,
        chunk=256,
        stages=(Stage(layers=layers, shares=shares, topology="star" if by_experts else "mesh"),),
        threads=dict.fromkeys(ids, 1),
        payload=payload if len(ids) > 1 else "full",
    )


def _part(groups: Range, rank: int, devices: int) -> Range:
    edges = [groups.count * each // devices for each in (rank, rank + 1)]
    return Range(edges[0], edges[1])


def routes_of(manifest: Manifest, store: PieceStore, ids: Sequence[int], folder: Path) -> dict[int, Any]:
    """The experts of every token of `ids` by layer, [tokens, k], from a run in this process."""
    plan = plan_of(manifest, [_Nobody()], payload="full", by_experts=False)  # type: ignore[list-item]
    (stage,) = plan.stages
    shard = load_shard(manifest, stage, stage.shares[0], open_piece=store.open, folder=folder, progress=lambda *_: None)
    executor = Executor(manifest, plan, shard, store.open)
    found: dict[int, list[Any]] = {}
    executor.on_routes = lambda layer, chosen: found.setdefault(layer, []).append(chosen.copy())
    embedding = EmbeddingTable(manifest, store.open)
    for start in range(0, len(ids), plan.chunk):
        some = ids[start : start + plan.chunk]
        batch = executor.begin([(1, start, len(some))])
        embedding.rows(some, executor.residual(batch))
        for index in range(executor.segments):
            executor.run(batch, index)
    return {layer: np.concatenate(chosen) for layer, chosen in found.items()}


class _Nobody:
    node_id = "a" * 26


def counted_bytes(manifest: Manifest, plan: Plan, routes: dict[int, Any], tokens: slice) -> float:
    """Bytes per token by the count, over those of `tokens`."""
    (stage,) = plan.stages
    speeds = speeds_of(stage)
    touched: list[list[list[int]]] = []
    for layer, chosen in sorted(routes.items()):
        held = [share.experts[layer] for share in stage.shares]
        holders = Holders.of(held, max(max(numbers, default=-1) for numbers in held) + 1)
        ranks = [assign(row[None], holders, speeds)[0] for row in chosen[tokens]]
        touched.append([[count for count in np.bincount(row, minlength=2)[1:].tolist() if count] for row in ranks])
    hidden, exact = manifest.geometry.hidden, manifest.numeric_class.exact
    each = [
        token_bytes(layers, len(stage.shares), hidden, exact=exact, payload=plan.payload)
        for layers in zip(*touched, strict=True)
    ]
    return sum(each) / len(each)


class Run:
    """The cut models and the settings over them."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        work: Path = chosen.work
        work.mkdir(parents=True, exist_ok=True)
        self.checkpoint = chosen.checkpoint or write_mixture(work, chosen.shape, demo_path("demo"))
        self.world = new_world()
        self.settings: list[Setting] = []
        self.cuts: dict[Cut, tuple[Manifest, PieceStore]] = {}

    def cut(self, how: Cut) -> tuple[Manifest, PieceStore]:
        """The checkpoint cut so, from the work folder if it stands there."""
        if how not in self.cuts:
            chosen = self.chosen
            kind = numeric_class(self.checkpoint, chosen.weights, fast=chosen.fast)
            store = PieceStore(chosen.work / f"{self.checkpoint.name}-{kind.name}-{how}")
            shelf = ManifestShelf(store.path)
            if not shelf.digests():
                shelf.put(partition(self.checkpoint, store, name="bench", numeric_class=kind, experts=how))
            self.cuts[how] = shelf.get(shelf.digests()[0]), store
        return self.cuts[how]

    async def start(self, name: str, how: Cut, devices: int, folder: Path) -> None:
        """Start a setting."""
        manifest, store = self.cut(how)
        nodes = [self.world.node() for _ in range(devices)]
        plan = plan_of(manifest, nodes, payload=self.chosen.payload, by_experts=how == "whole" and devices > 1)
        (folder / name).mkdir()
        workers = await Workers.start(self.world, folder / name, store.path, manifest, plan, nodes, self.chosen.lanes)
        self.settings.append(Setting(name, how, plan, nodes, workers))

    async def measure(self, folder: Path) -> dict[str, Any]:
        """Every setting in turn, round for round."""
        chosen = self.chosen
        for name, how, devices in (
            ("one-columns", "columns", 1),
            ("one-whole", "whole", 1),
            ("two-tensor", "columns", 2),
            ("two-expert", "whole", 2),
        ):
            await self.start(name, how, devices, folder)  # type: ignore[arg-type]
        manifest, store = self.cut("whole")
        dice = random.Random(1)
        vocab = manifest.geometry.vocab
        routes: dict[int, Any] = {}
        counted = list[float]()
        try:
            for number in range(chosen.rounds + 1):  # the first is not counted
                prompt = [dice.randrange(3, vocab - 1) for _ in range(chosen.prompt)]
                answers: dict[Cut, Answered] = {}
                for setting in self.settings:
                    alone = await setting.workers.answer(prompt[:16], 1)
                    found = await setting.workers.answer(prompt[:16], chosen.tokens)
                    first = await setting.workers.answer(prompt, 1)
                    if not number:
                        continue
                    setting.tpot_s.append(found.each_s)
                    setting.ttft_s.append(first.first_s)
                    setting.token_bytes.append((found.bytes - alone.bytes) / max(1, len(found.ids) - 1))
                    before = answers.setdefault(setting.cut, found)
                    if manifest.numeric_class.exact and before.ids != found.ids:
                        raise SystemExit(f"{setting.name}: other tokens than on one device")
                if number:
                    ids = prompt[:16] + list(answers["whole"].ids)
                    start_runtime(1)
                    routes = routes_of(manifest, store, ids[:-1], folder)
                    plan = self.settings[-1].plan
                    counted.append(counted_bytes(manifest, plan, routes, slice(16, None)))
                print(f"  round {number} of {chosen.rounds}", file=sys.stderr, flush=True)
        finally:
            for setting in self.settings:
                await setting.workers.close()
        return self.document(manifest, counted)

    def document(self, manifest: Manifest, counted: Sequence[float]) -> dict[str, Any]:
        """What was found."""
        base = self.settings[0]
        found = []
        for setting in self.settings:
            ratios = [one / other for one, other in zip(base.tpot_s, setting.tpot_s, strict=True)]
            found.append(
                {
                    "name": setting.name,
                    "tokens_per_s": 1 / median(setting.tpot_s),
                    "to_first": median(ratios),
                    "ttft_s": median(setting.ttft_s),
                    "bytes_per_token": median(setting.token_bytes),
                }
            )
        return {
            "model": self.checkpoint.name,
            "class": manifest.numeric_class.name,
            "payload": self.chosen.payload,
            "lanes": self.chosen.lanes,
            "rounds": self.chosen.rounds,
            "settings": found,
            "counted_bytes_per_token": median(counted),
        }


def run(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print a table."""
    made = Run(chosen)
    with tempfile.TemporaryDirectory(prefix="workers-", dir=chosen.work) as folder:
        document = asyncio.run(made.measure(Path(folder)))
    print(
        f"{document['model']}, {document['class']}, payload {document['payload']}, lanes {document['lanes']}:"
        f" medians of {document['rounds']} rounds, one thread a device"
    )
    print(f"{'':14}{'tokens/s':>10}{'to first':>10}{'first token':>13}{'bytes/token':>13}")
    for one in document["settings"]:
        print(
            f"{one['name']:14}{one['tokens_per_s']:10.1f}{one['to_first']:10.2f}{one['ttft_s'] * 1e3:10.0f} ms"
            f"{one['bytes_per_token']:13.0f}"
        )
    print(f"experts, by the count: {document['counted_bytes_per_token']:.0f} bytes/token")
    return document
