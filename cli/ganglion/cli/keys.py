"""`key …`: API keys of the gateway of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption, JsonOption
from ganglion.cli.runner import command

key_app = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke. On loopback the API needs none.")


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.add_typer(key_app, name="key")


def key_create(
    name: Annotated[str, typer.Argument(help="What to call it, for example the program that uses it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an API key. It is printed once and kept only as a hash."""
    from ganglion.cli.owner import gateway_home
    from ganglion.gateway.keys import create_key
    from ganglion.wire.home import Home

    key = create_key(Home(gateway_home(root_of(home))), name)
    if as_json:
        output.answer_json({"name": name, "key": key})
    else:
        output.answer(key)


def key_ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List API keys by name and first characters."""
    from datetime import UTC, datetime

    from ganglion.cli.owner import gateway_home
    from ganglion.gateway.keys import list_keys
    from ganglion.wire.home import Home

    keys = list_keys(Home(gateway_home(root_of(home))))
    if as_json:
        rows = [{"name": key.name, "shown": key.shown, "created_unix_s": key.created_unix_s} for key in keys]
        output.answer_json(rows)
        return
    cells = [
        [key.name, f"{key.shown}…", datetime.fromtimestamp(key.created_unix_s, tz=UTC).strftime("%Y-%m-%d %H:%M UTC")]
        for key in keys
    ]
    empty = "there are no API keys; on loopback none is needed; make one with: ganglion key create NAME"
    output.answer_table(("NAME", "KEY", "CREATED"), cells, empty=empty)


def key_revoke(name: Annotated[str, typer.Argument(help="As in `ganglion key ls`.")], home: HomeOption = None) -> None:
    """Forget an API key: the gateway refuses it from its next request on."""
    from ganglion.cli.owner import gateway_home
    from ganglion.gateway.keys import revoke_key
    from ganglion.wire.home import Home

    revoke_key(Home(gateway_home(root_of(home))), name)
    output.step(f"revoked the key {name}")


command(key_app, "create")(key_create)
command(key_app, "ls")(key_ls)
command(key_app, "revoke")(key_revoke)
