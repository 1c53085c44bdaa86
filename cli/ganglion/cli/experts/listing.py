"""`experts ls`, `experts add`, `experts rm`."""

from __future__ import annotations

from typing import Annotated

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption, JsonOption
from ganglion.cli.runner import command

NameArgument = Annotated[str, typer.Argument(help="Name of the expert; of a model deployed here the model's own.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "ls")(experts_ls)
    command(app, "add")(experts_add)
    command(app, "rm")(experts_rm)


async def experts_ls(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List experts: state, speed and energy as claimed or measured, queue, and where they are."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.cli.experts import documents

    async with admin(root_of(home)) as line:
        state = await line.fleet()
    names = views.names_of(state.devices)
    rows = [documents.expert(each, names) for each in state.experts]
    if as_json:
        output.answer_json(rows)
        return
    empty = "there are no experts; add a deployed model with: ganglion experts add NAME"
    output.answer_table(documents.EXPERT_COLUMNS, [documents.expert_cells(row) for row in rows], empty=empty)
    for row in rows:
        if row["why"]:
            output.answer(f"{row['name']}: {row['why']}")


async def experts_add(
    name: NameArgument,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="Of an OpenAI-compatible server (Ollama, vLLM, llama.cpp), for example http://192.0.2.7:11434/v1."
            " Default: a model deployed here.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="What the server, or this fleet, calls the model. Default: NAME.", show_default=False
        ),
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option("--domains", help="What it is good at, with commas, as in python,docs.", show_default=False),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            help="How far a server is trusted: owner, friend or stranger; a deployed model has its devices' label."
            " Default: stranger.",
            show_default=False,
        ),
    ] = None,
    tokens_per_s: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-s",
            min=0.0,
            help="Speed of one answer, until it is measured. Default: as its plan predicts, else 10.",
            show_default=False,
        ),
    ] = None,
    ttft: Annotated[
        str | None,
        typer.Option(
            "--ttft", help="Time to the first token, until it is measured. Default: 0.5s.", show_default=False
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy", min=0.0, help="Joule per token. Default: as a device of 30 W would take.", show_default=False
        ),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add an expert, or change one: what is not given stays. One that was dropped is asked again at once.

    This machine's gateway may send text to a server that is added here; `ganglion experts key` gives it an API key.
    """
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.cli.experts import documents
    from ganglion.cli.owner import gateway_home
    from ganglion.gateway.experts.servers import allow_server
    from ganglion.proto import admin_pb2, identity_pb2
    from ganglion.wire.home import Home

    async with admin(root_of(home)) as line:
        state = await line.fleet()
        known = next((each.spec for each in state.experts if each.spec.name == name), admin_pb2.ExpertSpec(name=name))
        spec = admin_pb2.ExpertSpec()
        spec.CopyFrom(known)
        for field, given in (("url", url), ("model", model)):
            if given is not None:
                setattr(spec, field, given)
        if domains is not None:
            spec.domains[:] = documents.split_names(domains)
        if label is not None:
            spec.label = views.label_of(label).number
        claims = {
            "tokens_per_s": tokens_per_s,
            "ttft_s": documents.parse_seconds(ttft, "--ttft") if ttft is not None else None,
            "energy_j_per_token": energy,
        }
        for field, claim in claims.items():
            if claim is not None:
                setattr(spec.claimed, field, claim)
        added = await line.put_expert(spec)
    if added.spec.url:
        allow_server(
            Home(gateway_home(root_of(home))),
            name,
            url=added.spec.url,
            own=added.spec.label == identity_pb2.TRUST_LABEL_OWNER,
        )
    row = documents.expert(added, views.names_of(state.devices))
    if as_json:
        output.answer_json(row)
        return
    output.step(f"{name} is an expert: {row['state']}, {documents.costs_line(row)}")
    if row["why"]:
        output.warn(row["why"])


async def experts_rm(name: NameArgument, home: HomeOption = None) -> None:
    """Remove an expert; a model that is deployed stays deployed."""
    from ganglion.cli.admin import admin

    async with admin(root_of(home)) as line:
        await line.remove_expert(name)
    output.step(f"removed the expert {name}")
