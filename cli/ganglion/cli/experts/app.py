"""The sub-command `ganglion experts`, to which the other files of this folder add theirs."""

from __future__ import annotations

import typer

from ganglion.cli.experts import budgets, demo, keys, listing, outcomes, training

experts_app = typer.Typer(
    no_args_is_help=True,
    help="Experts: whole models side by side, deployed here or on other servers; which of them answer, at what cost.",
)


def add_to(app: typer.Typer) -> None:
    """Register the commands of this folder."""
    app.add_typer(experts_app, name="experts")


for module in (demo, listing, budgets, keys, outcomes, training):
    module.add_to(experts_app)
