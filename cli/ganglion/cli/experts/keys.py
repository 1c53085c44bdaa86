"""`experts key`: the servers to which this machine's gateway may send text, and their API keys."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption
from ganglion.cli.runner import command
from ganglion.cli.talk import read_line


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "key")(experts_key)


async def experts_key(
    name: Annotated[str, typer.Argument(help="Name of the expert, as in `ganglion experts ls`.")],
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Where the gateway may send its text, and this key, for example http://192.0.2.7:11434/v1."
            " Default: as it was.",
            show_default=False,
        ),
    ] = None,
    own: Annotated[
        bool | None,
        typer.Option(
            "--own/--not-own",
            help="Whether the server is your own, so that private requests may go there. Default: as it was, at first"
            " not.",
            show_default=False,
        ),
    ] = None,
    forget: Annotated[bool, typer.Option("--forget", help="Send it no text any more, and forget its key.")] = False,
    home: HomeOption = None,
) -> None:
    """Let this machine's gateway send text to a server, with an API key that is read from standard input.

    On a terminal it asks for the key, which is never an argument; an empty line leaves it as it was, at first none. The
    key is kept in the gateway's home, for this URL only. A running gateway follows at once.
    """
    from ganglion.cli.owner import gateway_home
    from ganglion.gateway.experts.servers import allow_server, forget_server
    from ganglion.wire.home import Home

    place = Home(gateway_home(root_of(home)))
    if forget:
        forget_server(place, name)
        output.step(f"no text goes to {name} any more")
        return
    made = allow_server(place, name, url=url, key=await _read_key(name) or None, own=own)
    kept = "with a key" if made.key is not None else "without a key"
    yours = "; it is your own, private requests may go there" if made.own else ""
    output.step(f"this gateway sends text for {name} to {made.url}, {kept}{yours}")
    if made.key is not None and made.url.startswith("http://"):
        output.warn("over http:// whoever is on the way reads text and key; use https:// beyond your own network")


async def _read_key(name: str) -> str:
    if not sys.stdin.isatty():
        return (await read_line()).strip()
    import asyncio
    from getpass import getpass

    return (await asyncio.to_thread(getpass, f"API key of {name} (empty: as it was): ")).strip()
