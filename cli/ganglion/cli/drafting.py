"""Drafting for a model that answers elsewhere: how it is asked for, and a device that joins to do it."""

from __future__ import annotations

import asyncio
import errno
import shlex
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ganglion.cli import output
from ganglion.cli.joining import Enrolled, beside_gateway, check_gateway_token, enrolled_agent
from ganglion.cli.processes import Child
from ganglion.cli.settings import Settings
from ganglion.cli.stack import LOGS, first_error, keep
from ganglion.wire.errors import Conflict, GanglionError, InvalidRequest
from ganglion.wire.home import make_private_folder
from ganglion.wire.nouns import Drafting, Manifest, PlanOptions, to_json
from ganglion.wire.tokens import JoinToken

if TYPE_CHECKING:
    from ganglion.cli.admin import Admin

DEFAULT_DRAFTER: Final = "demo-drafter"
SESSIONS: Final = 4  # of a drafting device, where nothing was asked for
PORTS_TRIED: Final = 32
PROMPT: Final = "def read_lines(path):"


def drafting_of(
    *,
    mode: str,
    away: str,
    wait_s: float,
    window: int,
    memory: str | None,
    url: str | None,
    name: str | None,
) -> Drafting:
    """From a command's options. Raises InvalidRequest naming the option."""
    import msgspec

    from ganglion.cli.settings import parse_bytes

    if (url is None) != (name is None):
        raise InvalidRequest("--verifier URL and --as NAME come together", param="verifier")
    try:
        document = {
            "mode": mode, "away": away, "wait_s": wait_s, "window_tokens": window, "url": url or "",
            "target": name or "", "memory_bytes": parse_bytes(memory) if memory else 0,
        }  # fmt: skip
        return msgspec.convert(document, Drafting)
    except (msgspec.ValidationError, ValueError) as error:
        raise InvalidRequest(f"drafting options: {error}", param="draft") from error


def drafting_for(model: str, drafting: Drafting) -> Drafting:
    """The same way of drafting, for the deployment of this name."""
    import msgspec

    return msgspec.structs.replace(drafting, target=model)


async def deploy_drafter(root: Path, line: Admin, model: str, drafting: Drafting, *, device: str) -> str:
    """Have `device` (name or node id; empty: the agent here) draft with `model`; its name, once it is ready."""
    from ganglion.cli import deploying
    from ganglion.cli.sourcing import checkpoint_of

    agent = deploying.local_agent(root)
    found = await checkpoint_of(model)
    manifest = await deploying.manifest_for(root, line, model, found, deploying.DRAFTER)
    options = PlanOptions(devices=(device or agent.node_id,), sessions=SESSIONS, drafting=drafting)
    await deploying.deploy(line, deploying.request_of(manifest, options, agent))
    return manifest.name


@dataclass(frozen=True)
class Joining:
    """What `ganglion join --draft` was asked for."""

    name: str | None
    token: JoinToken | None
    coordinator: str | None
    drafter: str
    drafting: Drafting
    ready_file: Path | None


async def join_and_draft(root: Path, chosen: Settings, asked: Joining) -> None:
    """Be a device that drafts, with an API of its own, until cancelled."""
    from ganglion.agent.supervisor_messages import Offer
    from ganglion.cli.running import agent

    check_gateway_token(root, asked.token)  # before the agent spends its part of it
    enrolled = await enrolled_agent(
        root, name=asked.name, token=asked.token, coordinator=asked.coordinator, may_wait=True
    )
    identity = enrolled.identity
    output.step(f"{identity.name} is enrolled with the coordinator at {identity.coordinator}")
    await beside_gateway(root, identity.name, asked.token, asked.coordinator)
    manifest = await _cut(root, enrolled, asked.drafter)
    output.step(f"{manifest.name} is here to draft")
    output.doing("measuring this machine and connecting")
    child = _gateway_child(root, identity.name, identity.node_id, chosen)
    try:
        api = str((await child.start())["api"])
        output.step(f"the API of this device is at {api}/v1")
        async with asyncio.TaskGroup() as group:
            group.create_task(keep(child))
            await agent(
                root,
                enrolled,
                chosen,
                ready_file=asked.ready_file,
                offer=Offer(to_json(manifest), to_json(asked.drafting)),
                on_answer=_Told(api),
                about={"api": api},
            )
    except* GanglionError as errors:
        raise first_error(errors) from None
    finally:
        await asyncio.shield(child.stop())


class _Told:
    """Says on the terminal what came of the offer."""

    def __init__(self, api: str) -> None:
        self.api = api

    def __call__(self, target: str, refused: str) -> None:
        if refused:
            output.warn(f"this device does not draft{f' for {target}' if target else ''}: {refused}")
            return
        body = f'{{"model": "{target}", "prompt": "{PROMPT}", "max_tokens": 64, "temperature": 0}}'
        output.step(f"this device drafts for {target}: ask it here")
        output.say(f"  try      curl -s {self.api}/v1/completions -H 'Content-Type: application/json' \\")
        output.say(f"             -d {shlex.quote(body)}")


async def _cut(root: Path, enrolled: Enrolled, model: str) -> Manifest:
    from ganglion.cli import deploying
    from ganglion.cli.sourcing import checkpoint_of
    from ganglion.wire.errors import NotFound

    found = await checkpoint_of(model)
    if found is None:
        raise NotFound(
            f"unknown model {model!r}: a folder, an embedded model, or a repository as org/name", param="drafter"
        )
    home = enrolled.home.store.parent  # asking for the store makes it, open to nobody else
    return deploying.cut(root, home, found, wish=deploying.DRAFTER)


def _gateway_child(root: Path, name: str, node_id: str, chosen: Settings) -> Child:
    port = chosen.port if chosen.port == 0 else free_port(chosen.host, chosen.port)
    arguments = ["--home", str(root), "--name", name, "--prefers", node_id]
    arguments += ["--host", chosen.host, "--port", str(port)]
    logs = make_private_folder(root / LOGS)
    return Child("gateway", arguments, log=logs / f"gateway-{name}.log", ready_file=logs / f"gateway-{name}.ready")


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nobody uses; raises Conflict."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in range(first, min(first + PORTS_TRIED, 65536)):
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            if error.errno not in {errno.EADDRINUSE, errno.EACCES}:
                raise Conflict(f"the API port on {host} cannot be opened ({error.strerror})") from error
        else:
            return port
    raise Conflict(f"the API ports {first} to {first + PORTS_TRIED - 1} on {host} are in use; choose one with --port")
