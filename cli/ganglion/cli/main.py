"""The `ganglion` command. Nothing heavy is imported before a command needs it, so that `--help` answers at once."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from ganglion.cli import benching, fleet, keys, lifecycle, models, planning, quantizing, roles, talk
from ganglion.cli.experts import app as experts
from ganglion.cli.runner import DEBUG

app = typer.Typer(
    name="ganglion",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The devices you own, and a cloud you need not trust, answering as one AI model.",
    epilog="Answers go to standard output, everything else to standard error. Exit codes: docs/cli.md.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from ganglion.wire.hello import distribution_version

        typer.echo(f"ganglion {distribution_version()}")
        raise typer.Exit


@app.callback()
def ganglion(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The devices you own, and a cloud you need not trust, answering as one AI model."""
    if debug:
        os.environ[DEBUG] = "1"  # also for the processes that a command starts


for module in (lifecycle, roles, talk, models, quantizing, planning, benching, fleet, experts, keys):
    module.add_to(app)


def main() -> None:
    """Entry point; exits with a documented code."""
    # gRPC would write lines of its own for every closed connection and every port in use, which our errors name better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # ONNX Runtime's wheels report sessions and models to their maker unless this is set before they are loaded; nothing
    # here tells anybody anything. Agents and their workers inherit it.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    for out in (sys.stdout, sys.stderr):
        # A terminal or pipe that cannot show a character must not end a command.
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="replace")
    app()
