"""The three roles as the rooms run them, with `serving.json` for the commands around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from ganglion.cli import output
from ganglion.cli.admin import coordinator_address
from ganglion.cli.joining import Enrolled
from ganglion.cli.output import human_bytes
from ganglion.cli.owner import coordinator_home, reachable_hosts
from ganglion.cli.serving import read_serving, serving
from ganglion.cli.settings import Settings
from ganglion.wire.address import join_address
from ganglion.wire.certificates import authority_pin
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity
from ganglion.wire.nouns import DeviceProfile

if TYPE_CHECKING:
    from ganglion.agent.supervisor import OnAnswer
    from ganglion.agent.supervisor_messages import Offer


async def coordinator(
    home: Home, chosen: Settings, *, mdns: bool, record: Path | None, ready_file: Path | None
) -> None:
    """The coordinator until cancelled."""
    from ganglion.coordinator.run import Ready, run_coordinator

    with serving(home.path, ready_file=ready_file) as announce:

        def ready(it: Ready) -> None:
            announce(
                {
                    "role": "coordinator",
                    "bind": it.bind,
                    "fleet_port": it.fleet_port,
                    "enrolment_port": it.enrolment_port,
                    "authority_pin": it.authority_pin.hex(),
                }
            )
            output.step(f"devices enrol at port {it.enrolment_port}; the coordinator's own port is {it.fleet_port}")

        await run_coordinator(
            home,
            bind=chosen.bind,
            fleet_port=chosen.fleet_port,
            enrolment_port=chosen.enrolment_port,
            recorder=record,
            ready=ready,
            discovery=mdns,
        )


async def agent(
    root: Path,
    enrolled: Enrolled,
    chosen: Settings,
    *,
    ready_file: Path | None,
    offer: Offer | None = None,
    on_answer: OnAnswer | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """An agent until cancelled. `offer`: to draft, and `on_answer` what came of it. `about`: for others here."""
    from ganglion.agent.supervisor import AgentReady, run_agent

    home = enrolled.home
    identity = where_it_is_now(root, home, enrolled.identity)
    with serving(home.path, ready_file=ready_file) as announce:

        def ready(it: AgentReady) -> None:
            summary = summary_of(it.profile)
            announce(
                {"role": "agent", "name": identity.name, "node_id": identity.node_id, "address": it.piece_address}
                | {"summary": summary, **(about or {})}
            )
            output.step(f"{identity.name} is a device: {summary}")

        await run_agent(
            home,
            bind=chosen.bind,
            threads=chosen.threads or 0,
            memory_budget_bytes=chosen.memory or 0,
            store_budget_bytes=chosen.store or 0,
            piece_port=chosen.piece_port,
            bandwidth_bytes_per_s=chosen.bandwidth or 0,
            lanes=chosen.lanes,
            offer=offer,
            on_answer=on_answer,
            executor=chosen.executor,
            ready=ready,
        )


def summary_of(profile: DeviceProfile) -> str:
    """One line about what a device can do, as measured."""
    return (
        f"{profile.threads} of {profile.cores} cores, {human_bytes(profile.memory_budget_bytes)} for models, "
        f"weights at {human_bytes(int(profile.memory_bytes_per_s))}/s"
    )


def where_it_is_now(root: Path, home: Home, identity: Identity) -> Identity:
    """The identity with the address of its coordinator, where that runs on this machine and its port has changed."""
    address = coordinator_address(root)
    about = read_serving(coordinator_home(root))
    if address is None or about is None or address == identity.coordinator:
        return identity
    authority = x509.load_pem_x509_certificate(identity.authority_pem)
    if authority_pin(authority).hex() != about["authority_pin"]:
        return identity
    moved = dataclasses.replace(identity, coordinator=address)
    moved.save(home.identity)
    return moved


async def gateway(
    root: Path, home: Home, identity: Identity, chosen: Settings, *, prefers: str, ready_file: Path | None
) -> None:
    """A gateway until cancelled; `prefers`: node id of the agent beside it."""
    from ganglion.gateway.serve import Listening, run_gateway

    identity = where_it_is_now(root, home, identity)
    with serving(home.path, ready_file=ready_file) as announce:

        def ready(listening: Listening) -> None:
            api = f"http://{join_address(reachable_hosts(chosen.host)[0], listening.port)}"
            announce({"role": "gateway", "api": api, "node_id": identity.node_id})
            output.step(f"the API is at {api}/v1")
            if listening.new_key is not None:
                output.say(f"  API key, shown once: {listening.new_key}")

        await run_gateway(home, host=chosen.host, port=chosen.port, prefers=prefers, ready=ready)
