"""`experts budget`, `experts explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption, JsonOption
from ganglion.cli.runner import command


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "budget")(experts_budget)
    command(app, "explain")(experts_explain)


async def experts_budget(
    request_class: Annotated[
        list[str],
        typer.Argument(
            help="Class of requests, which a request chooses as the model `experts:CLASS`; `rm CLASS` removes it."
        ),
    ],
    latency: Annotated[
        str | None,
        typer.Option(
            "--latency", help="Of 95 % of whole answers, as in 2s or 500ms. Default: no limit.", show_default=False
        ),
    ] = None,
    energy: Annotated[
        float, typer.Option("--energy", min=0.0, help="Joule of a request, all experts together. Default: no limit.")
    ] = 0.0,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of an answer, which both count for.")] = 128,
    combine: Annotated[
        str,
        typer.Option(
            "--combine",
            help="best: one expert answers; vote: the answer most give; rerank: the best of all answers; blend: token"
            " by token, of models with one tokenizer.",
        ),
    ] = "best",
    most: Annotated[int, typer.Option("--most", min=0, help="Experts at most. Default: any number.")] = 0,
    private: Annotated[bool, typer.Option("--private", help="Only experts on devices labelled owner.")] = False,
    domains: Annotated[
        str, typer.Option("--domains", help="What is asked about, with commas. Default: anything.", show_default=False)
    ] = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set what a class of requests may cost and how answers combine, anew in every part; or remove it: `rm CLASS`."""
    from ganglion.cli.admin import admin
    from ganglion.cli.experts import documents
    from ganglion.proto import admin_pb2
    from ganglion.wire.errors import InvalidRequest

    if request_class[0] == "rm":
        if len(request_class) != 2:
            raise InvalidRequest("name one class to remove: ganglion experts budget rm CLASS", param="class")
        async with admin(root_of(home)) as line:
            await line.remove_budget(request_class[1])
        output.step(f"removed the class {request_class[1]}")
        return
    if len(request_class) != 1:
        raise InvalidRequest(f"{' '.join(request_class)!r}: give one CLASS, or `rm CLASS`", param="class")
    (name,) = request_class
    budget = admin_pb2.Budget(
        name=name,
        latency_p95_s=documents.parse_seconds(latency, "--latency") if latency else 0.0,
        energy_j=energy,
        tokens=tokens,
        combine=documents.combine_of(combine),
        most=most,
        private=private,
        domains=documents.split_names(domains),
    )
    async with admin(root_of(home)) as line:
        selection = await line.put_budget(budget)
    if as_json:
        output.answer_json(documents.selection(selection))
    elif selection.refused:
        output.warn(f"the class {name} is set, and no expert meets it now: {selection.refused}")
    else:
        output.step(f"the class {name} is answered by {', '.join(selection.experts)}")


async def experts_explain(
    request_class: Annotated[str, typer.Argument(help="Class of requests.")] = "default",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Why these experts: their value, time and energy, and why each of the others is left out."""
    from ganglion.cli.admin import admin
    from ganglion.cli.experts import documents
    from ganglion.wire.errors import NotFound

    async with admin(root_of(home)) as line:
        state = await line.fleet()
    found = next((each for each in state.selections if each.budget.name == request_class), None)
    if found is None:
        known = ", ".join(each.budget.name for each in state.selections)
        raise NotFound(f"no class {request_class!r}; there are: {known}", param="class")
    row = documents.selection(found)
    if as_json:
        output.answer_json(row)
        return
    for text in documents.selection_lines(row):
        output.answer(text)
    cells = documents.explained_cells(row, {each.spec.name: each for each in state.experts})
    if cells:
        output.answer("")
        output.answer_table(documents.EXPLAINED_COLUMNS, cells, empty="")
