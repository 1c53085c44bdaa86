"""What `ganglion up` runs: coordinator, agent and gateway as children, enrolled here, restarted when they die."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any, Final

from ganglion.cli import output
from ganglion.cli.owner import agents_home, enrol_here, ensure_owner_key, gateway_home, owner_identity
from ganglion.cli.processes import Child, RestartPolicy
from ganglion.cli.settings import Settings
from ganglion.wire.certificates import Role
from ganglion.wire.errors import GanglionError, Unavailable
from ganglion.wire.home import Home, make_private_folder

LOGS: Final = "log"


def _import_deploying(*, cutting: bool) -> None:
    """What comes next, imported in the time that the last child takes to start; `cutting`: a home without the demo."""
    import ganglion.cli.deploying

    if cutting:
        import ganglion.partitioner.cut  # noqa: F401


def first_error(errors: BaseExceptionGroup[GanglionError]) -> GanglionError:
    """The first of a group that tasks ended with."""
    first = errors.exceptions[0]
    return first_error(first) if isinstance(first, BaseExceptionGroup) else first


async def keep(child: Child) -> None:
    """Restart what dies, with growing pauses; raises Unavailable when it dies too often."""
    policy = RestartPolicy()
    while True:
        code = await child.wait()
        output.warn(f"the {child.role} ended unexpectedly with exit code {code}; {child.last_words()}")
        pause_s = policy.died(time.monotonic())
        while True:
            if pause_s is None:
                raise Unavailable(f"the {child.role} dies again and again; its log is {child.log}")
            output.doing(f"starting the {child.role} again in {pause_s:.0f} s")
            await asyncio.sleep(pause_s)
            with contextlib.suppress(Unavailable):
                await child.stop()
                await child.start()
                output.step(f"the {child.role} runs again")
                break
            pause_s = policy.died(time.monotonic())


class Stack:
    """The three roles of one machine. `start`, then `watch` until it raises or is cancelled, then always `stop`."""

    def __init__(self, root: Path, chosen: Settings, *, name: str, mdns: bool) -> None:
        self.root = root
        self.chosen = chosen
        self.name = name
        self.api = ""
        self._mdns = mdns
        self._agent_id = ""
        self._children: list[Child] = []

    async def start(self) -> None:
        """Start all three, saying each step. Raises what stood in the way, with the log's last lines."""
        key, made = ensure_owner_key(self.root)
        output.step(
            f"owner key {'made' if made else 'found'}: {self.root / 'owner' / 'owner.key'} (it stays here; keep a copy)"
        )
        name, home = self.name, Home(agents_home(self.root) / self.name)
        # Beside the coordinator's start; the agent finds the figures in its home.
        measuring = asyncio.create_task(self._measure(home))
        try:
            ready = await self._start("coordinator", self._coordinator_arguments())
            output.step(
                f"coordinator: devices enrol at port {ready['enrolment_port']}, its own port is {ready['fleet_port']}"
            )
            await owner_identity(self.root)
            agent = await enrol_here(self.root, key, role=Role.AGENT, name=name, home=home.path)
            self._agent_id = agent.node_id
            output.doing(f"agent {agent.name}: measuring this machine")
            await enrol_here(self.root, key, role=Role.GATEWAY, name=f"{name}-gateway", home=gateway_home(self.root))
            await measuring
        finally:
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
        self._first_key()
        async with asyncio.TaskGroup() as group:
            agents = group.create_task(self._start("agent", self._agent_arguments()))
            gateways = group.create_task(self._start("gateway", self._gateway_arguments()))
            output.step(f"agent {agent.name}: {(await agents)['summary']}")
            importing = group.create_task(asyncio.to_thread(_import_deploying, cutting=made))
            self.api = str((await gateways)["api"])
            output.step(f"gateway: the API is at {self.api}/v1")
            await importing

    async def watch(self) -> None:
        """Restart what dies, with growing pauses; raises Unavailable when one dies too often."""
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(keep(child))

    async def stop(self) -> None:
        """Stop what runs, the gateway first, so that no request meets half a system."""
        if self._children:
            output.doing(f"stopping {', '.join(child.role for child in reversed(self._children))}")
        for child in reversed(self._children):
            await child.stop()
        if self._children:
            output.step("stopped")
        self._children.clear()

    def _first_key(self) -> None:
        """Make an API key where one is needed and none is there; printed here, so that no log holds it."""
        from ganglion.gateway.guard import is_loopback
        from ganglion.gateway.keys import create_key, list_keys

        home = Home(gateway_home(self.root))
        if not is_loopback(self.chosen.host) and not list_keys(home):
            output.step(f"API key, shown once: {create_key(home, 'first')}")

    async def _measure(self, home: Home) -> None:
        from ganglion.agent.probe import probe_device

        chosen = self.chosen
        await probe_device(
            home.path, store=home.store, threads=chosen.threads or 0, memory_budget_bytes=chosen.memory or 0
        )

    async def _start(self, role: str, arguments: list[str]) -> dict[str, Any]:
        logs = make_private_folder(self.root / LOGS)
        child = Child(role, arguments, log=logs / f"{role}.log", ready_file=logs / f"{role}.ready")
        self._children.append(child)
        return await child.start()

    def _common(self) -> list[str]:
        return ["--home", str(self.root)]

    def _coordinator_arguments(self) -> list[str]:
        chosen = self.chosen
        ports = ["--fleet-port", str(chosen.fleet_port), "--enrolment-port", str(chosen.enrolment_port)]
        return [*self._common(), "--bind", chosen.bind, *ports, *([] if self._mdns else ["--no-mdns"])]

    def _agent_arguments(self) -> list[str]:
        chosen = self.chosen
        arguments = [*self._common(), "--name", self.name, "--bind", chosen.bind, "--lanes", chosen.lanes]
        if chosen.threads is not None:
            arguments += ["--threads", str(chosen.threads)]
        if chosen.memory is not None:
            arguments += ["--memory", str(chosen.memory)]
        if chosen.store is not None:
            arguments += ["--store", str(chosen.store)]
        if chosen.executor != "ort":
            arguments += ["--executor", chosen.executor]
        return arguments

    def _gateway_arguments(self) -> list[str]:
        address = ["--host", self.chosen.host, "--port", str(self.chosen.port)]
        return [*self._common(), *address, "--prefers", self._agent_id]
