"""Enrolling what this machine runs: a free home for an agent, a token or a wait for approval."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509

from ganglion.cli import output
from ganglion.cli.owner import (
    agents_home,
    coordinator_home,
    device_name,
    enrol_here,
    gateway_home,
    gateways_home,
    keys_fingerprint,
    load_owner_key,
    make_root,
    owner_home,
)
from ganglion.cli.serving import read_serving
from ganglion.wire import discovery
from ganglion.wire.certificates import Role, authority_pin
from ganglion.wire.enrol import enrol, load_or_make_keys
from ganglion.wire.errors import Conflict, NotFound
from ganglion.wire.home import Home
from ganglion.wire.identity import Identity
from ganglion.wire.tokens import JoinToken

DISCOVERY_S: Final = 5.0
HOMES: Final = 64


@dataclass(frozen=True)
class Enrolled:
    """A home and who it is."""

    home: Home
    identity: Identity


async def enrolled_agent(
    root: Path, *, name: str | None, token: JoinToken | None, coordinator: str | None, may_wait: bool = False
) -> Enrolled:
    """A free agent home of this machine, enrolled: as it is, or with `token`, or (`may_wait`) once the owner approves.

    Raises Conflict (every home is in use), NotFound (not enrolled and neither), Unauthenticated, Unreachable.
    """
    home = free_home(root, name or device_name(), token, fixed=name is not None)
    identity = enrolled_identity(home)
    if identity is not None:
        return Enrolled(home, identity)
    if token is None and not may_wait:
        raise NotFound(f"{home.path} is not enrolled: give a join token with --token, or run `ganglion join` once")
    with home.lock():
        identity = await _enrol_agent(home, token, coordinator)
    return Enrolled(home, identity)


async def _enrol_agent(home: Home, token: JoinToken | None, coordinator: str | None) -> Identity:
    if token is None and coordinator is None:
        output.doing("looking for a coordinator on the local network")
        coordinator = (await discovery.find(timeout_s=DISCOVERY_S)).addresses[0]
    name = home.path.name
    keys = load_or_make_keys(home.identity)

    def pending(authority: str, node_id: str) -> None:
        output.warn(
            f"waiting for the owner's approval: on the owner's machine run\n    ganglion device approve {node_id}"
        )
        output.say(
            f"  fingerprint of this device   {keys_fingerprint(keys.tls_public_key_der, keys.sealing_public_key)}"
        )
        output.say(f"  fingerprint of the authority {authority}")

    return await enrol(
        home.identity, token=token, coordinator=coordinator, role=Role.AGENT, name=name, on_pending=pending
    )


async def enrolled_gateway(root: Path, token: JoinToken | None, coordinator: str | None) -> Identity:
    """The gateway's identity: as it is, or with `token`, or by the owner's key of this machine."""
    home = Home(gateway_home(make_root(root)))
    identity = enrolled_identity(home)
    if identity is not None:
        return identity
    name = f"{device_name()}-gateway"
    if token is None:
        return await enrol_here(root, load_owner_key(root), role=Role.GATEWAY, name=name, home=home.path)
    return await enrol(home.identity, token=token, coordinator=coordinator, role=Role.GATEWAY, name=name)


def check_gateway_token(root: Path, token: JoinToken | None) -> None:
    """Raise InvalidRequest for a token that lets no gateway in, where this machine cannot vouch for one itself."""
    if token is not None and not _owner_is_here(root):
        _ = token.for_gateway


async def beside_gateway(root: Path, name: str, token: JoinToken | None, coordinator: str | None) -> Enrolled:
    """The gateway beside the agent `name`: as it is, or by the owner's key where it is here, or with `token`.

    Without either it waits for the owner's approval.
    """
    home = Home(make_root(gateways_home(root)) / name)
    identity = enrolled_identity(home)
    if identity is not None and _is_of(identity, token):
        return Enrolled(home, identity)
    shown = f"{name}-gateway"
    with home.lock():
        if _owner_is_here(root):
            identity = await enrol_here(root, load_owner_key(root), role=Role.GATEWAY, name=shown, home=home.path)
            return Enrolled(home, identity)
        if token is None and coordinator is None:
            coordinator = (await discovery.find(timeout_s=DISCOVERY_S)).addresses[0]

        def pending(_: str, node_id: str) -> None:
            output.warn(f"its gateway waits for the owner's approval: ganglion device approve {node_id}")

        identity = await enrol(
            home.identity,
            token=token.for_gateway if token is not None else None,
            coordinator=coordinator,
            role=Role.GATEWAY,
            name=shown,
            on_pending=pending,
        )
    return Enrolled(home, identity)


def _owner_is_here(root: Path) -> bool:
    """Whether the owner's key and the coordinator are of this machine and root."""
    return (owner_home(root) / "owner.key").exists() and read_serving(coordinator_home(root)) is not None


def enrolled_identity(home: Home) -> Identity | None:
    """The identity of a home; None when it is not enrolled yet."""
    try:
        return Identity.load(home.identity)
    except NotFound:
        return None


def free_home(root: Path, name: str, token: JoinToken | None, *, fixed: bool) -> Home:
    """The first of `name`, `name-2`, … that is neither in use nor enrolled elsewhere; `fixed`: `name` or Conflict."""
    for number in itertools.count(1):
        home = Home(agents_home(make_root(root)) / (name if number == 1 else f"{name}-{number}"))
        try:
            with home.lock():
                if _is_of(enrolled_identity(home), token):
                    return home
            reason = f"{home.path} is enrolled with another coordinator; choose another --name"
        except Conflict as error:
            reason = error.message
        if fixed or number == HOMES:
            raise Conflict(reason)
    raise AssertionError("unreachable: the loop returns or raises")


def _is_of(identity: Identity | None, token: JoinToken | None) -> bool:
    if identity is None or token is None:
        return True
    return authority_pin(x509.load_pem_x509_certificate(identity.authority_pem)) == token.authority_pin
