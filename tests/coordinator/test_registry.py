# ruff: noqa: N802 - the ids of faults in names of tests are upper case
"""One conformance suite over both registries, and what only a file can do."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ganglion.coordinator.registry import (
    BudgetRow,
    DeploymentRow,
    DeviceRow,
    ExpertRow,
    LinkRow,
    MemoryRegistry,
    Registry,
    SqliteRegistry,
    TokenRow,
)
from ganglion.wire.errors import Conflict, Corrupt, Exhausted, NotFound, PermissionDenied, Unsupported


@pytest.fixture(params=["memory", "sqlite"])
def registry(request, tmp_path: Path):
    made: Registry = MemoryRegistry() if request.param == "memory" else SqliteRegistry(tmp_path / "registry.sqlite3")
    yield made
    made.close()


def device(number: int = 1, **changes) -> DeviceRow:
    row = DeviceRow(
        node_id=f"node{number}",
        name=f"name{number}",
        role=1,
        label=3,
        record=b"record",
        standing="pending",
        certificate_serial="",
        seen_unix_s=100.0,
    )
    return replace(row, **changes)


def token(uses: int = 1, **changes) -> TokenRow:
    return replace(TokenRow(token_id="t1", grant=b"grant", expires_unix_s=1000, uses=uses), **changes)


def deployment(number: int = 1) -> DeploymentRow:
    return DeploymentRow(
        deployment=f"d{number}",
        model=f"m{number}",
        manifest_digest="ab",
        manifest=b"{}",
        options=b"{}",
        holder="node1",
        epoch=0,
        devices=(),
        created_unix_s=float(number),
    )


def test_a_device_is_found_as_it_was_enrolled(registry: Registry):
    with pytest.raises(NotFound):
        registry.device("node1")
    enrolled = registry.enrol(device(), None)
    assert enrolled == device(standing="enrolled")
    assert registry.device("node1") == enrolled
    assert registry.devices() == (enrolled,)


def test_names_are_made_unique_and_kept(registry: Registry):
    registry.enrol(device(1, name="box"), None)
    assert registry.enrol(device(2, name="box"), None).name == "box-2"
    assert registry.ask(device(3, name="box"), limit=9, expired_before_unix_s=0).name == "box-3"
    assert registry.enrol(device(2, name="other"), None).name == "box-2"
    long = "a" * 63
    registry.enrol(device(4, name=long), None)
    assert registry.enrol(device(5, name=long), None).name == "a" * 61 + "-2"


def test_renaming_refuses_a_name_that_is_taken(registry: Registry):
    registry.enrol(device(1), None)
    registry.enrol(device(2), None)
    with pytest.raises(Conflict, match="name2"):
        registry.rename("node1", "name2")
    assert registry.rename("node1", "new").name == "new"
    assert registry.rename("node1", "new").name == "new"
    with pytest.raises(NotFound):
        registry.rename("node9", "x")


def test_a_token_is_spent_with_the_device_or_not_at_all(registry: Registry):
    registry.enrol(device(1), token())
    with pytest.raises(PermissionDenied, match="1 of 1"):
        registry.enrol(device(2), token())
    with pytest.raises(NotFound):
        registry.device("node2")
    assert registry.tokens() == (token(used=1),)


def test_a_revoked_token_lets_nobody_in(registry: Registry):
    registry.register_token(token(uses=3))
    registry.register_token(token(uses=9))  # known already: stays as it is
    assert registry.revoke_token("t1") == token(uses=3, revoked=True)
    with pytest.raises(PermissionDenied, match="revoked"):
        registry.enrol(device(1), token(uses=3))
    with pytest.raises(NotFound):
        registry.revoke_token("t9")


def test_a_revoked_node_stays_out(registry: Registry):
    registry.enrol(device(1), None)
    assert registry.revoke("node1").standing == "revoked"
    assert registry.revoke("node1").standing == "revoked"
    with pytest.raises(PermissionDenied):
        registry.enrol(device(1), token())
    with pytest.raises(PermissionDenied):
        registry.put_record("node1", record=b"x", label=1)
    with pytest.raises(Conflict):
        registry.ask(device(1), limit=9, expired_before_unix_s=0)
    assert registry.tokens() == ()
    with pytest.raises(NotFound):
        registry.revoke("node9")


def test_pending_devices_are_bounded_and_expire(registry: Registry):
    registry.ask(device(1, seen_unix_s=1.0), limit=2, expired_before_unix_s=0)
    registry.ask(device(2, seen_unix_s=50.0), limit=2, expired_before_unix_s=0)
    with pytest.raises(Exhausted, match="2 devices"):
        registry.ask(device(3), limit=2, expired_before_unix_s=0)
    assert registry.ask(device(2, seen_unix_s=60.0), limit=2, expired_before_unix_s=0).seen_unix_s == 60.0
    registry.ask(device(3), limit=2, expired_before_unix_s=10.0)
    assert [row.node_id for row in registry.devices()] == ["node2", "node3"]
    assert registry.put_record("node3", record=b"signed", label=2) == device(
        3, record=b"signed", label=2, standing="enrolled"
    )
    with pytest.raises(NotFound):
        registry.put_record("node9", record=b"x", label=1)
    assert registry.put_certificate("node3", "ff").certificate_serial == "ff"
    with pytest.raises(NotFound):
        registry.put_certificate("node9", "ff")


def test_epochs_only_rise(registry: Registry):
    registry.put_deployment(deployment(2))
    registry.put_deployment(deployment(1))
    with pytest.raises(Conflict):
        registry.put_deployment(deployment(1))
    registry.begin_epoch("d1", 1, ["a", "b"])
    registry.begin_epoch("d1", 5, ["b"])
    for stale in (5, 4, 0):
        with pytest.raises(Conflict, match="not above 5"):
            registry.begin_epoch("d1", stale, ["a"])
    registry.put_holder("d1", "node7")
    assert registry.deployments() == (
        replace(deployment(1), epoch=5, devices=("b",), holder="node7"),
        deployment(2),
    )
    registry.remove_deployment("d1")
    registry.remove_deployment("d1")
    for call in (lambda: registry.begin_epoch("d1", 9, []), lambda: registry.put_holder("d1", "x")):
        with pytest.raises(NotFound):
            call()


def test_links_replace_the_measurement_before(registry: Registry):
    first = LinkRow(source="a", target="b", reachable=True, rtt_s=1e-3, bytes_per_s=1e6)
    second = replace(first, reachable=False, rtt_s=2e-3)
    back = replace(first, source="b", target="a")
    registry.put_links([back, first])
    registry.put_links([second])
    assert registry.links() == (second, back)


def test_experts_and_budgets_replace_those_of_their_name(registry: Registry):
    registry.put_expert(ExpertRow(name="b", spec=b"1"))
    registry.put_expert(ExpertRow(name="a", spec=b"2"))
    registry.put_measured("a", b"[]")
    registry.put_measured("nobody", b"[]")
    assert registry.experts() == (ExpertRow(name="a", spec=b"2", measured=b"[]"), ExpertRow(name="b", spec=b"1"))
    registry.put_expert(ExpertRow(name="a", spec=b"3"))
    registry.remove_expert("b")
    registry.remove_expert("b")
    assert registry.experts() == (ExpertRow(name="a", spec=b"3"),)
    registry.put_budget(BudgetRow(name="y", budget=b"1"))
    registry.put_budget(BudgetRow(name="x", budget=b"2"))
    registry.put_budget(BudgetRow(name="y", budget=b"3"))
    assert registry.budgets() == (BudgetRow(name="x", budget=b"2"), BudgetRow(name="y", budget=b"3"))
    registry.remove_budget("x")
    registry.remove_budget("x")
    assert registry.budgets() == (BudgetRow(name="y", budget=b"3"),)


def test_the_gates_view_replaces_the_one_before(registry: Registry):
    assert registry.quality_profile() == b""
    registry.put_quality_profile(b"1")
    registry.put_quality_profile(b"2")
    assert registry.quality_profile() == b"2"


def race(openers: list[Callable[[], Registry]], uses: int) -> list[str]:
    """Every opener's registry enrols one device with the same token at the same moment."""
    barrier = threading.Barrier(len(openers))
    outcomes: list[str] = []

    def enrol(number: int, opener: Callable[[], Registry]) -> None:
        registry = opener()
        barrier.wait(10)
        try:
            registry.enrol(device(number), token(uses))
            outcomes.append("in")
        except PermissionDenied:
            outcomes.append("refused")

    threads = [threading.Thread(target=enrol, args=(number, opener)) for number, opener in enumerate(openers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_B2_of_racing_devices_exactly_as_many_get_in_as_the_token_has_uses(kind: str, tmp_path: Path):
    for attempt in range(10):
        path = tmp_path / f"{attempt}.sqlite3"
        if kind == "memory":
            shared: Registry = MemoryRegistry()
            outcomes = race([lambda shared=shared: shared] * 6, uses=2)
            registries: list[Registry] = [shared]
        else:
            registries = [SqliteRegistry(path) for _ in range(6)]
            outcomes = race([lambda each=each: each for each in registries], uses=2)
        assert sorted(outcomes) == ["in"] * 2 + ["refused"] * 4
        assert len(registries[0].devices()) == 2
        for registry in registries:
            registry.close()


def test_a_file_keeps_everything(tmp_path: Path):
    path = tmp_path / "registry.sqlite3"
    first = SqliteRegistry(path)
    first.enrol(device(), token(uses=2))
    first.put_deployment(deployment())
    first.begin_epoch("d1", 3, ["node1"])
    first.put_links([LinkRow(source="a", target="b", reachable=True, rtt_s=1e-3, bytes_per_s=1e6)])
    first.put_expert(ExpertRow(name="a", spec=b"1", measured=b"[]"))
    seen = (first.devices(), first.tokens(), first.deployments(), first.links(), first.experts())
    first.close()
    second = SqliteRegistry(path)
    assert (second.devices(), second.tokens(), second.deployments(), second.links(), second.experts()) == seen
    second.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_damaged_file_is_refused(tmp_path: Path):
    path = tmp_path / "registry.sqlite3"
    registry = SqliteRegistry(path)
    for number in range(200):
        registry.enrol(device(number, record=bytes(400)), None)
    registry.close()
    content = bytearray(path.read_bytes())
    content[4096 : len(content) // 2] = b"\xa5" * (len(content) // 2 - 4096)
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="damaged"):
        SqliteRegistry(path)
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(Corrupt, match="damaged"):
        SqliteRegistry(path)


def test_routes_are_kept_by_model_the_last_ones(registry):
    assert registry.routes("a" * 64) == b""
    registry.put_routes("a" * 64, b"one")
    registry.put_routes("b" * 64, b"other")
    registry.put_routes("a" * 64, b"two")
    assert (registry.routes("a" * 64), registry.routes("b" * 64)) == (b"two", b"other")


def test_a_newer_schema_is_refused(tmp_path: Path):
    path = tmp_path / "registry.sqlite3"
    SqliteRegistry(path).close()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(Unsupported, match="schema 99"):
        SqliteRegistry(path)


def test_a_registry_of_the_schema_before_is_brought_up_to_date(tmp_path) -> None:
    path = tmp_path / "registry.sqlite3"
    SqliteRegistry(path).close()
    database = sqlite3.connect(path)
    database.execute("ALTER TABLE deployments DROP COLUMN drafter")
    for table in ("experts", "budgets", "quality_profile", "routes"):
        database.execute(f"DROP TABLE {table}")
    values = ("d", "m", "0" * 64, b"{}", b"{}", "", 3, b"[]", 1.0)
    database.execute(f"INSERT INTO deployments VALUES ({', '.join('?' * len(values))})", values)
    database.execute("PRAGMA user_version = 1")
    database.commit()
    database.close()
    for _ in range(2):
        registry = SqliteRegistry(path)
        (row,) = registry.deployments()
        assert (row.deployment, row.epoch, row.drafter) == ("d", 3, b"")
        assert registry.experts() == ()
        assert registry.routes("0" * 64) == b""
        registry.close()
