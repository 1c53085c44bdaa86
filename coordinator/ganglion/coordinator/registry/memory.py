"""The registry in memory: the reference that the SQLite one is held against, and what quick tests use."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

from ganglion.coordinator.registry.interface import (
    BudgetRow,
    DeploymentRow,
    DeviceRow,
    ExpertRow,
    LinkRow,
    TokenRow,
    pending_full,
    unique_name,
)
from ganglion.wire.errors import Conflict, NotFound, PermissionDenied


class MemoryRegistry:
    """Dictionaries behind one lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._devices: dict[str, DeviceRow] = {}
        self._tokens: dict[str, TokenRow] = {}
        self._deployments: dict[str, DeploymentRow] = {}
        self._links: dict[tuple[str, str], LinkRow] = {}
        self._experts: dict[str, ExpertRow] = {}
        self._budgets: dict[str, BudgetRow] = {}
        self._quality_profile = b""
        self._routes: dict[str, bytes] = {}

    def device(self, node_id: str) -> DeviceRow:
        """See Registry."""
        with self._lock:
            if node_id not in self._devices:
                raise NotFound(f"no device {node_id}")
            return self._devices[node_id]

    def devices(self) -> tuple[DeviceRow, ...]:
        """See Registry."""
        with self._lock:
            return tuple(sorted(self._devices.values(), key=lambda row: row.name))

    def _named(self, row: DeviceRow) -> DeviceRow:
        known = self._devices.get(row.node_id)
        if known is not None:
            return replace(row, name=known.name)
        return replace(row, name=unique_name(row.name, (device.name for device in self._devices.values())))

    def ask(self, row: DeviceRow, *, limit: int, expired_before_unix_s: float) -> DeviceRow:
        """See Registry."""
        with self._lock:
            for node_id, device in list(self._devices.items()):
                expired = device.seen_unix_s < expired_before_unix_s
                if device.standing == "pending" and expired and node_id != row.node_id:
                    del self._devices[node_id]
            known = self._devices.get(row.node_id)
            if known is not None and known.standing != "pending":
                raise Conflict(f"device {known.name} is {known.standing}")
            if known is None and sum(device.standing == "pending" for device in self._devices.values()) >= limit:
                raise pending_full(limit)
            named = replace(self._named(row), standing="pending")
            self._devices[row.node_id] = named
            return named

    def enrol(self, row: DeviceRow, token: TokenRow | None) -> DeviceRow:
        """See Registry."""
        with self._lock:
            known = self._devices.get(row.node_id)
            if known is not None and known.standing == "revoked":
                raise PermissionDenied(f"device {known.name} is revoked")
            if token is not None:
                held = self._tokens.get(token.token_id, token)
                if held.revoked:
                    raise PermissionDenied(f"token {held.token_id} is revoked")
                if held.used >= held.uses:
                    raise PermissionDenied(f"token {held.token_id} is spent: {held.used} of {held.uses} uses")
                self._tokens[held.token_id] = replace(held, used=held.used + 1)
            named = replace(self._named(row), standing="enrolled")
            self._devices[row.node_id] = named
            return named

    def put_record(self, node_id: str, *, record: bytes, label: int) -> DeviceRow:
        """See Registry."""
        with self._lock:
            known = self.device(node_id)
            if known.standing == "revoked":
                raise PermissionDenied(f"device {known.name} is revoked")
            self._devices[node_id] = replace(known, record=record, label=label, standing="enrolled")
            return self._devices[node_id]

    def put_certificate(self, node_id: str, serial: str) -> DeviceRow:
        """See Registry."""
        with self._lock:
            self._devices[node_id] = replace(self.device(node_id), certificate_serial=serial)
            return self._devices[node_id]

    def rename(self, node_id: str, name: str) -> DeviceRow:
        """See Registry."""
        with self._lock:
            known = self.device(node_id)
            if any(device.name == name and device.node_id != node_id for device in self._devices.values()):
                raise Conflict(f"another device is called {name!r}: choose another name", param="name")
            self._devices[node_id] = replace(known, name=name)
            return self._devices[node_id]

    def revoke(self, node_id: str) -> DeviceRow:
        """See Registry."""
        with self._lock:
            self._devices[node_id] = replace(self.device(node_id), standing="revoked")
            return self._devices[node_id]

    def tokens(self) -> tuple[TokenRow, ...]:
        """See Registry."""
        with self._lock:
            return tuple(sorted(self._tokens.values(), key=lambda row: row.token_id))

    def register_token(self, row: TokenRow) -> None:
        """See Registry."""
        with self._lock:
            self._tokens.setdefault(row.token_id, row)

    def revoke_token(self, token_id: str) -> TokenRow:
        """See Registry."""
        with self._lock:
            if token_id not in self._tokens:
                raise NotFound(f"no token {token_id}: ganglion token ls shows those that are known", param="token_id")
            self._tokens[token_id] = replace(self._tokens[token_id], revoked=True)
            return self._tokens[token_id]

    def deployments(self) -> tuple[DeploymentRow, ...]:
        """See Registry."""
        with self._lock:
            return tuple(sorted(self._deployments.values(), key=lambda row: (row.created_unix_s, row.deployment)))

    def _deployment(self, deployment: str) -> DeploymentRow:
        if deployment not in self._deployments:
            raise NotFound(f"no deployment {deployment}")
        return self._deployments[deployment]

    def put_deployment(self, row: DeploymentRow) -> None:
        """See Registry."""
        with self._lock:
            if row.deployment in self._deployments:
                raise Conflict(f"deployment {row.deployment} is known already")
            self._deployments[row.deployment] = row

    def begin_epoch(self, deployment: str, epoch: int, devices: Iterable[str]) -> None:
        """See Registry."""
        with self._lock:
            known = self._deployment(deployment)
            if epoch <= known.epoch:
                raise Conflict(f"epoch {epoch} of deployment {deployment} is not above {known.epoch}")
            self._deployments[deployment] = replace(known, epoch=epoch, devices=tuple(devices))

    def put_holder(self, deployment: str, holder: str) -> None:
        """See Registry."""
        with self._lock:
            self._deployments[deployment] = replace(self._deployment(deployment), holder=holder)

    def remove_deployment(self, deployment: str) -> None:
        """See Registry."""
        with self._lock:
            self._deployments.pop(deployment, None)

    def links(self) -> tuple[LinkRow, ...]:
        """See Registry."""
        with self._lock:
            return tuple(self._links[key] for key in sorted(self._links))

    def put_links(self, rows: Iterable[LinkRow]) -> None:
        """See Registry."""
        with self._lock:
            for row in rows:
                self._links[row.source, row.target] = row

    def experts(self) -> tuple[ExpertRow, ...]:
        """See Registry."""
        with self._lock:
            return tuple(self._experts[name] for name in sorted(self._experts))

    def put_expert(self, row: ExpertRow) -> None:
        """See Registry."""
        with self._lock:
            self._experts[row.name] = row

    def put_measured(self, name: str, measured: bytes) -> None:
        """See Registry."""
        with self._lock:
            if name in self._experts:
                self._experts[name] = replace(self._experts[name], measured=measured)

    def remove_expert(self, name: str) -> None:
        """See Registry."""
        with self._lock:
            self._experts.pop(name, None)

    def budgets(self) -> tuple[BudgetRow, ...]:
        """See Registry."""
        with self._lock:
            return tuple(self._budgets[name] for name in sorted(self._budgets))

    def put_budget(self, row: BudgetRow) -> None:
        """See Registry."""
        with self._lock:
            self._budgets[row.name] = row

    def remove_budget(self, name: str) -> None:
        """See Registry."""
        with self._lock:
            self._budgets.pop(name, None)

    def quality_profile(self) -> bytes:
        """See Registry."""
        return self._quality_profile

    def put_quality_profile(self, profile: bytes) -> None:
        """See Registry."""
        self._quality_profile = profile

    def routes(self, manifest_digest: str) -> bytes:
        """See Registry."""
        with self._lock:
            return self._routes.get(manifest_digest, b"")

    def put_routes(self, manifest_digest: str, report: bytes) -> None:
        """See Registry."""
        with self._lock:
            self._routes[manifest_digest] = report

    def close(self) -> None:
        """See Registry."""
