"""What formats cost: `python bench/formats.py [--work FOLDER] [--formats int4 int4-fast int8 mixed] [--chunk N]`.

A worker's executor in this process, without lanes and sampling: milliseconds of a prompt in steps of at most `--chunk`
rows, and of a decoded token after it. All formats are loaded at once and measured by turns; medians over rounds. On a
busy machine `--threads 1 --cpu` counts the seconds of the processor instead of those of the wall.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is loaded
sys.path[:0] = [str(Path(__file__).resolve().parent)]

import psutil  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from shapes import SHAPES, write_checkpoint  # noqa: E402

from ganglion.agent.executor.embedding import EmbeddingTable  # noqa: E402
from ganglion.agent.executor.executor import Executor  # noqa: E402
from ganglion.agent.executor.loader import load_shard, start_runtime  # noqa: E402
from ganglion.agent.roles import Role  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.partitioner.journal import code_digest  # noqa: E402
from ganglion.wire.limits import MANIFEST_BYTES  # noqa: E402
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest, from_json, to_json  # noqa: E402

CONTEXT = 2048
DEVICE = "a" * 26


class Loaded:
    """One device with the whole of `manifest`, its files below `folder`."""

    def __init__(self, manifest: Manifest, store: PieceStore, folder: Path, threads: int, chunk: int) -> None:
        g = manifest.geometry
        start_runtime(threads)
        ranges = (Range(0, count) for count in (g.head_groups, g.column_groups, g.vocab_groups))
        share = Share(device=DEVICE, **dict(zip(("heads", "columns", "vocab"), ranges, strict=True)))
        stage = Stage(layers=Range(0, g.layers), shares=(share,), topology="mesh")
        plan = Plan(
            manifest_digest=digest(manifest),
            numeric_class=manifest.numeric_class,
            context=CONTEXT,
            sessions=4,
            chunk=chunk,
            stages=(stage,),
            threads={DEVICE: threads},
        )
        before = psutil.Process().memory_info().rss
        shard = load_shard(
            manifest, stage, share, open_piece=store.open, folder=folder, progress=lambda done, total: None
        )
        self.executor = Executor(manifest, plan, shard, store.open)
        self.embedding = EmbeddingTable(manifest, store.open)
        self.mixed = bool(manifest.prompt_layers)
        self.name = manifest.numeric_class.name
        self.chunk, self.vocab = chunk, g.vocab
        self.resident_bytes = psutil.Process().memory_info().rss - before
        self.weights_bytes = shard.weights_bytes

    def _step(self, start: int, count: int, role: Role) -> None:
        executor = self.executor
        batch = executor.begin([(1, start, count)], role if self.mixed else "any")
        ids = [(7 * at + 11) % self.vocab for at in range(start, start + count)]
        self.embedding.rows(ids, executor.residual(batch))
        for index in range(executor.segments):
            executor.run(batch, index)
        executor.logits(batch, [count - 1])

    def round(self, prompt: int, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
        """(milliseconds of a prompt of so many tokens, of each of so many tokens after it)."""
        began = clock()
        for start in range(0, prompt, self.chunk):
            self._step(start, min(self.chunk, prompt - start), "prompt")
        between = clock()
        each = []
        for at in range(prompt, prompt + tokens):
            before = clock()
            self._step(at, 1, "generated")
            each.append(clock() - before)
        self.executor.close(1)
        return (between - began) * 1e3, statistics.median(each) * 1e3


def cut(checkpoint: Path, store: PieceStore, name: str, work: Path) -> Manifest:
    """The manifest of a format ("-fast" behind it for a fast class), of an earlier run of this code or cut now."""
    kept = work / f"{checkpoint.name}-{name}-{code_digest()[:12]}.json"
    if not kept.exists():
        weights, _, fast = name.partition("-")
        kind = numeric_class(checkpoint, weights, fast=bool(fast))  # type: ignore[arg-type]
        kept.write_bytes(to_json(partition(checkpoint, store, name=name, numeric_class=kind)))
    return from_json(Manifest, kept.read_bytes(), limit_bytes=MANIFEST_BYTES)


def main() -> None:
    """Cut what is not cut, load everything, measure by turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--work", type=Path, help="where the checkpoint and its pieces are kept between runs")
    parser.add_argument("--formats", nargs="+", default=["int4", "int4-fast", "int8", "mixed"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--chunk", type=int, nargs="+", default=[256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="count the processor's time; with --threads 1 only")
    chosen = parser.parse_args()
    clock = time.thread_time if chosen.cpu else time.perf_counter
    with tempfile.TemporaryDirectory(prefix="ganglion-bench-", dir=chosen.work) as scratch:
        work = chosen.work or Path(scratch)
        checkpoint = write_checkpoint(work, chosen.shape, demo_path("demo"))
        store = PieceStore(work / "store")
        loaded = []
        for name in chosen.formats:
            manifest = cut(checkpoint, store, name, work)
            loaded += [
                Loaded(manifest, store, Path(scratch) / f"{name}-{chunk}", chosen.threads, chunk)
                for chunk in chosen.chunk
            ]
        found: list[list[tuple[float, float]]] = [[] for _ in loaded]
        for one in loaded:
            one.round(min(64, chosen.prompt), 2, clock)
        for _ in range(chosen.rounds):
            for one, rounds in zip(loaded, found, strict=True):
                rounds.append(one.round(chosen.prompt, chosen.tokens, clock))
    heads = ("class", "chunk", f"prompt of {chosen.prompt}, ms", "tokens/s", "ms/token", "weights MB", "resident MB")
    table = Table(*heads)
    for one, rounds in zip(loaded, found, strict=True):
        prompt_ms, token_ms = (statistics.median(part) for part in zip(*rounds, strict=True))
        rate = chosen.prompt / prompt_ms * 1e3
        sizes = (f"{one.weights_bytes / 1e6:.0f}", f"{one.resident_bytes / 1e6:.0f}")
        table.add_row(one.name, str(one.chunk), f"{prompt_ms:.0f}", f"{rate:.0f}", f"{token_ms:.1f}", *sizes)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
