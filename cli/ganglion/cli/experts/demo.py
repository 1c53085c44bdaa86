"""`experts demo`: the embedded models of four domains side by side, with the gate that was trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import typer

from ganglion.cli import output
from ganglion.cli.fleet import root_of
from ganglion.cli.options import HomeOption
from ganglion.cli.runner import command

DOMAINS: Final = {"demo": "python", "demo-c": "c", "demo-javascript": "javascript", "demo-english": "english"}
PROMPT: Final = "#include <stdio.h>"


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    command(app, "demo")(experts_demo)


async def experts_demo(home: HomeOption = None) -> None:
    """Deploy four small embedded models (Python, C, JavaScript, English) as experts, and install the gate over them.

    What is deployed, an expert already, or a gate that is there stays as it is.
    """
    from ganglion.cli.admin import admin
    from ganglion.cli.deploying import Wish, ensure_ready
    from ganglion.proto import admin_pb2

    root = root_of(home)
    async with admin(root) as line:
        for name, domain in DOMAINS.items():
            output.doing(f"deploying {name}")
            await ensure_ready(root, line, name, name=None, wish=Wish())
            if name not in {each.spec.name for each in (await line.fleet()).experts}:
                await line.put_expert(admin_pb2.ExpertSpec(name=name, domains=[domain]))
            output.step(f"{name} is an expert of {domain}")
    output.step(install_gate(root))
    output.say("")
    output.say(f'  try      ganglion run experts "{PROMPT}" --max-tokens 48')
    output.say("  which    ganglion experts explain")


def install_gate(root: Path) -> str:
    """Put the shipped gate into the gateway's home unless one is there; what became of it, in a line."""
    from ganglion.cli.owner import gateway_home
    from ganglion.gateway.experts.gate import GATE_FOLDER
    from ganglion.gateway.experts.gate_file import FACTS_FILE, copy_gate
    from ganglion.models import demo_path
    from ganglion.wire.home import Home, make_private_folder

    shipped = demo_path("demo").with_name("demo-gate")
    folder = make_private_folder(Home(gateway_home(root)).path / GATE_FOLDER)
    if (folder / FACTS_FILE).exists():
        return f"prompts are weighed by the gate in {folder}, which was there"
    if not (shipped / FACTS_FILE).exists():
        return "prompts are weighed by the experts' domains: this release ships no gate"
    facts = copy_gate(shipped, folder)
    return f"prompts are weighed by a gate that was trained on {facts.examples} texts"
