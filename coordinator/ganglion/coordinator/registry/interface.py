"""What the coordinator remembers, as frozen rows and one interface. Methods are atomic, durable when they return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from ganglion.wire.errors import Exhausted

Standing = Literal["pending", "enrolled", "revoked"]


@dataclass(frozen=True, kw_only=True)
class DeviceRow:
    """One enrolled, pending or revoked node.

    record: serialized SignedRecord (unsigned while pending). role, label: numbers of the protocol's enums.
    certificate_serial: hexadecimal; "" while pending. seen_unix_s: when it enrolled, or last asked while pending.
    """

    node_id: str
    name: str
    role: int
    label: int
    record: bytes
    standing: Standing
    certificate_serial: str
    seen_unix_s: float


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One join token. grant: serialized SignedGrant."""

    token_id: str
    grant: bytes
    expires_unix_s: int
    uses: int
    used: int = 0
    revoked: bool = False


@dataclass(frozen=True, kw_only=True)
class DeploymentRow:
    """One deployment that is wanted. manifest, options: canonical JSON. devices: node ids of its last plan.

    drafter: the manifest of the model that guesses at its lead; empty without one.
    """

    deployment: str
    model: str
    manifest_digest: str
    manifest: bytes
    options: bytes
    holder: str
    epoch: int
    devices: tuple[str, ...]
    created_unix_s: float
    drafter: bytes = b""


@dataclass(frozen=True, kw_only=True)
class LinkRow:
    """What `source` measured towards `target`: seconds of a small round trip, bytes per second."""

    source: str
    target: str
    reachable: bool
    rtt_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class ExpertRow:
    """One edge expert. spec: serialized ExpertSpec. measured: its latest answers, as selection/experts.py has them."""

    name: str
    spec: bytes
    measured: bytes = b""


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """What a class of requests may cost. budget: serialized Budget."""

    name: str
    budget: bytes


class Registry(Protocol):
    """Where rows live. Node ids, token ids, deployment ids and names are unique."""

    def device(self, node_id: str) -> DeviceRow:
        """The row of `node_id`; raises NotFound."""
        ...

    def devices(self) -> tuple[DeviceRow, ...]:
        """Every device, by name."""
        ...

    def ask(self, row: DeviceRow, *, limit: int, expired_before_unix_s: float) -> DeviceRow:
        """Note a pending device, with its name made unique, or its asking again; expired ones are forgotten first.

        Raises Exhausted beyond `limit` pending devices, Conflict when the node is enrolled or revoked.
        """
        ...

    def enrol(self, row: DeviceRow, token: TokenRow | None) -> DeviceRow:
        """Enrol a device and, in the same transaction, spend one use of its token; the name is made unique.

        An unknown token is registered at its first use. Raises PermissionDenied when the node or the token is revoked
        or the token's uses are spent.
        """
        ...

    def put_record(self, node_id: str, *, record: bytes, label: int) -> DeviceRow:
        """Put a record in force; a pending device is enrolled by it. Raises NotFound, PermissionDenied when revoked."""
        ...

    def put_certificate(self, node_id: str, serial: str) -> DeviceRow:
        """Note the serial of the newest certificate; raises NotFound."""
        ...

    def rename(self, node_id: str, name: str) -> DeviceRow:
        """Give a name; raises NotFound, Conflict when another device has it."""
        ...

    def revoke(self, node_id: str) -> DeviceRow:
        """Revoke for good; raises NotFound. Repeating it changes nothing."""
        ...

    def tokens(self) -> tuple[TokenRow, ...]:
        """Every token, by id."""
        ...

    def register_token(self, row: TokenRow) -> None:
        """Note a token; one that is known already stays as it is."""
        ...

    def revoke_token(self, token_id: str) -> TokenRow:
        """Revoke a token; raises NotFound."""
        ...

    def deployments(self) -> tuple[DeploymentRow, ...]:
        """Every wanted deployment, in order of creation."""
        ...

    def put_deployment(self, row: DeploymentRow) -> None:
        """Note a new deployment; raises Conflict when its id is known."""
        ...

    def begin_epoch(self, deployment: str, epoch: int, devices: Iterable[str]) -> None:
        """Note the epoch that begins; raises NotFound, Conflict unless it is higher than every one before."""
        ...

    def put_holder(self, deployment: str, holder: str) -> None:
        """Note who holds the pieces; raises NotFound."""
        ...

    def remove_deployment(self, deployment: str) -> None:
        """Forget a deployment that is stopped; an unknown one is no error."""
        ...

    def links(self) -> tuple[LinkRow, ...]:
        """Every measured link, by source and target."""
        ...

    def put_links(self, rows: Iterable[LinkRow]) -> None:
        """Note measurements, each in place of the one before."""
        ...

    def experts(self) -> tuple[ExpertRow, ...]:
        """Every edge expert, by name."""
        ...

    def put_expert(self, row: ExpertRow) -> None:
        """Note an expert, in place of one of its name."""
        ...

    def put_measured(self, name: str, measured: bytes) -> None:
        """Note what was measured of an expert; an unknown one is no error."""
        ...

    def remove_expert(self, name: str) -> None:
        """Forget an expert; an unknown one is no error."""
        ...

    def budgets(self) -> tuple[BudgetRow, ...]:
        """What every class of requests may cost, by name."""
        ...

    def put_budget(self, row: BudgetRow) -> None:
        """Note a budget, in place of one of its name."""
        ...

    def remove_budget(self, name: str) -> None:
        """Forget a budget; an unknown one is no error."""
        ...

    def quality_profile(self) -> bytes:
        """The gates' latest view of the experts, serialized QualityProfile; empty before the first."""
        ...

    def put_quality_profile(self, profile: bytes) -> None:
        """Note it in place of the one before."""
        ...

    def routes(self, manifest_digest: str) -> bytes:
        """What was reported of a mixture's routes, a serialized RouteReport; b"" where nothing was."""
        ...

    def put_routes(self, manifest_digest: str, report: bytes) -> None:
        """Note routes, in place of those before."""
        ...

    def close(self) -> None:
        """Let go of what is open."""
        ...


NAME_CHARACTERS = 63


def unique_name(name: str, taken: Iterable[str]) -> str:
    """`name`, or `name-2`, `name-3`, ... : the first that is not in `taken`, at most 63 characters."""
    known = set(taken)
    if name not in known:
        return name
    for number in range(2, len(known) + 3):
        suffix = f"-{number}"
        candidate = name[: NAME_CHARACTERS - len(suffix)] + suffix
        if candidate not in known:
            return candidate
    raise Exhausted(f"no free name like {name!r} among {len(known)}")  # unreachable: more numbers than names


def pending_full(limit: int) -> Exhausted:
    """The error of one pending device too many."""
    return Exhausted(f"{limit} devices wait for approval already: approve or revoke some (ganglion device ls)")
