"""`up` and `down`: everything on this machine with one command; `owner`: the key that all trust begins with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import (
    BindOption,
    EnrolmentPortOption,
    ExecutorOption,
    FleetPortOption,
    HomeOption,
    HostOption,
    JsonOption,
    LanesOption,
    MemoryOption,
    PortOption,
    StoreOption,
    ThreadsOption,
)
from ganglion.cli.runner import command, until_stopped

owner_app = typer.Typer(no_args_is_help=True, help="The owner's key, which signs devices, tokens and labels.")


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "up")(up)
    command(app, "down")(down)
    app.add_typer(owner_app, name="owner")


async def up(
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Go on in the background; `ganglion down` ends it.")
    ] = False,
    host: HostOption = None,
    port: PortOption = None,
    bind: BindOption = None,
    enrolment_port: EnrolmentPortOption = None,
    fleet_port: FleetPortOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = None,
    store: StoreOption = None,
    lanes: LanesOption = None,
    executor: ExecutorOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of this device. Default: the host name.", show_default=False)
    ] = None,
    demo: Annotated[bool, typer.Option("--demo/--no-demo", help="Deploy the embedded demo model.")] = True,
    mdns: Annotated[
        bool, typer.Option("--mdns/--no-mdns", help="Announce the enrolment port on the local network.")
    ] = True,
    home: HomeOption = None,
) -> int:
    """Run coordinator, agent and gateway here, deploy the demo model, and print how to use and join it."""
    from ganglion.cli import settings
    from ganglion.cli.detaching import start_detached
    from ganglion.cli.owner import device_name
    from ganglion.cli.upping import run_here

    root = root_of(home)
    chosen = settings.load(
        root, os.environ, host=host, port=port, bind=bind, enrolment_port=enrolment_port,
        fleet_port=fleet_port, threads=threads, memory=memory, store=store, lanes=lanes,
        executor=executor,
    )  # fmt: skip
    name = name or device_name()
    if detach:
        await start_detached(root, chosen, name=name, demo=demo, mdns=mdns)
        return 0
    return await until_stopped(run_here(root, chosen, name=name, demo=demo, mdns=mdns))


async def down(home: HomeOption = None) -> None:
    """End the `ganglion up` of this home: gateway, agent and coordinator, in this order."""
    from ganglion.cli.detaching import stop_running

    await stop_running(root_of(home))


def owner_init(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Make the owner's key where there is none, and print the file with its public half for a coordinator elsewhere."""
    from ganglion.cli.owner import coordinator_home, ensure_owner_key

    root = root_of(home)
    _, made = ensure_owner_key(root)
    public: Path = coordinator_home(root) / "owner.pub"
    output.step(
        f"owner key {'made' if made else 'found'}: {root / 'owner' / 'owner.key'} (keep a copy; it cannot be replaced)"
    )
    if as_json:
        output.answer_json({"owner_public_key_file": str(public), "made": made})
    else:
        output.answer(str(public))


command(owner_app, "init")(owner_init)
