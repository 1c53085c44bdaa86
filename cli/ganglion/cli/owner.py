"""The owner's side of trust: the owner key, join tokens, and this command line's own certificate (role owner).

The owner key stays in `owner/`; of it only the public half is ever given to the coordinator.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from pathlib import Path
from typing import Any, Final

import psutil

from ganglion.cli.serving import read_serving
from ganglion.proto import identity_pb2
from ganglion.wire.address import join_address
from ganglion.wire.certificates import Role, TrustLabel, fingerprint
from ganglion.wire.enrol import enrol
from ganglion.wire.errors import NotFound, Unavailable
from ganglion.wire.home import Home, write_secret
from ganglion.wire.identity import Identity, OwnerKey
from ganglion.wire.tokens import JoinToken, mint

TOKEN_LIFETIME_S: Final = 24 * 3600.0
OWN_TOKEN_LIFETIME_S: Final = 300.0
TOKEN_ADDRESSES: Final = 6


def make_root(root: Path) -> Path:
    """The folder of all homes, made 0700 when missing; what lies in it is private whoever made the folder itself."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return root


def owner_home(root: Path) -> Path:
    """The folder of the owner's key and of the command line's identity."""
    return root / "owner"


def coordinator_home(root: Path) -> Path:
    """The coordinator's home."""
    return root / "coordinator"


def gateway_home(root: Path) -> Path:
    """The gateway's home."""
    return root / "gateway"


def gateways_home(root: Path) -> Path:
    """The folder of the homes of gateways beside agents that draft."""
    return root / "gateways"


def agents_home(root: Path) -> Path:
    """The folder of the homes of the agents of this machine."""
    return root / "agents"


def load_owner_key(root: Path) -> OwnerKey:
    """The owner's key. Raises NotFound when this machine has none."""
    path = owner_home(root) / "owner.key"
    if not path.exists():
        raise NotFound(
            f"there is no owner key at {path}: run this where `ganglion up` runs, or name its folder with --home"
        )
    return OwnerKey.load(path)


def ensure_owner_key(root: Path) -> tuple[OwnerKey, bool]:
    """The owner's key, and whether it was made just now; the local coordinator is given its public half."""
    path = Home(owner_home(make_root(root))).path / "owner.key"
    made = not path.exists()
    if made:
        OwnerKey.generate().save(path)
    key = OwnerKey.load(path)
    public = Home(coordinator_home(root)).path / "owner.pub"
    if not public.exists():
        write_secret(public, key.public_key)
    return key, made


def mint_here(
    root: Path,
    key: OwnerKey,
    *,
    role: Role = Role.AGENT,
    label: TrustLabel = TrustLabel.OWNER,
    lifetime_s: float = TOKEN_LIFETIME_S,
    uses: int = 1,
    gateway: bool = False,
) -> JoinToken:
    """A token for the coordinator that runs under `root`; `gateway`: one may come beside each agent.

    Raises Unavailable when none runs.
    """
    serving = read_serving(coordinator_home(root))
    if serving is None:
        raise Unavailable("no coordinator runs here; start it with `ganglion up`, or name its folder with --home")
    addresses = [join_address(host, int(serving["enrolment_port"])) for host in reachable_hosts(str(serving["bind"]))]
    return mint(
        key,
        addresses=addresses,
        authority_pin=bytes.fromhex(serving["authority_pin"]),
        label=label,
        role=role,
        lifetime_s=lifetime_s,
        uses=uses,
        gateway=gateway,
    )


async def enrol_here(root: Path, key: OwnerKey, *, role: Role, name: str, home: Path) -> Identity:
    """The identity in `home`, enrolled with a token of our own when it has none yet."""
    folder = Home(home).identity
    try:
        return Identity.load(folder)
    except NotFound:
        token = mint_here(root, key, role=role, lifetime_s=OWN_TOKEN_LIFETIME_S)
        nearest = token.addresses[-1]  # loopback where there is one
        return await enrol(folder, token=token, coordinator=nearest, role=role, name=name)


async def owner_identity(root: Path) -> Identity:
    """This command line's identity; enrols it first where the owner's key and the coordinator are on this machine."""
    key = load_owner_key(root)
    return await enrol_here(root, key, role=Role.OWNER, name=f"{device_name()}-owner", home=owner_home(root))


def sign_with_label(root: Path, signed: identity_pb2.SignedRecord, label: TrustLabel) -> identity_pb2.SignedRecord:
    """The same device record under `label`, signed by the owner's key."""
    record = identity_pb2.DeviceRecord.FromString(signed.record)
    record.label = label.number
    return load_owner_key(root).sign_record(record)


def device_name() -> str:
    """This machine's host name as a device name: lower case letters, digits and hyphens."""
    short = socket.gethostname().split(".")[0].lower()
    clean = "".join(each if each.isascii() and each.isalnum() else "-" for each in short).strip("-")[:48]
    return clean or "device"


def reachable_hosts(bind: str) -> list[str]:
    """Addresses by which a port bound to `bind` can be reached, those of the network first and loopback last."""
    bound = ipaddress.ip_address(bind)
    if not bound.is_unspecified:
        return [bind]
    families = {socket.AF_INET} if bound.version == 4 else {socket.AF_INET, socket.AF_INET6}
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        _ip(address)
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
        for address in addresses
        if address.family in families
    ]
    outside = [str(each) for each in found if not (each.is_loopback or each.is_link_local)]
    return [*outside[: TOKEN_ADDRESSES - 1], "127.0.0.1"]


def _ip(address: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.address.split("%")[0])


def record_fingerprint(signed: identity_pb2.SignedRecord) -> str:
    """What people compare before they approve a device: over both of its public keys."""
    record = identity_pb2.DeviceRecord.FromString(signed.record)
    return keys_fingerprint(record.tls_public_key, record.sealing_public_key)


def keys_fingerprint(tls_public_key_der: bytes, sealing_public_key: bytes) -> str:
    """The same on the device's side. The node id alone would leave the sealing key to whoever relays the record."""
    return fingerprint(hashlib.sha256(tls_public_key_der + sealing_public_key).digest()[:16])
