"""`experts train`: a gate from the outcomes that this machine's gateway has logged."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ganglion.cli import output
from ganglion.cli.experts.outcomes import gateway_of
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption, JsonOption
from ganglion.cli.runner import command

if TYPE_CHECKING:
    from ganglion.gateway.experts.gate_training import Example, GateWeights
    from ganglion.gateway.experts.learning import Weigh
    from ganglion.wire.home import Home

EPOCHS: Final = 40
HOW: Final = (
    "let several experts answer for a while: ganglion experts log on, and a class with --combine vote or rerank"
    " (ganglion experts budget)"
)


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    command(app, "train")(experts_train)


async def experts_train(
    epochs: Annotated[int, typer.Option("--epochs", min=1, max=1000, help="Passes over the outcomes.")] = EPOCHS,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same outcomes and seed give the same gate.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Put it in the place of one that is right more often.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the gate, which says how good each expert is for a prompt, from logged outcomes.

    Nothing leaves this machine. A fifth of the prompts is held out: on it the new gate is compared with the one in
    force. A running gateway goes by the new one at once.
    """
    import asyncio

    from ganglion.gateway.experts.gate import GATE_FOLDER, FolderGate, PriorGate
    from ganglion.gateway.experts.gate_file import write_gate
    from ganglion.gateway.experts.gate_training import run, train
    from ganglion.gateway.experts.learning import agreement, split
    from ganglion.wire.home import make_private_folder

    root = root_of(home)
    place = gateway_of(root)
    domains = await _domains(root)
    examples, count = _examples(place, domains)
    answered = Counter(name for example in examples for name in example.quality)
    names = sorted(answered)
    learning, held = split(examples)
    _refuse_few(count, examples, learning, names)
    output.step(
        f"{count} outcomes, {len(examples)} of which compare experts: "
        + ", ".join(f"{name} ({answered[name]})" for name in names)
    )
    untried = sorted(domains.keys() - answered.keys())
    if untried:
        output.warn(f"none has an answer of {', '.join(untried)}: weighed by domains until there are some")

    folder = make_private_folder(place.path / GATE_FOLDER)
    before = await asyncio.to_thread(FolderGate, folder, PriorGate(lambda name: domains.get(name, ())))
    with _bar(epochs) as progress:
        weights = await asyncio.to_thread(train, learning, names, epochs=epochs, seed=seed, progress=progress)
    was, judged = agreement(held, lambda text, among: before.weigh(text, among).weights)
    now, _ = agreement(held, _weigher(weights, run))
    worse = judged > 0 and now < was
    if not worse or force:
        await asyncio.to_thread(write_gate, folder, weights, examples)
    if as_json:
        output.answer_json(
            {
                "outcomes": count,
                "examples": len(examples),
                "answers": dict(sorted(answered.items())),
                "held_out": judged,
                "agreement_before": was if judged else None,
                "agreement": now if judged else None,
                "written": not worse or force,
            }
        )
        return
    if judged:
        output.step(f"of {judged} prompts held out the best expert comes first in {now:.0%}; before in {was:.0%}")
    else:
        output.warn("no prompt that was held out tells experts apart: how good the gate is was not measured")
    if worse and not force:
        output.warn("the gate before is right more often and stays; --force puts the new one in its place")
    else:
        output.step(f"the gate is in {folder}; a running gateway goes by it")


def _examples(place: Home, domains: Mapping[str, Sequence[str]]) -> tuple[list[Example], int]:
    """What the log says of the experts that there are (of all, where that is not known), and its outcomes."""
    from ganglion.gateway.experts.gate_training import Example
    from ganglion.gateway.experts.learning import example_of
    from ganglion.gateway.experts.outcomes import read_outcomes

    count, found = 0, []
    for outcome in read_outcomes(place):
        count += 1
        example = example_of(outcome)
        if example is None:
            continue
        quality = {name: each for name, each in example.quality.items() if not domains or name in domains}
        if quality:
            found.append(Example(example.text, quality))
    return found, count


def _refuse_few(count: int, examples: Sequence[Example], learning: Sequence[Example], names: Sequence[str]) -> None:
    from ganglion.gateway.experts.gate_file import EXPERTS
    from ganglion.gateway.experts.gate_training import LEAST_EXAMPLES
    from ganglion.wire.errors import InvalidRequest

    if len(learning) < LEAST_EXAMPLES:
        raise InvalidRequest(
            f"{count} outcomes are logged, {len(examples)} of them compare experts, and {len(learning)} remain when a"
            f" fifth of the prompts is held out; at least {LEAST_EXAMPLES} are needed: {HOW}"
        )
    if not 2 <= len(names) <= EXPERTS:
        raise InvalidRequest(
            f"the outcomes are of {len(names)} experts ({', '.join(names[:4])}); a gate is trained on 2 to {EXPERTS}:"
            f" {HOW}"
        )


async def _domains(root: Path) -> dict[str, tuple[str, ...]]:
    """Of every expert of the fleet; empty where its coordinator cannot be asked."""
    from ganglion.cli.admin import admin
    from ganglion.wire.errors import GanglionError

    try:
        async with admin(root) as line:
            state = await line.fleet()
    except GanglionError as error:
        output.warn(f"the fleet's experts are not known now, so every one in the log is taken: {error.message}")
        return {}
    return {each.spec.name: tuple(each.spec.domains) for each in state.experts}


def _weigher(weights: GateWeights, run: Callable[[GateWeights, str], tuple[Any, Any]]) -> Weigh:
    def weigh(text: str, among: Sequence[str]) -> dict[str, float]:
        found = dict(zip(weights.experts, run(weights, text)[0].tolist(), strict=True))
        return {name: found[name] for name in among}

    return weigh


@contextlib.contextmanager
def _bar(epochs: int) -> Iterator[Callable[[int, float], None]]:
    """Epochs and the loss on standard error, where somebody watches."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = output.notes()
    columns = (
        TextColumn("  training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=epochs)
        yield lambda done, loss: progress.update(task, completed=done, description=f"loss {loss:.4f}")
