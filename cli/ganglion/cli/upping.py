"""The foreground of `ganglion up`: start the stack, deploy the demo, say how to use it, hand out join lines."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Final

from ganglion.cli import output
from ganglion.cli.admin import Admin, admin
from ganglion.cli.owner import load_owner_key, make_root, mint_here, owner_home
from ganglion.cli.serving import Announce, read_serving, serving
from ganglion.cli.settings import Settings
from ganglion.cli.stack import Stack, first_error
from ganglion.proto import admin_pb2
from ganglion.wire.errors import Conflict, GanglionError, Unavailable
from ganglion.wire.home import Home

DEMO: Final = "demo"
PROMPT: Final = "def read_lines(path):"
AGAIN_S: Final = 2.0
_HERE: Final = ("alive", "suspect")


async def run_here(root: Path, chosen: Settings, *, name: str, demo: bool, mdns: bool) -> None:
    """Everything of `up` until cancelled. Raises Conflict when this home is already up, and what stood in the way."""
    refuse_second(root)
    home = Home(owner_home(make_root(root)))
    with home.lock(), serving(home.path) as announce:
        announce({"role": "up", "ready": False})
        stack = Stack(root, chosen, name=name, mdns=mdns)
        try:
            await stack.start()
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(stack.watch())
                group.create_task(_serve_owner(root, stack, announce, demo=demo))
                await watching
        except* GanglionError as errors:
            raise first_error(errors) from None
        finally:
            await asyncio.shield(stack.stop())


def refuse_second(root: Path) -> None:
    """Raise Conflict, saying who runs, when this home is up."""
    running = read_serving(owner_home(root))
    if running is not None:
        where = f", API {running['api']}" if running.get("api") else ""
        raise Conflict(
            f"Ganglion is already up on {root} (process {running['pid']}{where}); "
            "`ganglion status` shows it, `ganglion down` ends it, --home DIR makes another"
        )


async def _serve_owner(root: Path, stack: Stack, announce: Announce, *, demo: bool) -> None:
    from ganglion.cli.deploying import Wish, ensure_ready  # the stack imported it while its children started

    async with admin(root) as line:
        model = None
        if demo:
            output.doing("deploying the embedded demo model")
            model = await ensure_ready(root, line, DEMO, name=None, wish=Wish())
            output.step(f"{model} is ready")
        _say_how(stack.api, model)
        await _offer(root, line)
    announce({"role": "up", "ready": True, "api": stack.api, "model": model})
    seen: dict[str, str] | None = None
    while True:
        try:
            async with admin(root) as line:
                async for state in line.watch():
                    seen = _say_changes(seen, state)
                    if state.tokens_unused == 0:
                        await _offer(root, line)
        except Unavailable:
            await asyncio.sleep(AGAIN_S)  # the coordinator restarts; the stack says so


def changes(before: dict[str, str] | None, now: dict[str, str]) -> list[tuple[str, str]]:
    """(device, what happened: joined, left, pending) between two looks at the devices' states by name, sorted."""
    found = []
    earlier = before or {}
    for name in sorted(earlier.keys() | now.keys()):
        was, is_now = earlier.get(name, ""), now.get(name, "")
        if is_now == "pending" != was:
            found.append((name, "pending"))
        elif is_now in _HERE and was not in _HERE and before is not None:
            found.append((name, "joined"))
        elif was in _HERE and is_now not in _HERE:
            found.append((name, "left"))
    return found


def _say_changes(before: dict[str, str] | None, state: admin_pb2.Fleetwide) -> dict[str, str]:
    from ganglion.cli.views import ROLE_AGENT

    now = {each.name: each.state for each in state.devices if each.role == ROLE_AGENT}
    for name, what in changes(before, now):
        if what == "joined":
            output.step(f"{name} joined; the next deployment uses it if that is faster or needed (ganglion plan MODEL)")
        elif what == "left":
            output.warn(f"{name} went away")
        else:
            output.warn(f"{name} waits for your approval: ganglion device approve {name}")
    return now


def _say_how(api: str, model: str | None) -> None:
    body = f'{{"model": "{model or "MODEL"}", "prompt": "{PROMPT}", "max_tokens": 64, "temperature": 0}}'
    output.say("")
    output.say("  API      " + f"{api}/v1   (any OpenAI client)")
    output.say(f"  try      curl -s {api}/v1/completions -H 'Content-Type: application/json' \\")
    output.say(f"             -d {shlex.quote(body)}")
    output.say(f'  or       ganglion run {model or "MODEL"} "{PROMPT}"')


async def _offer(root: Path, line: Admin) -> None:
    """Make a fresh join token known and print the line that uses it."""
    token = mint_here(root, load_owner_key(root))
    await line.register_token(admin_pb2.RegisterTokenRequest(grant=token.grant))
    output.say("  join     on another machine, or in another terminal (one device, 24 hours):")
    output.say(f"             ganglion join {token.encode()}")
    output.say("  draft    a device that drafts: ganglion token create --draft, and there: ganglion join --draft TOKEN")
    output.say("")
