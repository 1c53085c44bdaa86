"""`run` and `chat`: deploy what is asked for, then stream its answer from the API to standard output."""

from __future__ import annotations

import asyncio
import sys
from typing import Annotated, Any

import typer

from ganglion.cli import output
from ganglion.cli.drafting_options import (
    AsOption,
    AwayOption,
    DrafterOption,
    DraftMemoryOption,
    DraftModeOption,
    VerifierOption,
    WaitOption,
    WindowOption,
)
from ganglion.cli.fleet import root_of
from ganglion.cli.options import (
    ApiOption,
    ContextOption,
    DevicesOption,
    ExpertMemoryOption,
    ExpertsOption,
    FastOption,
    FormatOption,
    ForOption,
    HomeOption,
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

MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", help="Tokens of the answer at most.", show_default=False)
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", help="0: always the likeliest token. Default: the API's.", show_default=False),
]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Nucleus sampling.", show_default=False)]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same answer, on any plan.", show_default=False)
]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    command(app, "run")(run)
    command(app, "chat")(chat)


async def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to go on with; `-`: from standard input.", show_default=False)
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a message, through the chat template.")
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
    draft: Annotated[
        str | None,
        typer.Option("--draft", help="Have a device draft for this model with this other one.", show_default=False),
    ] = None,
    draft_on: Annotated[
        str, typer.Option("--draft-on", help="Which device drafts. Default: the agent here.", show_default=False)
    ] = "",
    draft_mode: DraftModeOption = "auto",
    away: AwayOption = "wait",
    wait_s: WaitOption = 60.0,
    draft_memory: DraftMemoryOption = None,
    verifier: VerifierOption = None,
    as_name: AsOption = None,
    api: ApiOption = None,
    home: HomeOption = None,
) -> None:
    """Deploy a model unless it is ready, and complete a prompt with it: the answer alone on standard output.

    `experts` and `experts:CLASS` ask those that were chosen of `ganglion experts ls`; nothing is deployed then.
    With --verifier the model drafts for the one behind that URL, which answers under the name of --as.
    """
    from ganglion.cli.admin import admin
    from ganglion.cli.api import require_api
    from ganglion.cli.deploying import Wish, ensure_ready
    from ganglion.cli.drafting import deploy_drafter, drafting_for, drafting_of
    from ganglion.cli.experts.classes import is_class
    from ganglion.wire.errors import InvalidRequest

    text = sys.stdin.read() if prompt == "-" else prompt
    root = root_of(home)
    wish = Wish.of(
        weights=weights, workload=workload, fast=fast, mode=mode, devices=devices, shares=shares, topology=topology,
        payload=payload, context=context, sessions=sessions, prefix_tokens=prefix_tokens, private=private,
        experts=experts, expert_memory=expert_memory,
        drafter=drafter, window=window,
    )  # fmt: skip
    drafting = drafting_of(
        mode=draft_mode, away=away, wait_s=wait_s, window=window, memory=draft_memory, url=verifier, name=as_name
    )
    if draft is not None and verifier is not None:
        raise InvalidRequest(
            "--draft drafts for a model here, --verifier for one behind an API: give one", param="draft"
        )
    async with admin(root) as line:
        if await is_class(line, model):
            deployed = model
            if not wish.is_open or drafter is not None or draft is not None or as_name is not None or name is not None:
                raise InvalidRequest(
                    f"{model} asks experts, which are deployed one by one; give those options with each of them",
                    param="model",
                )
        elif as_name is not None:
            await deploy_drafter(root, line, model, drafting, device=draft_on)
            deployed = as_name
        else:
            deployed = await ensure_ready(root, line, model, name=name, wish=wish)
        if draft is not None:
            by = await deploy_drafter(root, line, draft, drafting_for(deployed, drafting), device=draft_on)
            output.step(f"{by} drafts for {deployed}")
    if text is None:
        output.say(f'{deployed} is ready; ask it with: ganglion run {deployed} "…"')
        return
    body = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed) | {"model": deployed}
    body |= {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}
    await _print(require_api(root, api), "chat/completions" if as_chat else "completions", body)


async def chat(
    model: ModelArgument,
    system: Annotated[
        str | None, typer.Option("--system", help="A system message to begin with.", show_default=False)
    ] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    name: NameOption = None,
    api: ApiOption = None,
    home: HomeOption = None,
) -> None:
    """Talk with a model, a line at a time; an empty line or Ctrl-D ends it. The conversation stays on this machine."""
    from ganglion.cli.admin import admin
    from ganglion.cli.api import require_api
    from ganglion.cli.deploying import Wish, ensure_ready
    from ganglion.cli.experts.classes import is_class

    root = root_of(home)
    async with admin(root) as line:
        if await is_class(line, model):
            deployed = model
        else:
            deployed = await ensure_ready(root, line, model, name=name, wish=Wish())
    base = require_api(root, api)
    options = _sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed) | {"model": deployed}
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while said := await _next_line():
        messages.append({"role": "user", "content": said})
        answered = await _print(base, "chat/completions", {**options, "messages": messages})
        messages.append({"role": "assistant", "content": answered})


def _sampling(**given: Any) -> dict[str, Any]:
    return {key: value for key, value in given.items() if value is not None}


async def _next_line() -> str:
    if sys.stdin.isatty():
        output.notes().print("[bold cyan]>[/]", end=" ")
    return await read_line()


async def read_line() -> str:
    """A line from standard input without its white space; empty at its end."""
    if sys.stdin.isatty():
        # Waiting inside readline would keep Ctrl-C waiting too; a terminal is readable once a whole line is there.
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(sys.stdin, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(sys.stdin)
    return sys.stdin.readline().strip()


async def _print(base: str, path: str, body: dict[str, Any]) -> str:
    """Stream an answer to standard output as it comes; the whole of it."""
    from ganglion.cli.api import stream

    pieces: list[str] = []
    try:
        async for chunk in stream(base, path, body):
            if chunk.text:
                pieces.append(chunk.text)
                output.answer(chunk.text, end="")
    finally:
        if pieces and not pieces[-1].endswith("\n"):
            output.answer("")
    return "".join(pieces)
