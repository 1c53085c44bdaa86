"""Processes of bench/speculation.py, in which what computes takes the time of something larger.

    python bench/padded.py worker SETUP     a worker, as its supervisor would start it, perhaps with a drafter
    python bench/padded.py device SETUP     a device that drafts, and opens sessions as it is told

A pass of the target takes `pass_ms` up to `pass_rows` rows and in proportion beyond, and so does a step of a drafter
with its `token_ms` and `step_rows`. What is left after the real computation is waited for where the product computes: a
verifier's pass beside its event loop, which goes on; drafters on theirs, which does not. Where `blocking` is false the
device's loop goes on too, as beside an accelerator. 0 adds nothing. The product has nothing of this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

from ganglion.agent import worker  # noqa: E402
from ganglion.agent.executor.port import StepBatch  # noqa: E402
from ganglion.agent.speculation.drafters import ModelDrafter  # noqa: E402
from ganglion.agent.speculation.engine import Ask, DraftEngine, Guess, load_engine  # noqa: E402
from ganglion.agent.speculation.pilot import Pilot  # noqa: E402
from ganglion.agent.speculation.window import Windows  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.agent.worker_stage import StageRunner  # noqa: E402
from ganglion.wire.home import Home  # noqa: E402
from ganglion.wire.limits import MANIFEST_BYTES  # noqa: E402
from ganglion.wire.nouns import Manifest, from_json  # noqa: E402


def due_s(began_s: float, step_s: float, rows: float) -> float:
    """When a step that began then is over; rows: how many times those that cost no more than one."""
    return began_s + step_s * max(1.0, rows)


def block_until(due: float) -> None:
    """Wait, and do nothing else."""
    time.sleep(max(0.0, due - time.perf_counter()))


async def wait_until(due: float) -> None:
    """Wait, and let the loop go on."""
    await asyncio.sleep(max(0.0, due - time.perf_counter()))


def pad_passes(setup: dict[str, Any]) -> None:
    """From now on a pass of a device that is alone, in this process, takes as long as the setup says."""
    computed, beside, pass_s = StageRunner.forward, StageRunner.run_alone, setup["pass_ms"] / 1e3

    async def forward(self: StageRunner, step: int, batch: StepBatch) -> None:
        began = time.perf_counter()
        await computed(self, step, batch)
        await wait_until(due_s(began, pass_s, batch.rows / setup["pass_rows"]))

    def run_alone(self: StageRunner, batch: StepBatch, rows: Sequence[int]) -> None:
        began = time.perf_counter()
        beside(self, batch, rows)
        block_until(due_s(began, pass_s, batch.rows / setup["pass_rows"]))

    StageRunner.forward = forward  # type: ignore[method-assign]
    StageRunner.run_alone = run_alone  # type: ignore[method-assign]


def drafter_of(setup: dict[str, Any], *, slots: int, number: int = 0) -> DraftEngine:
    """The drafter that a setup names, from the pieces in its home."""
    home = Home(Path(setup["home"]))
    manifest = from_json(Manifest, setup["drafter"].encode(), limit_bytes=MANIFEST_BYTES)
    folder = home.run / f"drafter-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    return load_engine(manifest, PieceStore(home.store).open, folder, slots=slots, context=setup["context"])


def pad_steps(engine: DraftEngine, setup: dict[str, Any]) -> DraftEngine:
    """The engine, each of whose steps blocks for as long as the setup says."""
    computed = engine.step

    def step(asks: Sequence[Ask]) -> list[Guess]:
        began = time.perf_counter()
        found = computed(asks)
        block_until(due_s(began, setup["token_ms"] / 1e3, len(asks) / setup["step_rows"]))
        return found

    engine.step = step  # type: ignore[method-assign]
    return engine


def give_drafter(setup: dict[str, Any]) -> None:
    """From now on a lead in this process has a drafter of its own."""
    load = worker._Loaded.__init__

    def loaded(self: Any, *arguments: Any) -> None:
        load(self, *arguments)
        self.drafter = ModelDrafter(pad_steps(drafter_of(setup, slots=setup["sessions"]), setup))

    worker._Loaded.__init__ = loaded  # type: ignore[method-assign]


def fix_windows(tokens: int) -> None:
    """From now on windows have so many drafted tokens, whatever they are worth, at a verifier and at a device."""
    Windows.choose = lambda self, session, **how: min(tokens, how["most"])  # type: ignore[method-assign]
    Pilot.window = property(lambda self: tokens)  # type: ignore[method-assign, assignment]
    Pilot.enough = lambda self, count, path: count >= tokens  # type: ignore[method-assign]


def main() -> None:
    """Pad, and be what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("worker", "device"))
    parser.add_argument("setup", type=Path)
    chosen = parser.parse_args()
    setup = json.loads(chosen.setup.read_text())
    if setup["fixed"]:
        fix_windows(setup["fixed"])
    if chosen.what == "worker":
        if setup["pass_ms"]:
            pad_passes(setup)
        if setup["drafter"]:
            give_drafter(setup)
        worker.main()
    else:
        import drafting_device

        asyncio.run(drafting_device.serve(setup))


if __name__ == "__main__":
    main()
