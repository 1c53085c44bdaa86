"""`bench`: what a deployment gives on this machine, and beside what people would use instead."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import (
    ApiOption,
    ContextOption,
    DevicesOption,
    ExpertMemoryOption,
    ExpertsOption,
    FastOption,
    FormatOption,
    ForOption,
    HomeOption,
    JsonOption,
    ModeOption,
    NameOption,
    PayloadOption,
    PrefixTokensOption,
    PrivateOption,
    SessionsOption,
    SharesOption,
    TopologyOption,
)
from ganglion.cli.runner import command, until_stopped

if TYPE_CHECKING:
    from ganglion.cli.bench.deployed import Deployed
    from ganglion.cli.bench.rivals import Wanted
    from ganglion.cli.bench.running import Progress, Runner
    from ganglion.cli.deploying import Wish
    from ganglion.cli.sourcing import Source

ROUNDS, QUICK_ROUNDS = 5, 1
TOKENS, QUICK_TOKENS = 64, 16


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    command(app, "bench")(bench)


async def bench(
    model: Annotated[
        str | None,
        typer.Argument(help="As for `run`. Default: the model that is deployed, if it is one.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One round of less: seconds instead of minutes.")] = False,
    only: Annotated[
        str,
        typer.Option(
            "--only",
            help="What to measure, with commas: decode, prefill, concurrent, arrivals, second-turn, memory. Default:"
            " all.",
            show_default=False,
        ),
    ] = "",
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            help="Measure this too, on the same checkpoint, in turns: llama-cpp-python, transformers (bf16 and fp32),"
            " or llama.cpp=FOLDER with its llama-bench. Repeatable.",
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, max=1000, help="Default: 5, with --quick 1.", show_default=False)
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", min=2, max=65536, help="Of an answer. Default: 64, with --quick 16.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, help="Of the prompts, to make a run again. Default: a new one.", show_default=False
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Keep what is written for --against here.", show_default=False),
    ] = None,
    name: NameOption = None,
    weights: FormatOption = None,
    workload: ForOption = None,
    fast: FastOption = False,
    experts: ExpertsOption = None,
    expert_memory: ExpertMemoryOption = None,
    mode: ModeOption = "auto",
    devices: DevicesOption = "",
    shares: SharesOption = "",
    topology: TopologyOption = "auto",
    payload: PayloadOption = "auto",
    context: ContextOption = 0,
    sessions: SessionsOption = 0,
    prefix_tokens: PrefixTokensOption = None,
    private: PrivateOption = False,
    api: ApiOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> int:
    """Measure a deployment on the path that a program takes: tokens a second, latencies, memory, where the time goes.

    A model that is not deployed as asked is deployed for the time of the benchmark; afterwards all is as before.
    Prompts are random token ids, another one each time, and answers greedy and of the full length. Figures are medians
    over the rounds; competitors take turns within each round, with as many threads and as many bits a weight as they
    come in. In exact classes the same prompt must give the same tokens alone and beside others, or the command fails.
    """
    from ganglion.cli.api import require_api
    from ganglion.cli.bench.measures import chosen
    from ganglion.cli.bench.rivals import Wanted
    from ganglion.cli.deploying import Wish

    measures, wanted = chosen(only), [Wanted.of(text) for text in against or ()]
    wish = Wish.of(
        weights=weights, workload=workload, fast=fast, mode=mode, devices=devices, shares=shares, topology=topology,
        payload=payload, context=context, sessions=sessions, prefix_tokens=prefix_tokens, private=private,
        experts=experts, expert_memory=expert_memory,
    )  # fmt: skip
    root = root_of(home)
    base = require_api(root, api)
    seed = secrets.randbits(32) if seed is None else seed
    size = _Size(
        quick, rounds or (QUICK_ROUNDS if quick else ROUNDS), tokens or (QUICK_TOKENS if quick else TOKENS), seed
    )
    documents: list[dict[str, Any]] = []

    async def main() -> None:
        documents.append(await _measured(root, base, model, name, wish, measures, size, wanted, work))

    # A signal cancels, so that what was deployed for the time of the benchmark goes in any case.
    code = await until_stopped(main())
    for document in documents:
        if as_json:
            output.answer_json(document)
        else:
            show(document)
    return code


@dataclass(frozen=True)
class _Size:
    """How much is measured."""

    quick: bool
    rounds: int
    tokens: int
    seed: int


async def _measured(
    root: Path,
    base: str,
    model: str | None,
    name: str | None,
    wish: Wish,
    measures: tuple[str, ...],
    size: _Size,
    wanted: list[Wanted],
    work: Path | None,
) -> dict[str, Any]:
    """Deploy what does not run, run the rounds, and put all back."""
    from ganglion.cli.admin import admin
    from ganglion.cli.bench.asking import asker
    from ganglion.cli.bench.deployed import deployed
    from ganglion.cli.bench.measures import Sizes
    from ganglion.cli.bench.running import Asked, Ours, Runner, Theirs

    async with admin(root) as line, deployed(root, line, model, name=name, wish=wish) as (measured, source):
        sizes = Sizes.of(measured.plan.context, tokens=size.tokens, quick=size.quick)
        with ExitStack() as stack:
            rivals, missing = _rivals(stack, wanted, source, measured, work)
            progress = stack.enter_context(_progress())
            async with asker(base, measured.model) as client:
                ours = Ours(measured.model, measured, client)
                asked = Asked(measures, sizes, size.rounds, size.seed)
                runner = Runner([ours], [Theirs(rival) for rival in rivals], asked, progress)
                await runner.run()
            return document_of(root, runner, missing)


def _rivals(
    stack: ExitStack, wanted: list[Wanted], source: Source | None, measured: Deployed, work: Path | None
) -> Any:
    """(competitors that run, closed with the stack; what is not here)."""
    from ganglion.cli.bench.rivals import Converted, like, open_rivals
    from ganglion.wire.errors import InvalidRequest

    if not wanted:
        return [], []
    if source is None:
        raise InvalidRequest(
            "--against needs the checkpoint: name its folder, file or repository instead of a deployment", param="model"
        )
    if work is None:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ganglion-bench-")))
    work.mkdir(parents=True, exist_ok=True)
    kind = like(measured.plan.numeric_class)
    converted = Converted(source.path, work)
    rivals, missing = open_rivals(wanted, converted, kind, measured.threads, measured.plan.context)
    for rival in rivals:
        stack.callback(rival.close)
    return rivals, missing


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar over the steps, on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = output.notes()
    columns = (TextColumn("  {task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def document_of(root: Path, runner: Runner, missing: list[str]) -> dict[str, Any]:
    """Everything as `--json` has it."""
    from ganglion.cli.bench import report
    from ganglion.cli.bench.machine import machine
    from ganglion.cli.bench.memory import held, workers

    asked = runner.asked
    parts = []
    for ours in runner.ours:
        of = ours.deployed
        here = workers(root, of.deployment, of.epoch) if "memory" in asked.measures else {}
        memory = [
            {"device": name, **((held(here[name]) if name in here else None) or _UNREADABLE)}
            for name in of.document["devices"]
            if "memory" in asked.measures
        ]
        parts.append(report.ours_document(ours, memory, runner.meter.source))
    notes = [note for note in asked.sizes.notes if note.startswith(asked.measures)]
    if "arrivals" in asked.measures and any(ours.deployed.plan.sessions < 2 for ours in runner.ours):
        notes.append("arrivals: the deployment admits one session, a prompt would wait for the stream to end")
    return {
        "machine": machine(),
        "settings": {
            "measures": list(asked.measures),
            "rounds": asked.rounds,
            "tokens": asked.sizes.tokens,
            "seed": asked.seed,
        },
        "ours": parts,
        "against": [report.against_document(runner.ours[0], theirs) for theirs in runner.theirs],
        "missing": missing,
        "checks": runner.checks,
        "notes": notes,
    }


_UNREADABLE: dict[str, Any] = {"resident_bytes": None, "anonymous_bytes": None}


def show(document: dict[str, Any]) -> None:
    """The document for people."""
    from ganglion.cli.bench import report
    from ganglion.cli.bench.machine import machine_line

    output.answer(machine_line(document["machine"]))
    for ours in document["ours"]:
        of = ours["deployment"]
        where = ", ".join(f"{name} ({threads} threads)" for name, threads in of["devices"].items())
        output.answer(
            f"\n{ours['name']}: {of['numeric_class']}, {of['bits_per_weight']:.4g} bits a weight, {of['mode']} on "
            f"{where}; context {of['context']}, {of['sessions']} sessions"
        )
        output.answer_table(report.COLUMNS, report.ours_rows(ours), empty="nothing was measured")
    for theirs in document["against"]:
        bits = f"{theirs['bits_per_weight']:.4g} bits a weight"
        output.answer(
            f"\n{theirs['name']} {theirs['version']}: {theirs['weights']}, {bits}, "
            f"{theirs['threads']} threads, built with {theirs['instructions'] or 'what it does not say'}"
        )
    rows = [row for theirs in document["against"] for row in report.against_rows(document["ours"][0], theirs)]
    if rows:
        output.answer_table(report.AGAINST_COLUMNS, rows, empty="")
    for line in (*document["checks"], *document["notes"], *(f"not compared: {each}" for each in document["missing"])):
        output.answer(line)
    settings = document["settings"]
    output.answer(f"medians of {settings['rounds']} rounds of {settings['tokens']} tokens, seed {settings['seed']}")
