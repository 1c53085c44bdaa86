"""Listings: the keys of their documents are a contract; tables say the same."""

from __future__ import annotations

import json

import pytest

from ganglion.cli import output, views
from ganglion.cli.deploying import Wish
from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.errors import InvalidRequest, NotFound
from ganglion.wire.nouns import DeviceProfile, NumericClass, Plan, Range, Share, Stage, to_json

NODE = "a" * 26
OTHER = "b" * 26
PROFILE = DeviceProfile(
    host_id="h", hostname="h", system="Linux", kernel_family="ort", cores=8, threads=4, memory_bytes=1 << 34,
    memory_budget_bytes=3 << 30, disk_free_bytes=0, disk_read_bytes_per_s=0.0, memory_bytes_per_s=1e10, rates={},
    providers=(), version="0",
)  # fmt: skip
PLAN = Plan(
    manifest_digest="0" * 64,
    numeric_class=NumericClass(format="fp32", block=0, exact=True),
    context=256,
    sessions=2,
    kv_tokens=4 * 8192,
    chunk=64,
    stages=(
        Stage(
            layers=Range(0, 2),
            shares=(
                Share(device=NODE, heads=Range(0, 1), columns=Range(0, 10), vocab=Range(0, 3)),
                Share(device=OTHER, heads=Range(1, 2), columns=Range(10, 16), vocab=Range(3, 4)),
            ),
            topology="mesh",
        ),
    ),
    threads={NODE: 1, OTHER: 2},
)


def a_device(**changes: object) -> admin_pb2.DeviceState:
    state = admin_pb2.DeviceState(
        node_id=NODE,
        name="desk",
        role=identity_pb2.ROLE_AGENT,
        label=identity_pb2.TRUST_LABEL_OWNER,
        state="alive",
        profile=to_json(PROFILE),
        address="192.0.2.1:4000",
        last_seen_s=0.26,
    )
    for key, value in changes.items():
        setattr(state, key, value)
    return state


def test_the_document_of_a_device() -> None:
    assert views.device(a_device()) == {
        "name": "desk", "node_id": NODE, "role": "agent", "label": "owner", "state": "alive",
        "address": "192.0.2.1:4000", "last_seen_s": 0.3, "system": "Linux", "kernel_family": "ort", "cores": 8,
        "threads": 4, "memory_bytes": 1 << 34, "memory_budget_bytes": 3 << 30, "memory_bytes_per_s": 1e10,
    }  # fmt: skip


def test_a_pending_device_has_no_profile_yet() -> None:
    row = views.device(a_device(profile=b"", label=0, state="pending", address=""))
    assert (row["label"], row["threads"], row["address"]) == (None, None, None)
    assert views.device_cells(row) == ["desk", "pending", "-", "agent", "-", "-", "-", "-", NODE]


def test_the_document_of_a_deployment() -> None:
    state = admin_pb2.DeploymentState(
        deployment="d1",
        model="demo",
        manifest_digest="0" * 64,
        epoch=3,
        phase=admin_pb2.DEPLOYMENT_PHASE_READY,
        plan=to_json(PLAN),
        sessions=1,
    )
    row = views.deployment(state, {NODE: "desk", OTHER: "lap"})
    assert list(row) == [
        "model", "deployment", "epoch", "phase", "message", "manifest_digest", "numeric_class", "mode", "context",
        "prefix_tokens", "sessions", "lead", "shards", "drafter", "drafts_for", "drafting",
    ]  # fmt: skip
    assert (row["phase"], row["numeric_class"], row["mode"], row["lead"]) == ("ready", "fp32-exact", "tensor", "desk")
    assert row["shards"][1] == {
        "device": "lap", "node_id": OTHER, "layers": [0, 2], "heads": [1, 2], "columns": [10, 16], "vocab": [3, 4],
        "experts": 0, "threads": 2,
    }  # fmt: skip
    assert views.deployment_cells(row) == [
        "demo", "ready", "fp32-exact", "tensor", "desk, lap", "-", "256", "1", "3", "-",
    ]  # fmt: skip


def test_the_document_of_a_token() -> None:
    grant = identity_pb2.JoinGrant(
        token_id="t", label=identity_pb2.TRUST_LABEL_FRIEND, role=identity_pb2.ROLE_AGENT, expires_unix_s=100, uses=1
    )
    for used, revoked, now_s, state in (
        (0, False, 50, "unused"),
        (1, False, 50, "used"),
        (0, False, 100, "expired"),
        (1, True, 0, "revoked"),
    ):
        row = views.token(admin_pb2.TokenState(grant=grant, used=used, revoked=revoked), now_s=now_s)
        assert row == {
            "token_id": "t", "state": state, "label": "friend", "role": "agent", "used": used, "uses": 1,
            "expires_unix_s": 100,
        }  # fmt: skip


def test_devices_are_found_by_name_id_and_beginning_of_an_id() -> None:
    devices = [a_device(), a_device(name="lap", node_id=OTHER)]
    for wanted in ("desk", NODE, "aaaaaa"):
        assert views.find_device(devices, wanted).name == "desk"
    with pytest.raises(NotFound, match="did you mean 'desk'"):
        views.find_device(devices, "desc")
    with pytest.raises(NotFound, match="there are: desk, lap"):
        views.find_device(devices, "aaa")


def test_labels_and_roles_are_named_when_wrong() -> None:
    with pytest.raises(InvalidRequest, match="owner"):
        views.label_of("enemy")
    with pytest.raises(InvalidRequest, match="gateway"):
        views.role_of("coordinator")


def test_a_wish_accepts_what_it_asked_for() -> None:
    state = admin_pb2.DeploymentState(model="demo", phase=admin_pb2.DEPLOYMENT_PHASE_READY)
    assert Wish().accepts(state)
    state.phase = admin_pb2.DEPLOYMENT_PHASE_REPLANNING
    assert not Wish().accepts(state)


def test_tables_off_a_terminal_are_plain_columns(capsys: pytest.CaptureFixture[str]) -> None:
    output.answer_table(("A", "LONG"), [["1", "2"], ["333", ""]], empty="none")
    captured = capsys.readouterr()
    assert captured.out == "A    LONG\n1    2\n333\n"
    assert captured.err == ""
    output.answer_json({"b": 1, "a": "ü"})
    assert json.loads(capsys.readouterr().out) == {"b": 1, "a": "ü"}


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")])
def test_bytes_for_people(count: int, text: str) -> None:
    assert output.human_bytes(count) == text
