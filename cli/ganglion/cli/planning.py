"""`plan`: every way to run a model here, with what each would cost and why it was or was not chosen."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ganglion.cli import output
from ganglion.cli.drafting_options import DrafterOption, WindowOption
from ganglion.cli.fleet import root_of
from ganglion.cli.options import (
    ContextOption,
    DevicesOption,
    ExpertMemoryOption,
    ExpertsOption,
    FastOption,
    FormatOption,
    ForOption,
    HomeOption,
    JsonOption,
    ModelArgument,
    ModeOption,
    NameOption,
    PayloadOption,
    PrefixTokensOption,
    PrivateOption,
    SessionsOption,
    SharesOption,
    TopologyOption,
)
from ganglion.cli.runner import command


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "plan")(plan)


async def plan(
    model: ModelArgument,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every candidate, also those that were not chosen.")
    ] = False,
    name: NameOption = None,
    weights: FormatOption = None,
    workload: ForOption = None,
    fast: FastOption = False,
    experts: ExpertsOption = None,
    expert_memory: ExpertMemoryOption = None,
    mode: ModeOption = "auto",
    devices: DevicesOption = "",
    shares: SharesOption = "",
    topology: TopologyOption = "auto",
    payload: PayloadOption = "auto",
    context: ContextOption = 0,
    sessions: SessionsOption = 0,
    prefix_tokens: PrefixTokensOption = None,
    private: PrivateOption = False,
    drafter: DrafterOption = None,
    window: WindowOption = 0,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a model would be run, without running it. Exit code 6 when no set of devices can hold it."""
    from ganglion.cli import views
    from ganglion.cli.admin import admin
    from ganglion.cli.choosing import decide
    from ganglion.cli.deploying import Wish, drafter_for, local_agent, manifest_for, request_of
    from ganglion.cli.sourcing import checkpoint_of
    from ganglion.proto import admin_pb2
    from ganglion.wire.errors import DoesNotFit
    from ganglion.wire.limits import REPORT_BYTES
    from ganglion.wire.nouns import PlanReport, from_json, to_json

    wish = Wish.of(
        weights=weights, workload=workload, fast=fast, mode=mode, devices=devices, shares=shares, topology=topology,
        payload=payload, context=context, sessions=sessions, prefix_tokens=prefix_tokens, private=private,
        experts=experts, expert_memory=expert_memory,
        drafter=drafter, window=window,
    )  # fmt: skip
    root = root_of(home)
    async with admin(root) as line:
        found = await checkpoint_of(model, name)
        deployed = [each for each in (await line.fleet()).deployments if model in (each.model, each.deployment)]
        if found is None and deployed:
            request = admin_pb2.DeployRequest(manifest=deployed[0].manifest, options=to_json(wish.options))
            guessing = await drafter_for(root, line, wish)
            request.drafter = to_json(guessing) if guessing is not None else b""
        else:
            wish = await decide(line, wish, found)
            manifest = await manifest_for(root, line, model, found, wish)
            request = request_of(manifest, wish.options, local_agent(root), await drafter_for(root, line, wish))
        report = from_json(PlanReport, (await line.explain(request)).report, limit_bytes=REPORT_BYTES)
    document = json.loads(to_json(report)) | ({"format_reason": wish.reason} if wish.reason else {})
    if as_json:
        output.answer_json(document)
    else:
        rows = [row for row in document["candidates"] if explain or row["chosen"]]
        output.answer(f"{report.model}, {report.numeric_class}")
        output.answer_table(
            views.CANDIDATE_COLUMNS, [views.candidate_cells(row) for row in rows], empty="no plan is feasible"
        )
        for note in report.notes:
            output.answer(note)
    if report.plan is None:
        reasons = "; ".join(each.reason for each in report.candidates) or "there is no device"
        raise DoesNotFit(f"no set of devices can hold {report.model}: {reasons}")
