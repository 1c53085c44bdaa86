"""What verifying drafted tokens costs: `python bench/widths.py [--work FOLDER] [--classes int4 int8-fast mixed ...]`.

Milliseconds of a pass of one session by its rows (1 + drafted tokens): every segment, the head on all rows, the lead's
draw of each. A worker's executor in this process, without lanes; all classes are loaded at once and take turns, medians
over rounds. `mixed` verifies in the role of generated tokens. Draws: greedy (T=0), T=0.7, T=0.7 with top-p 0.9, from
logits spread as a trained model's are; "flat": T=0.7 from those that random weights give, where most tokens may win.
The tokens drawn of a row must be the same in every width of an exact class. On a busy machine `--threads 1 --cpu`
counts the seconds of the processor instead of those of the wall.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is loaded
sys.path[:0] = [str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
from formats import DEVICE, cut  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shapes import SHAPES, write_checkpoint  # noqa: E402

from ganglion.agent.executor.embedding import EmbeddingTable  # noqa: E402
from ganglion.agent.executor.executor import Batch, Executor  # noqa: E402
from ganglion.agent.executor.loader import load_shard, start_runtime  # noqa: E402
from ganglion.agent.lead.candidates import answer  # noqa: E402
from ganglion.agent.lead.draw import Draw  # noqa: E402
from ganglion.agent.lead.sampler import Drawn, draw_token  # noqa: E402
from ganglion.agent.roles import Role  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.agent.worker_stage import vocab_shares  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest  # noqa: E402
from ganglion.wire.sampling.adjusting import VocabShare  # noqa: E402
from ganglion.wire.sampling.parameters import Sampling  # noqa: E402

SPREAD = 3.5  # the deviation of a trained model's logits is so many times that of random weights
DRAWS = {
    "T=0": (Sampling(), SPREAD),
    "T=0.7": (Sampling(temperature=0.7, seed=7), SPREAD),
    "top-p": (Sampling(temperature=0.7, top_p=0.9, seed=7), SPREAD),
    "flat": (Sampling(temperature=0.7, seed=7), 1.0),
}
CHUNK = 256


class Target:
    """One device with the whole of a model and one session that holds `context` tokens."""

    def __init__(self, name: str, manifest: Manifest, store: PieceStore, folder: Path, chosen: argparse.Namespace):
        g = manifest.geometry
        start_runtime(chosen.threads)
        ranges = (Range(0, count) for count in (g.head_groups, g.column_groups, g.vocab_groups))
        share = Share(device=DEVICE, **dict(zip(("heads", "columns", "vocab"), ranges, strict=True)))
        stage = Stage(layers=Range(0, g.layers), shares=(share,), topology="mesh")
        widest = max(chosen.widths)
        plan = Plan(
            manifest_digest=digest(manifest),
            numeric_class=manifest.numeric_class,
            context=min(g.context, chosen.context + 2 * widest),
            sessions=widest,
            kv_tokens=8192,
            chunk=max(CHUNK, widest),
            stages=(stage,),
            threads={DEVICE: chosen.threads},
        )
        shard = load_shard(
            manifest, stage, share, open_piece=store.open, folder=folder, progress=lambda done, total: None
        )
        self.name = name
        self.exact = manifest.numeric_class.exact
        self.executor = Executor(manifest, plan, shard, store.open)
        self._embedding = EmbeddingTable(manifest, store.open)
        self._mixed, self._vocab = bool(manifest.prompt_layers), g.vocab
        self.share: VocabShare = vocab_shares(manifest, plan)[0]
        self.context = chosen.context
        for start in range(0, self.context, CHUNK):
            self.segments(start, min(CHUNK, self.context - start), "prompt")

    def segments(self, start: int, count: int, role: Role) -> Batch:
        """Run every segment on the rows from `start` on."""
        executor = self.executor
        batch = executor.begin([(1, start, count)], role if self._mixed else "any")
        ids = [(7919 * at + 11) % self._vocab for at in range(start, start + count)]
        self._embedding.rows(ids, executor.residual(batch))
        for index in range(executor.segments):
            executor.run(batch, index)
        return batch

    def head(self, batch: Batch, rows: int) -> NDArray[np.float32]:
        """Raw logits of every row: [rows, vocabulary] float32."""
        return self.executor.logits(batch, range(rows))[:, : self.share.count]

    def draw(self, logits: NDArray[np.float32], sampling: Sampling) -> list[int]:
        """The token of each row, as the lead draws it."""
        found = []
        for at, row in enumerate(logits):
            position, candidates = self.context + at + 1, sampling.candidates
            while True:
                asked = Draw(candidates, sampling.temperature, sampling.seed, position, -1, sampling.mass)
                drawn = draw_token([answer(row, self.share, asked)], sampling, position)
                if isinstance(drawn, Drawn):
                    found.append(drawn.token)
                    break
                candidates = drawn.candidates
        return found


Times = dict[str, list[float]]


def measure(target: Target, rows: int, into: Times, clock: Callable[[], float]) -> dict[str, list[int]]:
    """One pass of so many rows: milliseconds of its parts, and the tokens drawn."""
    began = clock()
    batch = target.segments(target.context, rows, "generated")
    ran = clock()
    logits = target.head(batch, rows)
    done = clock()
    into["segments"].append((ran - began) * 1e3)
    into["head"].append((done - ran) * 1e3)
    drawn = {}
    for name, (sampling, spread) in DRAWS.items():
        given = logits * np.float32(spread)
        before = clock()
        drawn[name] = target.draw(given, sampling)
        into[name].append((clock() - before) * 1e3)
    return drawn


def check(target: Target, widths: Sequence[int], drawn: dict[int, dict[str, list[int]]]) -> int:
    """Tokens of a row compared over widths; raises SystemExit where an exact class gives others."""
    compared = 0
    widest = drawn[max(widths)]
    for rows in widths:
        for name, tokens in drawn[rows].items():
            if target.exact and tokens != widest[name][:rows]:
                raise SystemExit(f"{target.name}: {rows} rows draw other tokens than {max(widths)} do ({name})")
            compared += rows
    return compared if target.exact else 0


def report(target: Target, times: dict[int, Times]) -> tuple[Table, dict[str, Any]]:
    """A table of medians: a line for each width, and how it compares with one row."""
    median = {rows: {name: statistics.median(one) for name, one in parts.items()} for rows, parts in times.items()}
    first = median[min(median)]
    heads = ["rows", *first]
    ways = {name: ("segments", "head", name) for name in ("T=0", "T=0.7")}
    parts = {"segments": ("segments",), "head": ("head",), **ways}
    table = Table(*heads, *(f"pass, {name}" for name in ways), *(f"{name} x" for name in parts), title=target.name)

    def total(found: dict[str, float], names: Sequence[str]) -> float:
        return sum(found[name] for name in names)

    for rows, found in median.items():
        table.add_row(
            str(rows),
            *(f"{found[name]:.2f}" for name in heads[1:]),
            *(f"{total(found, names):.1f}" for names in ways.values()),
            *(f"{total(found, names) / total(first, names):.2f}" for names in parts.values()),
        )
    return table, {"class": target.name, "ms": median}


def main() -> None:
    """Cut what is not cut, load everything, measure by turns, print tables and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where checkpoints and pieces are kept between runs")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--classes", nargs="*", default=["int8", "int8-fast", "int4", "int4-fast", "mixed"])
    parser.add_argument("--small", choices=sorted(SHAPES), default="llama-160m", help="the shape measured in fp32")
    parser.add_argument("--no-small", action="store_true", help="leave fp32 out")
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2, 3, 5, 9, 17])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="count the processor's time; with --threads 1 only")
    chosen = parser.parse_args()
    clock = time.thread_time if chosen.cpu else time.perf_counter
    chosen.widths = sorted(set(chosen.widths))
    with tempfile.TemporaryDirectory(prefix="ganglion-bench-", dir=chosen.work) as scratch:
        work = chosen.work or Path(scratch)
        store = PieceStore(work / "store")
        wanted = [(chosen.shape, name) for name in chosen.classes]
        wanted += [] if chosen.no_small else [(chosen.small, "fp32")]
        targets = []
        for shape, name in wanted:
            manifest = cut(write_checkpoint(work, shape, demo_path("demo")), store, name, work)
            print(f"loading {shape} {name}", file=sys.stderr, flush=True)
            label = f"{shape}, {manifest.numeric_class.name}"
            targets.append(Target(label, manifest, store, Path(scratch) / f"{shape}-{name}", chosen))
        times: list[dict[int, Times]] = [{rows: defaultdict(list) for rows in chosen.widths} for _ in targets]
        compared = 0
        for round_number in range(chosen.rounds + 1):
            for target, found in zip(targets, times, strict=True):
                drawn = {}
                for rows in chosen.widths:
                    into: Times = defaultdict(list) if round_number == 0 else found[rows]
                    drawn[rows] = measure(target, rows, into, clock)
                compared += check(target, chosen.widths, drawn)
    console, document = Console(width=180), []
    for target, found in zip(targets, times, strict=True):
        table, figures = report(target, found)
        console.print(table)
        document.append(figures)
    print(f"equal tokens of exact classes over widths: {compared} compared")
    print(f"{chosen.rounds} rounds, {chosen.threads} threads, load {os.getloadavg()}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
