"""The registry in SQLite: write-ahead log, every commit on the disk before it is believed, checked when opened."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

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
from ganglion.wire.errors import Conflict, Corrupt, NotFound, PermissionDenied, Unsupported

SCHEMA_VERSION: Final = 3
_BUSY_S: Final = 10.0

_SCHEMA: Final = """
CREATE TABLE devices (
    node_id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, role INTEGER NOT NULL, label INTEGER NOT NULL,
    record BLOB NOT NULL, standing TEXT NOT NULL CHECK (standing IN ('pending', 'enrolled', 'revoked')),
    certificate_serial TEXT NOT NULL, seen_unix_s REAL NOT NULL) STRICT;
CREATE TABLE tokens (
    token_id TEXT PRIMARY KEY, grant_ BLOB NOT NULL, expires_unix_s INTEGER NOT NULL, uses INTEGER NOT NULL,
    used INTEGER NOT NULL CHECK (used <= uses), revoked INTEGER NOT NULL) STRICT;
CREATE TABLE deployments (
    deployment TEXT PRIMARY KEY, model TEXT NOT NULL, manifest_digest TEXT NOT NULL, manifest BLOB NOT NULL,
    options BLOB NOT NULL, holder TEXT NOT NULL, epoch INTEGER NOT NULL, devices BLOB NOT NULL,
    created_unix_s REAL NOT NULL, drafter BLOB NOT NULL DEFAULT x'') STRICT;
CREATE TABLE links (
    source TEXT NOT NULL, target TEXT NOT NULL, reachable INTEGER NOT NULL, rtt_s REAL NOT NULL,
    bytes_per_s REAL NOT NULL, PRIMARY KEY (source, target)) STRICT;
"""
_SELECTION: Final = """
CREATE TABLE routes (manifest_digest TEXT PRIMARY KEY, report BLOB NOT NULL) STRICT;
CREATE TABLE experts (name TEXT PRIMARY KEY, spec BLOB NOT NULL, measured BLOB NOT NULL) STRICT;
CREATE TABLE budgets (name TEXT PRIMARY KEY, budget BLOB NOT NULL) STRICT;
CREATE TABLE quality_profile (only INTEGER PRIMARY KEY CHECK (only = 1), profile BLOB NOT NULL) STRICT;
"""
_DEVICE: Final = "node_id, name, role, label, record, standing, certificate_serial, seen_unix_s"
_DEVICE_AGAIN: Final = (
    "ON CONFLICT (node_id) DO UPDATE SET name = excluded.name, role = excluded.role, label = excluded.label, "
    "record = excluded.record, standing = excluded.standing, certificate_serial = excluded.certificate_serial, "
    "seen_unix_s = excluded.seen_unix_s"
)
_TOKEN: Final = "token_id, grant_, expires_unix_s, uses, used, revoked"  # noqa: S105 - names of columns
_DEPLOYMENT: Final = (
    "deployment, model, manifest_digest, manifest, options, holder, epoch, devices, created_unix_s, drafter"
)
# What an older schema lacks, by its version.
_UPGRADES: Final = {1: "ALTER TABLE deployments ADD COLUMN drafter BLOB NOT NULL DEFAULT x''", 2: _SELECTION}
_NODE_IDS: Final = msgspec.json.Decoder(tuple[str, ...])


class SqliteRegistry:
    """One file. Several connections to it may race: every change is one immediate transaction."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`; raises Corrupt when the check fails, Unsupported for a newer schema."""
        self._lock = threading.RLock()
        path.touch(mode=0o600)
        self._database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._open(path)
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise _damaged(path, str(error)) from error
        except BaseException:
            self._database.close()
            raise

    def _open(self, path: Path) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        # A token that was spent, a device that was revoked and an epoch that began must survive a power cut.
        self._database.execute("PRAGMA synchronous = FULL")
        (verdict,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise _damaged(path, verdict)
        with self._transaction() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 0:
                _execute_all(database, _SCHEMA + _SELECTION)
                database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            while version in _UPGRADES:
                _execute_all(database, _UPGRADES[version])
                version += 1
                database.execute(f"PRAGMA user_version = {version}")
            if version not in {0, SCHEMA_VERSION}:
                raise Unsupported(
                    f"registry {path} has schema {version}, this release knows {SCHEMA_VERSION}: use the release that "
                    "wrote it, or a newer one"
                )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _all(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            return self._database.execute(query, values).fetchall()

    def _find(self, node_id: str) -> DeviceRow | None:
        rows = self._all(f"SELECT {_DEVICE} FROM devices WHERE node_id = ?", node_id)  # noqa: S608 - constants
        return _device(rows[0]) if rows else None

    def device(self, node_id: str) -> DeviceRow:
        """See Registry."""
        row = self._find(node_id)
        if row is None:
            raise NotFound(f"no device {node_id}")
        return row

    def devices(self) -> tuple[DeviceRow, ...]:
        """See Registry."""
        return tuple(map(_device, self._all(f"SELECT {_DEVICE} FROM devices ORDER BY name")))  # noqa: S608

    def _put_device(self, row: DeviceRow, standing: str, name: str | None) -> DeviceRow:
        chosen = name or unique_name(row.name, (taken for (taken,) in self._all("SELECT name FROM devices")))
        self._all(
            f"INSERT INTO devices ({_DEVICE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?) {_DEVICE_AGAIN}",  # noqa: S608
            row.node_id,
            chosen,
            row.role,
            row.label,
            row.record,
            standing,
            row.certificate_serial,
            row.seen_unix_s,
        )
        return self.device(row.node_id)

    def ask(self, row: DeviceRow, *, limit: int, expired_before_unix_s: float) -> DeviceRow:
        """See Registry."""
        with self._transaction() as database:
            database.execute(
                "DELETE FROM devices WHERE standing = 'pending' AND seen_unix_s < ? AND node_id != ?",
                (expired_before_unix_s, row.node_id),
            )
            known = self._find(row.node_id)
            if known is not None and known.standing != "pending":
                raise Conflict(f"device {known.name} is {known.standing}")
            (waiting,) = database.execute("SELECT count(*) FROM devices WHERE standing = 'pending'").fetchone()
            if known is None and waiting >= limit:
                raise pending_full(limit)
            return self._put_device(row, "pending", known.name if known else None)

    def enrol(self, row: DeviceRow, token: TokenRow | None) -> DeviceRow:
        """See Registry."""
        with self._transaction() as database:
            known = self._find(row.node_id)
            if known is not None and known.standing == "revoked":
                raise PermissionDenied(f"device {known.name} is revoked")
            if token is not None:
                self._insert_token(token)
                spent = database.execute(
                    "UPDATE tokens SET used = used + 1 WHERE token_id = ? AND used < uses AND NOT revoked",
                    (token.token_id,),
                )
                if spent.rowcount != 1:
                    held = self._token(token.token_id)
                    if held.revoked:
                        raise PermissionDenied(f"token {held.token_id} is revoked")
                    raise PermissionDenied(f"token {held.token_id} is spent: {held.used} of {held.uses} uses")
            return self._put_device(row, "enrolled", known.name if known else None)

    def put_record(self, node_id: str, *, record: bytes, label: int) -> DeviceRow:
        """See Registry."""
        with self._transaction() as database:
            known = self.device(node_id)
            if known.standing == "revoked":
                raise PermissionDenied(f"device {known.name} is revoked")
            database.execute(
                "UPDATE devices SET record = ?, label = ?, standing = 'enrolled' WHERE node_id = ?",
                (record, label, node_id),
            )
            return self.device(node_id)

    def put_certificate(self, node_id: str, serial: str) -> DeviceRow:
        """See Registry."""
        with self._transaction() as database:
            database.execute("UPDATE devices SET certificate_serial = ? WHERE node_id = ?", (serial, node_id))
            return self.device(node_id)

    def rename(self, node_id: str, name: str) -> DeviceRow:
        """See Registry."""
        with self._transaction() as database:
            self.device(node_id)
            try:
                database.execute("UPDATE devices SET name = ? WHERE node_id = ?", (name, node_id))
            except sqlite3.IntegrityError as error:
                raise Conflict(f"another device is called {name!r}: choose another name", param="name") from error
            return self.device(node_id)

    def revoke(self, node_id: str) -> DeviceRow:
        """See Registry."""
        with self._transaction() as database:
            database.execute("UPDATE devices SET standing = 'revoked' WHERE node_id = ?", (node_id,))
            return self.device(node_id)

    def _token(self, token_id: str) -> TokenRow:
        rows = self._all(f"SELECT {_TOKEN} FROM tokens WHERE token_id = ?", token_id)  # noqa: S608
        if not rows:
            raise NotFound(f"no token {token_id}: ganglion token ls shows those that are known", param="token_id")
        return _token(rows[0])

    def _insert_token(self, row: TokenRow) -> None:
        self._all(
            f"INSERT OR IGNORE INTO tokens ({_TOKEN}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608
            row.token_id,
            row.grant,
            row.expires_unix_s,
            row.uses,
            row.used,
            int(row.revoked),
        )

    def tokens(self) -> tuple[TokenRow, ...]:
        """See Registry."""
        return tuple(map(_token, self._all(f"SELECT {_TOKEN} FROM tokens ORDER BY token_id")))  # noqa: S608

    def register_token(self, row: TokenRow) -> None:
        """See Registry."""
        with self._transaction():
            self._insert_token(row)

    def revoke_token(self, token_id: str) -> TokenRow:
        """See Registry."""
        with self._transaction() as database:
            database.execute("UPDATE tokens SET revoked = 1 WHERE token_id = ?", (token_id,))
            return self._token(token_id)

    def deployments(self) -> tuple[DeploymentRow, ...]:
        """See Registry."""
        order = "ORDER BY created_unix_s, deployment"
        return tuple(map(_deployment, self._all(f"SELECT {_DEPLOYMENT} FROM deployments {order}")))  # noqa: S608

    def put_deployment(self, row: DeploymentRow) -> None:
        """See Registry."""
        with self._transaction():
            try:
                self._all(
                    f"INSERT INTO deployments ({_DEPLOYMENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                    row.deployment,
                    row.model,
                    row.manifest_digest,
                    row.manifest,
                    row.options,
                    row.holder,
                    row.epoch,
                    msgspec.json.encode(row.devices),
                    row.created_unix_s,
                    row.drafter,
                )
            except sqlite3.IntegrityError as error:
                raise Conflict(f"deployment {row.deployment} is known already") from error

    def _known_epoch(self, deployment: str) -> int:
        rows = self._all("SELECT epoch FROM deployments WHERE deployment = ?", deployment)
        if not rows:
            raise NotFound(f"no deployment {deployment}")
        return int(rows[0][0])

    def begin_epoch(self, deployment: str, epoch: int, devices: Iterable[str]) -> None:
        """See Registry."""
        with self._transaction() as database:
            known = self._known_epoch(deployment)
            if epoch <= known:
                raise Conflict(f"epoch {epoch} of deployment {deployment} is not above {known}")
            database.execute(
                "UPDATE deployments SET epoch = ?, devices = ? WHERE deployment = ?",
                (epoch, msgspec.json.encode(tuple(devices)), deployment),
            )

    def put_holder(self, deployment: str, holder: str) -> None:
        """See Registry."""
        with self._transaction() as database:
            self._known_epoch(deployment)
            database.execute("UPDATE deployments SET holder = ? WHERE deployment = ?", (holder, deployment))

    def remove_deployment(self, deployment: str) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("DELETE FROM deployments WHERE deployment = ?", (deployment,))

    def links(self) -> tuple[LinkRow, ...]:
        """See Registry."""
        rows = self._all("SELECT source, target, reachable, rtt_s, bytes_per_s FROM links ORDER BY source, target")
        return tuple(
            LinkRow(source=source, target=target, reachable=bool(reachable), rtt_s=rtt_s, bytes_per_s=bytes_per_s)
            for source, target, reachable, rtt_s, bytes_per_s in rows
        )

    def put_links(self, rows: Iterable[LinkRow]) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO links (source, target, reachable, rtt_s, bytes_per_s) VALUES (?, ?, ?, ?, ?)",
                [(row.source, row.target, int(row.reachable), row.rtt_s, row.bytes_per_s) for row in rows],
            )

    def experts(self) -> tuple[ExpertRow, ...]:
        """See Registry."""
        rows = self._all("SELECT name, spec, measured FROM experts ORDER BY name")
        return tuple(ExpertRow(name=name, spec=spec, measured=measured) for name, spec, measured in rows)

    def put_expert(self, row: ExpertRow) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO experts VALUES (?, ?, ?)", (row.name, row.spec, row.measured))

    def put_measured(self, name: str, measured: bytes) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("UPDATE experts SET measured = ? WHERE name = ?", (measured, name))

    def remove_expert(self, name: str) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("DELETE FROM experts WHERE name = ?", (name,))

    def budgets(self) -> tuple[BudgetRow, ...]:
        """See Registry."""
        rows = self._all("SELECT name, budget FROM budgets ORDER BY name")
        return tuple(BudgetRow(name=name, budget=budget) for name, budget in rows)

    def put_budget(self, row: BudgetRow) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO budgets VALUES (?, ?)", (row.name, row.budget))

    def remove_budget(self, name: str) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("DELETE FROM budgets WHERE name = ?", (name,))

    def quality_profile(self) -> bytes:
        """See Registry."""
        rows = self._all("SELECT profile FROM quality_profile")
        return bytes(rows[0][0]) if rows else b""

    def put_quality_profile(self, profile: bytes) -> None:
        """See Registry."""
        with self._transaction() as database:
            database.execute("INSERT OR REPLACE INTO quality_profile VALUES (1, ?)", (profile,))

    def routes(self, manifest_digest: str) -> bytes:
        """See Registry."""
        rows = self._all("SELECT report FROM routes WHERE manifest_digest = ?", manifest_digest)
        return bytes(rows[0][0]) if rows else b""

    def put_routes(self, manifest_digest: str, report: bytes) -> None:
        """See Registry."""
        with self._transaction():
            self._all("INSERT OR REPLACE INTO routes (manifest_digest, report) VALUES (?, ?)", manifest_digest, report)

    def close(self) -> None:
        """See Registry."""
        with self._lock:
            self._database.close()


def _execute_all(database: sqlite3.Connection, statements: str) -> None:
    """One by one: sqlite3's executescript would end the transaction."""
    for statement in filter(str.strip, statements.split(";")):
        database.execute(statement)


def _damaged(path: Path, verdict: str) -> Corrupt:
    return Corrupt(
        f"registry {path} is damaged ({verdict}): restore a copy, or move it away and enrol the devices anew"
    )


def _device(values: Any) -> DeviceRow:
    node_id, name, role, label, record, standing, serial, seen_unix_s = values
    return DeviceRow(
        node_id=node_id,
        name=name,
        role=role,
        label=label,
        record=record,
        standing=standing,
        certificate_serial=serial,
        seen_unix_s=seen_unix_s,
    )


def _token(values: Any) -> TokenRow:
    token_id, grant, expires_unix_s, uses, used, revoked = values
    return TokenRow(
        token_id=token_id, grant=grant, expires_unix_s=expires_unix_s, uses=uses, used=used, revoked=bool(revoked)
    )


def _deployment(values: Any) -> DeploymentRow:
    deployment, model, manifest_digest, manifest, options, holder, epoch, devices, created_unix_s, drafter = values
    return DeploymentRow(
        deployment=deployment,
        model=model,
        manifest_digest=manifest_digest,
        manifest=manifest,
        options=options,
        holder=holder,
        epoch=epoch,
        devices=_NODE_IDS.decode(devices),
        created_unix_s=created_unix_s,
        drafter=drafter,
    )
