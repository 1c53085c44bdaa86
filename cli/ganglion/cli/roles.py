"""`serve` and `join`: one role in the foreground, for terminals, systemd, containers and tests."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ganglion.cli import output
from ganglion.cli.drafting_options import (
    AsOption,
    AwayOption,
    DraftMemoryOption,
    DraftModeOption,
    VerifierOption,
    WaitOption,
    WindowOption,
)
from ganglion.cli.fleet import root_of
from ganglion.cli.options import (
    BandwidthOption,
    BindOption,
    EnrolmentPortOption,
    ExecutorOption,
    FleetPortOption,
    HomeOption,
    HostOption,
    LanesOption,
    MemoryOption,
    PiecePortOption,
    PortOption,
    ReadyFileOption,
    StoreOption,
    ThreadsOption,
)
from ganglion.cli.runner import command, until_stopped

serve_app = typer.Typer(no_args_is_help=True, help="Run one role in the foreground: coordinator, agent or gateway.")

WithParentOption = Annotated[bool, typer.Option("--with-parent", hidden=True, help="End when standard input ends.")]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        help="The coordinator's enrolment port, host:port. Default: the token's, else mDNS.",
        show_default=False,
    ),
]
DeviceNameOption = Annotated[
    str | None, typer.Option("--name", help="Name of this device. Default: the host name.", show_default=False)
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="GANGLION_TOKEN",
        help="Join token, to enrol with when not enrolled yet.",
        show_default=False,
        show_envvar=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.add_typer(serve_app, name="serve")
    command(app, "join")(join)


async def serve_coordinator(
    bind: BindOption = None,
    fleet_port: FleetPortOption = None,
    enrolment_port: EnrolmentPortOption = None,
    owner: Annotated[
        Path | None,
        typer.Option(
            "--owner", help="File with the owner's public key. Default: owner.pub in its home.", show_default=False
        ),
    ] = None,
    mdns: Annotated[
        bool, typer.Option("--mdns/--no-mdns", help="Announce the enrolment port on the local network.")
    ] = True,
    record: Annotated[
        Path | None, typer.Option("--record", hidden=True, help="Append every message to this file (tests).")
    ] = None,
    ready_file: ReadyFileOption = None,
    with_parent: WithParentOption = False,
    home: HomeOption = None,
) -> int:
    """Run the coordinator. It needs the owner's public key (`ganglion owner init`), never the key itself."""
    from ganglion.cli import settings
    from ganglion.cli.owner import coordinator_home, make_root
    from ganglion.cli.running import coordinator
    from ganglion.wire.errors import NotFound
    from ganglion.wire.home import Home, write_secret

    root = root_of(home)
    chosen = settings.load(root, os.environ, bind=bind, fleet_port=fleet_port, enrolment_port=enrolment_port)
    public = Home(coordinator_home(make_root(root))).path / "owner.pub"
    if owner is not None:
        write_secret(public, owner.read_bytes())
    if not public.exists():
        raise NotFound(
            f"{public} is missing: make the owner's key with `ganglion owner init`, or name it with --owner FILE"
        )
    _begin(with_parent)
    return await until_stopped(
        coordinator(Home(coordinator_home(root)), chosen, mdns=mdns, record=record, ready_file=ready_file)
    )


async def serve_agent(
    name: DeviceNameOption = None,
    token: TokenOption = None,
    coordinator: CoordinatorOption = None,
    bind: BindOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = None,
    store: StoreOption = None,
    bandwidth: BandwidthOption = None,
    piece_port: PiecePortOption = None,
    lanes: LanesOption = None,
    executor: ExecutorOption = None,
    ready_file: ReadyFileOption = None,
    with_parent: WithParentOption = False,
    home: HomeOption = None,
) -> int:
    """Run an agent on an enrolled home, or enrol it first with --token. `ganglion join` says more on a terminal."""
    from ganglion.cli import settings
    from ganglion.cli.joining import enrolled_agent
    from ganglion.cli.running import agent
    from ganglion.wire.tokens import JoinToken

    root = root_of(home)
    chosen = settings.load(
        root,
        os.environ,
        bind=bind,
        threads=threads,
        memory=memory,
        store=store,
        bandwidth=bandwidth,
        piece_port=piece_port,
        lanes=lanes,
        executor=executor,
    )
    decoded = JoinToken.decode(token) if token else None
    _begin(with_parent)
    return await until_stopped(
        _enrol_and_run(root, name, decoded, coordinator, chosen, ready_file, enrolled_agent, agent)
    )


async def serve_gateway(
    token: TokenOption = None,
    coordinator: CoordinatorOption = None,
    host: HostOption = None,
    port: PortOption = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", help="The gateway beside the agent of this name. Default: the machine's own.", show_default=False
        ),
    ] = None,
    prefers: Annotated[
        str,
        typer.Option(
            "--prefers", help="Node id of the agent here: what it drafts for is asked through it.", show_default=False
        ),
    ] = "",
    ready_file: ReadyFileOption = None,
    with_parent: WithParentOption = False,
    home: HomeOption = None,
) -> int:
    """Run the gateway: the API. Enrols first with --token, or by the owner's key where that is on this machine."""
    from ganglion.cli import settings
    from ganglion.cli.joining import enrolled_gateway
    from ganglion.cli.owner import gateway_home, gateways_home, make_root
    from ganglion.cli.running import gateway
    from ganglion.wire.home import Home
    from ganglion.wire.identity import Identity
    from ganglion.wire.tokens import JoinToken

    root = root_of(home)
    chosen = settings.load(root, os.environ, host=host, port=port)
    decoded = JoinToken.decode(token) if token else None

    async def main() -> None:
        if name is None:
            place = Home(gateway_home(make_root(root)))
            identity = await enrolled_gateway(root, decoded, coordinator)
        else:
            place = Home(gateways_home(make_root(root)) / name)
            identity = Identity.load(place.identity)
        await gateway(root, place, identity, chosen, prefers=prefers, ready_file=ready_file)

    _begin(with_parent)
    return await until_stopped(main())


async def join(
    token: Annotated[
        str | None, typer.Argument(help="The line that `ganglion up` prints, gj1.…", show_default=False)
    ] = None,
    coordinator: CoordinatorOption = None,
    name: DeviceNameOption = None,
    bind: BindOption = None,
    threads: ThreadsOption = None,
    memory: MemoryOption = None,
    store: StoreOption = None,
    bandwidth: BandwidthOption = None,
    piece_port: PiecePortOption = None,
    lanes: LanesOption = None,
    draft: Annotated[
        bool,
        typer.Option(
            "--draft", help="Draft here for the models that are deployed, and serve them at an API of its own."
        ),
    ] = False,
    drafter: Annotated[
        str, typer.Option("--drafter", help="The model to draft with; it must have their tokenizer.")
    ] = "demo-drafter",
    draft_mode: DraftModeOption = "auto",
    away: AwayOption = "wait",
    wait_s: WaitOption = 60.0,
    window: WindowOption = 0,
    draft_memory: DraftMemoryOption = None,
    verifier: VerifierOption = None,
    as_name: AsOption = None,
    host: HostOption = None,
    port: PortOption = None,
    executor: ExecutorOption = None,
    ready_file: ReadyFileOption = None,
    with_parent: WithParentOption = False,
    home: HomeOption = None,
) -> int:
    """Make this machine a device and run its agent until Ctrl-C. Without a token it waits for the owner's approval.

    With --draft it also drafts: a small model here guesses, a large one elsewhere verifies, and the API of this device
    gives exactly what the large one would have said.
    """
    from ganglion.cli import settings
    from ganglion.cli.drafting import Joining, drafting_of, join_and_draft
    from ganglion.cli.joining import enrolled_agent
    from ganglion.cli.running import agent
    from ganglion.wire.tokens import JoinToken

    root = root_of(home)
    chosen = settings.load(
        root,
        os.environ,
        bind=bind,
        threads=threads,
        memory=memory,
        store=store,
        bandwidth=bandwidth,
        piece_port=piece_port,
        lanes=lanes,
        host=host,
        port=port,
        executor=executor,
    )
    decoded = JoinToken.decode(token) if token else None
    _begin(with_parent, quiet=sys.stderr.isatty())
    if draft or verifier is not None:
        drafting = drafting_of(
            mode=draft_mode, away=away, wait_s=wait_s, window=window, memory=draft_memory, url=verifier, name=as_name
        )
        asked = Joining(name, decoded, coordinator, drafter, drafting, ready_file)
        return await until_stopped(join_and_draft(root, chosen, asked))

    async def joined(*arguments: Any, **options: Any) -> Any:
        return await enrolled_agent(*arguments, **options, may_wait=True)

    return await until_stopped(_enrol_and_run(root, name, decoded, coordinator, chosen, ready_file, joined, agent))


async def _enrol_and_run(
    root: Path,
    name: str | None,
    token: Any,
    coordinator: str | None,
    chosen: Any,
    ready_file: Path | None,
    enrol: Any,
    run: Any,
) -> None:
    enrolled = await enrol(root, name=name, token=token, coordinator=coordinator)
    output.step(f"{enrolled.identity.name} is enrolled with the coordinator at {enrolled.identity.coordinator}")
    output.doing("measuring this machine and connecting")
    await run(root, enrolled, chosen, ready_file=ready_file)


def _begin(with_parent: bool, *, quiet: bool = False) -> None:
    from ganglion.cli.processes import end_with_parent

    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for noisy in ("httpx", "grpc", "zeroconf", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if with_parent:
        end_with_parent()


command(serve_app, "coordinator")(serve_coordinator)
command(serve_app, "agent")(serve_agent)
command(serve_app, "gateway")(serve_gateway)
