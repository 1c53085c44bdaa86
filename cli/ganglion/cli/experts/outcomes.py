"""`experts log`: whether this machine's gateway keeps what was asked of experts and answered, and what it has kept."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption, JsonOption
from ganglion.cli.runner import command

if TYPE_CHECKING:
    from ganglion.gateway.experts.outcomes import Outcome
    from ganglion.wire.home import Home

COLUMNS: Final = ("TIME", "CLASS", "COMBINE", "ANSWERS", "KEPT", "PROMPT")
PROMPT_CHARACTERS: Final = 48

log_app = typer.Typer(
    no_args_is_help=True,
    help="The log of prompts and answers of requests to experts, from which `experts train` learns. Off as installed.",
)


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(log_app, "on")(log_on)
    command(log_app, "off")(log_off)
    command(log_app, "show")(log_show)
    command(log_app, "clear")(log_clear)
    app.add_typer(log_app, name="log")


def gateway_of(root: Path) -> Home:
    """The gateway's home, where the log and the gate are."""
    from ganglion.cli.owner import gateway_home
    from ganglion.wire.home import Home

    return Home(gateway_home(root))


def log_on(home: HomeOption = None) -> None:
    """Keep prompts and answers of requests to experts in the gateway's home.

    Of everybody who uses it, but not of private requests. A running gateway follows at once.
    """
    from ganglion.gateway.experts.outcomes import set_logging

    place = gateway_of(root_of(home))
    set_logging(place, wanted=True)
    output.step(f"prompts and answers are kept in {place.path / 'experts'}, and go nowhere from there")


def log_off(home: HomeOption = None) -> None:
    """Keep no more of them; what was kept stays until `clear`."""
    from ganglion.gateway.experts.outcomes import set_logging

    set_logging(gateway_of(root_of(home)), wanted=False)
    output.step("prompts and answers are not kept any more; what was kept goes with: ganglion experts log clear")


def log_clear(home: HomeOption = None) -> None:
    """Forget all that was kept."""
    from ganglion.gateway.experts.outcomes import clear_outcomes

    output.step(f"removed {output.human_bytes(clear_outcomes(gateway_of(root_of(home))))}")


def log_show(
    last: Annotated[int, typer.Option("--last", min=1, help="So many, the newest last.")] = 10,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether outcomes are kept, how many there are, and the last of them; with --json whole."""
    from ganglion.gateway.experts.outcomes import is_logging, read_outcomes

    place, count, kept = gateway_of(root_of(home)), 0, deque[Any](maxlen=last)
    for outcome in read_outcomes(place):
        count += 1
        kept.append(outcome)
    if as_json:
        output.answer_json(
            {"on": is_logging(place), "count": count, "last": [msgspec.to_builtins(one) for one in kept]}
        )
        return
    output.answer(f"the log is {'on' if is_logging(place) else 'off'}; {count} outcomes are kept")
    if kept:
        output.answer_table(COLUMNS, [_cells(one) for one in kept], empty="")


def _cells(outcome: Outcome) -> list[str]:
    prompt = " ".join(outcome.prompt.split())
    short = prompt if len(prompt) <= PROMPT_CHARACTERS else f"{prompt[: PROMPT_CHARACTERS - 1]}…"
    return [
        time.strftime("%Y-%m-%d %H:%M", time.localtime(outcome.time)),
        outcome.request_class,
        outcome.combine,
        str(len(outcome.answers)),
        outcome.answers[outcome.chosen].expert,
        "".join(each if each.isprintable() else "�" for each in short),
    ]
