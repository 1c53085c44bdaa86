"""Rows of branches against a longer chain: `python bench/trees.py [--prompts 6] [--tokens 96] [--format fp32]`.

The demo pair, verifier and device in one process: the device drafts after each outcome, and the verifier runs eight
drafted rows in every pass, as a chain or as a chain with branches where the drafter was least certain. `chosen`: the
device sends a chain of eight and four branches of two, and the verifier runs of them what it predicts to pay. `own`:
the verifier drafts by itself, with the same drafter.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "models")]

from speculation import prompts  # noqa: E402
from verify_session import opening  # noqa: E402

from ganglion.agent import control  # noqa: E402
from ganglion.agent.speculation.drafters import ModelDrafter  # noqa: E402
from ganglion.agent.speculation.engine import Ask, DraftEngine, load_engine  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.agent.worker import Worker  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.proto import identity_pb2, lane_pb2  # noqa: E402
from ganglion.wire.home import Home  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest, to_json  # noqa: E402
from ganglion.wire.prefixes import Prefix  # noqa: E402
from ganglion.wire.sampling.parameters import parse_sampling  # noqa: E402
from ganglion.wire.session import SessionClient  # noqa: E402

CONTEXT, ROWS = 1024, 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A chain, and branches of so many tokens; chosen: by the verifier, of these. own: it drafts them itself."""

    chain: int
    branches: int = 0
    each: int = 0
    chosen: bool = False
    own: bool = False

    @property
    def name(self) -> str:
        beside = f" + {self.branches} x {self.each}" if self.branches else ""
        return f"{'own ' if self.own else ''}{'chosen of ' if self.chosen else ''}{self.chain}{beside}"


SHAPES = (
    Shape(8),
    Shape(7, 1, 1),
    Shape(6, 2, 1),
    Shape(6, 1, 2),
    Shape(5, 3, 1),
    Shape(4, 2, 2),
    Shape(4, 4, 1),
    Shape(8, chosen=True),
    Shape(8, 4, 2, chosen=True),
    Shape(8, own=True),
    Shape(6, 2, 1, own=True),
    Shape(8, chosen=True, own=True),
)


def draft(engine: DraftEngine, ids: Sequence[int], sampling: Any, shape: Shape) -> list[tuple[int, list[int]]]:
    """(tokens of the chain before it, tokens) of the chain and of the branches, the least certain place first."""
    text, seconds = list(ids), list[tuple[float, int, int]]()
    for at in range(shape.chain):
        (guess,) = engine.step([Ask(0, text, sampling, top=2)])
        if not guess.tokens:
            break
        if len(guess.tokens) > 1:
            seconds.append((guess.scores[0] - guess.scores[1], at, guess.tokens[1]))
        text.append(guess.tokens[0])
    chain = text[len(ids) :]
    found = [(0, chain)] if chain else []
    for _, at, token in sorted(seconds)[: shape.branches]:
        branch = [*ids, *chain[:at], token]
        engine.copy(0, 1, len(ids) + at)
        for _ in range(shape.each - 1):
            (guess,) = engine.step([Ask(1, branch, sampling)])
            branch += guess.tokens[:1]
        found.append((at, branch[len(ids) + at :]))
    return found


@dataclass
class Cell:
    """What a shape gave at one temperature."""

    tokens: int = 0
    passes: int = 0
    rows: int = 0
    branched: int = 0
    verify_s: list[float] = field(default_factory=list)


async def answer(
    client: SessionClient, request: lane_pb2.Open, engine: DraftEngine, vocab: int, shape: Shape, cell: Cell
) -> list[int]:
    """One session of the device; its tokens."""
    ids, prefix, rounds = list(request.prompt), Prefix.of(request.prompt), 0
    sampling = parse_sampling(request.sampling, vocab)
    opened = await client.open(request)
    async with contextlib.aclosing(opened.events()) as events:
        async for event in events:
            if event.WhichOneof("body") != "tokens":
                continue
            told, outcome = [token.id for token in event.tokens.tokens], event.tokens.outcome
            ids += told
            prefix, rounds = prefix.through(told), rounds + 1
            if rounds > 1:
                cell.tokens += len(told)
                cell.passes += 1
                cell.rows += outcome.drafted
                cell.branched += outcome.branched
                cell.verify_s.append(outcome.verify_s)
            if shape.own:
                continue
            found = draft(engine, ids, sampling, shape) or [(0, [0])]
            branches = [
                lane_pb2.Branch(parent=prefix.through(found[0][1][:at]).name, tokens=tokens) for at, tokens in found
            ]
            await opened.send_drafts(lane_pb2.Drafts(round=rounds, branches=branches))
    return ids[len(request.prompt) :]


def whole(manifest: Manifest, node: str) -> Plan:
    """A plan of one device, with room for a session and its branches."""
    g = manifest.geometry
    heads, columns, vocab = (Range(0, count) for count in (g.head_groups, g.column_groups, g.vocab_groups))
    share = Share(device=node, heads=heads, columns=columns, vocab=vocab)
    return Plan(
        manifest_digest=digest(manifest),
        numeric_class=manifest.numeric_class,
        context=CONTEXT,
        sessions=2,
        kv_tokens=8 * CONTEXT,
        chunk=256,
        stages=(Stage(layers=Range(0, g.layers), shares=(share,), topology="mesh"),),
        threads={node: 1},
    )


async def main() -> None:
    """Every shape at every temperature, with the same prompts; a token that differs ends the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--format", default="fp32")
    asked = parser.parse_args()
    spec = importlib.util.spec_from_file_location("world", ROOT / "tests" / "wire" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["world"] = module
    spec.loader.exec_module(module)
    world = module.World()
    with tempfile.TemporaryDirectory() as folder:
        lead, device = world.node(), world.node()
        home = Home(Path(folder) / "lead")
        lead.save(home.identity)
        store = PieceStore(home.store)
        target, drafter = (
            partition(demo_path(name), store, name=name, numeric_class=numeric_class(demo_path(name), asked.format))
            for name in ("demo", "demo-drafter")
        )
        events: list[Any] = []
        worker = Worker(events.append)
        await worker.handle(
            control.Load(
                home=str(home.path),
                deployment="demo",
                epoch=1,
                plan=to_json(whole(target, lead.node_id)),
                manifest=to_json(target),
                node_id=lead.node_id,
                bind="127.0.0.1",
                beat_path=str(Path(folder) / "beat"),
            )
        )
        record = lead.record.SerializeToString()
        address = f"127.0.0.1:{events[-1].port}"
        peers = (control.PeerEntry(record=record, address=address, name="lead"),)
        clients = (control.PeerEntry(record=device.record.SerializeToString(), address="", name="device"),)
        await worker.handle(control.Connect(peers=peers, gateways=clients))
        peer = identity_pb2.Peer(record=lead.record, address=address, name="lead")
        client = SessionClient(device, peer, "demo", 1)
        own = load_engine(drafter, store.open, Path(folder) / "own", slots=2, context=CONTEXT)
        worker._lead._speculating._drafter = ModelDrafter(own)  # type: ignore[union-attr]
        engine = load_engine(drafter, store.open, Path(folder) / "engine", slots=2, context=CONTEXT)
        given = prompts(asked.prompts, 128)
        print(f"{asked.format}, {len(given)} prompts, {asked.tokens} tokens each")
        print(f"{'T':>4} {'shape':<18} {'tokens/pass':>11} {'rows/pass':>9} {'branched':>8} {'ms/pass':>8}")
        for temperature in (0.0, 0.7, 1.0):
            expected: dict[int, list[int]] = {}
            for shape in SHAPES:
                cell = Cell()
                speculating = worker._lead._speculating  # type: ignore[union-attr]
                speculating.tree_rows = None if shape.chosen else shape.branches * shape.each
                with contextlib.ExitStack() as stack:
                    if not shape.chosen:
                        wide = "ganglion.agent.speculation.window.best_window"
                        stack.enter_context(patch(wide, lambda *_, most, **__: most))
                    for number, prompt in enumerate(given):
                        request = opening(
                            target,
                            prompt,
                            asked.tokens,
                            terms={"window_tokens": ROWS, "miss": "MISS_DRAFT" if shape.own else "MISS_WAIT"},
                            temperature=temperature,
                            seed=number,
                        )
                        tokens = await answer(client, request, engine, target.geometry.vocab, shape, cell)
                        if expected.setdefault(number, tokens) != tokens:
                            raise SystemExit(f"prompt {number}: other tokens as {shape.name}")
                print(
                    f"{temperature:>4} {shape.name:<18} {cell.tokens / cell.passes:>11.2f}"
                    f" {cell.rows / cell.passes:>9.2f} {cell.branched / cell.passes:>8.0%}"
                    f" {statistics.median(cell.verify_s) * 1e3:>8.2f}",
                    flush=True,
                )
        costs = worker._lead._speculating  # type: ignore[union-attr]
        pass_s = costs._windows.cost.seconds
        print(f"a pass of 1, 9 rows: {pass_s(1) * 1e3:.2f}, {pass_s(9) * 1e3:.2f} ms;", end=" ")
        print(f"a branch more: {costs._branch_cost.seconds(pass_s(1)) * 1e3:.2f} ms")
        await client.close()
        await worker.close()


if __name__ == "__main__":
    asyncio.run(main())
