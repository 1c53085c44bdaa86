"""Listings and what changes them: `ps`, `stop`, `status`, `device …`, `token …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ganglion.cli import output
from ganglion.cli.options import HomeOption, JsonOption
from ganglion.cli.runner import command

device_app = typer.Typer(no_args_is_help=True, help="Devices: list, approve, rename, trust, revoke.")
token_app = typer.Typer(no_args_is_help=True, help="Join tokens: create, list, revoke.")

DeviceArgument = Annotated[str, typer.Argument(help="Name, node id, or the first 6 characters of a node id or more.")]
LabelOption = Annotated[str, typer.Option("--label", help="How far its device is trusted: owner, friend or stranger.")]


def root_of(home: Path | None) -> Path:
    """The folder that a command works on."""
    from ganglion.wire.home import root

    return home.expanduser().resolve() if home else root()


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "ps")(ps)
    command(app, "stop")(stop)
    command(app, "status")(status)
    app.add_typer(device_app, name="device")
    app.add_typer(token_app, name="token")


async def ps(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Deployments: model, state, numeric class, devices, sessions."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin

    async with admin(root_of(home)) as line:
        state = await line.fleet()
    names = views.names_of(state.devices)
    rows = [views.deployment(each, names) for each in state.deployments]
    if as_json:
        output.answer_json(rows)
    else:
        empty = "nothing is deployed; deploy a model with: ganglion run MODEL"
        output.answer_table(views.DEPLOYMENT_COLUMNS, [views.deployment_cells(row) for row in rows], empty=empty)
        for offer in state.refused_offers:
            output.answer(views.refused_line(views.refused_offer(offer, names)))


async def stop(
    model: Annotated[str | None, typer.Argument(help="Model or deployment to stop.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop every deployment.")] = False,
    home: HomeOption = None,
) -> None:
    """Stop a deployment; `ganglion down` stops Ganglion itself."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.wire.errors import InvalidRequest

    if (model is None) != every:
        raise InvalidRequest("name one model, or give --all; `ganglion ps` lists what is deployed", param="model")
    async with admin(root_of(home)) as line:
        deployments = list((await line.fleet()).deployments)
        chosen = deployments if model is None else [views.find_deployment(deployments, model)]
        for each in chosen:
            await line.stop(each.deployment)
            output.step(f"stopped {each.model} ({each.deployment})")


async def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Everything at a glance: where the API and the coordinator are, devices, deployments."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.cli.api import api_address

    root = root_of(home)
    async with admin(root) as line:
        document = views.fleet(await line.fleet(), api=api_address(root), coordinator=line.address)
    if as_json:
        output.answer_json(document)
        return
    output.answer(f"API          {document['api'] or 'not running here'}")
    output.answer(f"coordinator  {document['coordinator']} (ganglion {document['version']})")
    output.answer(f"join tokens  {document['tokens_unused']} unused")
    output.answer("")
    devices = [views.device_cells(row) for row in document["devices"]]
    output.answer_table(views.DEVICE_COLUMNS, devices, empty="no device has joined yet")
    output.answer("")
    deployments = [views.deployment_cells(row) for row in document["deployments"]]
    output.answer_table(views.DEPLOYMENT_COLUMNS, deployments, empty="nothing is deployed")
    for row in document["refused_offers"]:
        output.answer(views.refused_line(row))


async def device_ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List devices, gateways and command lines that are enrolled or wait to be approved."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin

    async with admin(root_of(home)) as line:
        rows = [views.device(each) for each in (await line.fleet()).devices]
    if as_json:
        output.answer_json(rows)
    else:
        output.answer_table(
            views.DEVICE_COLUMNS, [views.device_cells(row) for row in rows], empty="no device has joined yet"
        )


async def device_approve(
    device: DeviceArgument,
    label: LabelOption = "owner",
    fingerprint: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Refuse unless the device shows this fingerprint.", show_default=False),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Let a waiting device in by the owner's signature; compare its fingerprint with what the device shows."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.cli.owner import record_fingerprint
    from ganglion.wire.errors import Conflict, PermissionDenied

    async with admin(root_of(home)) as line:
        found = views.find_device((await line.fleet()).devices, device)
        if found.state != "pending":
            raise Conflict(f"{found.name} is {found.state}, not pending; change its label with `ganglion device trust`")
        shown = record_fingerprint(found.record)
        if fingerprint is not None and fingerprint.split() != shown.split():
            raise PermissionDenied(f"{found.name} has the fingerprint {shown}, not {fingerprint}: it is another device")
        await _relabel(line, root_of(home), found, label)
    output.step(f"approved {found.name} as {label}; its fingerprint is {shown}")


async def device_rename(device: DeviceArgument, name: str, home: HomeOption = None) -> None:
    """Give a device another name."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin

    async with admin(root_of(home)) as line:
        found = views.find_device((await line.fleet()).devices, device)
        renamed = await line.rename(found.node_id, name)
    output.step(f"{found.name} is now called {renamed.name}")


async def device_trust(
    device: DeviceArgument,
    label: Annotated[str, typer.Argument(help="owner, friend or stranger.")],
    home: HomeOption = None,
) -> None:
    """Change how far a device is trusted: `--private` plans use only the label owner."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.wire.errors import Conflict

    async with admin(root_of(home)) as line:
        found = views.find_device((await line.fleet()).devices, device)
        if found.state in ("pending", "revoked"):
            raise Conflict(f"{found.name} is {found.state}; approve it first: ganglion device approve {found.name}")
        await _relabel(line, root_of(home), found, label)
    output.step(f"{found.name} has the label {label}")


async def device_revoke(device: DeviceArgument, home: HomeOption = None) -> None:
    """Take a device out: its streams end, and it needs a new token to come back."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin

    async with admin(root_of(home)) as line:
        found = views.find_device((await line.fleet()).devices, device)
        await line.revoke(found.node_id)
    output.step(f"revoked {found.name}")


async def token_create(
    label: LabelOption = "owner",
    role: Annotated[str, typer.Option("--role", help="What joins with it: agent, gateway or owner.")] = "agent",
    uses: Annotated[int, typer.Option("--uses", min=1, max=1000, help="How many devices may join with it.")] = 1,
    hours: Annotated[float, typer.Option("--hours", min=0.01, max=8760, help="Hours until it expires.")] = 24.0,
    draft: Annotated[
        bool, typer.Option("--draft", help="For `ganglion join --draft`: lets a gateway in beside each agent.")
    ] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a join token. It is printed once; whoever has it can join until it is used, expires or is revoked."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.cli.owner import load_owner_key, mint_here
    from ganglion.proto import admin_pb2

    root = root_of(home)
    token = mint_here(
        root,
        load_owner_key(root),
        role=views.role_of(role),
        label=views.label_of(label),
        lifetime_s=hours * 3600,
        uses=uses,
        gateway=draft,
    )
    async with admin(root) as line:
        for grant in token.grants:
            await line.register_token(admin_pb2.RegisterTokenRequest(grant=grant))
    if as_json:
        row = views.token(admin_pb2.TokenState(grant=token.allows), now_s=views.unix_now_s())
        output.answer_json({"token": token.encode(), **row})
    else:
        output.answer(token.encode())


async def token_ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List join tokens; the tokens themselves are not kept and cannot be shown again."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin

    async with admin(root_of(home)) as line:
        now_s = views.unix_now_s()
        rows = [views.token(each, now_s=now_s) for each in await line.tokens()]
    if as_json:
        output.answer_json(rows)
    else:
        empty = "there are no join tokens; make one with: ganglion token create"
        output.answer_table(views.TOKEN_COLUMNS, [views.token_cells(row) for row in rows], empty=empty)


async def token_revoke(
    token: Annotated[str, typer.Argument(help="Id as in `ganglion token ls`, or the token itself.")],
    home: HomeOption = None,
) -> None:
    """Let nobody in by this token any more; devices that joined with it stay."""
    from ganglion.cli.admin import admin
    from ganglion.proto import identity_pb2
    from ganglion.wire.tokens import PREFIX, JoinToken

    token_ids = [token]
    if token.startswith(PREFIX):
        grants = JoinToken.decode(token).grants
        token_ids = [identity_pb2.JoinGrant.FromString(signed.grant).token_id for signed in grants]
    async with admin(root_of(home)) as line:
        for token_id in token_ids:
            await line.revoke_token(token_id)
            output.step(f"revoked the token {token_id}")


async def _relabel(line: Any, root: Path, found: Any, label: str) -> None:
    from ganglion.cli import views
    from ganglion.cli.owner import sign_with_label
    from ganglion.proto import admin_pb2

    record = sign_with_label(root, found.record, views.label_of(label))
    await line.put_record(admin_pb2.PutRecordRequest(record=record))


command(device_app, "ls")(device_ls)
command(device_app, "approve")(device_approve)
command(device_app, "rename")(device_rename)
command(device_app, "trust")(device_trust)
command(device_app, "revoke")(device_revoke)
command(token_app, "create")(token_create)
command(token_app, "ls")(token_ls)
command(token_app, "revoke")(token_revoke)
