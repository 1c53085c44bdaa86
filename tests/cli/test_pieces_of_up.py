"""Restarts, child processes, homes: what `up` and `join` are made of, without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from ganglion.cli.joining import free_home
from ganglion.cli.owner import device_name, ensure_owner_key, keys_fingerprint, reachable_hosts, record_fingerprint
from ganglion.cli.processes import Child, RestartPolicy, error_with_exit_code, tail
from ganglion.cli.serving import read_serving, serving
from ganglion.cli.upping import changes
from ganglion.wire.certificates import Role, TrustLabel
from ganglion.wire.errors import Conflict, DoesNotFit, NotFound, Unavailable
from ganglion.wire.home import Home
from ganglion.wire.identity import NodeKeys, OwnerKey, make_record


def test_restarts_pause_longer_and_longer_and_then_give_up() -> None:
    policy = RestartPolicy(most=3, within_s=100.0)
    assert [policy.died(now_s) for now_s in (0.0, 1.0, 2.0, 3.0)] == [1.0, 2.0, 4.0, None]


def test_deaths_long_ago_are_forgiven() -> None:
    policy = RestartPolicy(most=2, within_s=10.0)
    assert [policy.died(now_s) for now_s in (0.0, 20.0, 40.0, 60.0)] == [1.0, 1.0, 1.0, 1.0]


async def test_a_child_that_dies_at_once_is_reported_in_its_own_words(tmp_path: Path) -> None:
    child = Child("agent", ["--home", str(tmp_path)], log=tmp_path / "agent.log", ready_file=tmp_path / "ready")
    with pytest.raises(NotFound, match=r"^agent: .* is not enrolled"):
        await child.start()
    await child.stop()


async def test_a_child_that_dies_without_a_word_is_reported_with_its_log(tmp_path: Path) -> None:
    child = Child("nothing-of-that-name", [], log=tmp_path / "log", ready_file=tmp_path / "ready")
    with pytest.raises(Unavailable) as raised:
        await child.start()
    assert "ended with exit code 2" in raised.value.message
    assert "No such command" in raised.value.message
    await child.stop()


def test_exit_codes_lead_back_to_the_error_tree() -> None:
    for kind in (NotFound, Conflict, DoesNotFit, Unavailable):
        assert error_with_exit_code(kind.exit_code).exit_code == kind.exit_code
    assert error_with_exit_code(99) is Unavailable


async def test_a_stopped_child_leaves_no_process(tmp_path: Path) -> None:
    ensure_owner_key(tmp_path)
    ports = ["--bind", "127.0.0.1", "--fleet-port", "0", "--enrolment-port", "0", "--no-mdns"]
    arguments = ["--home", str(tmp_path), *ports]
    child = Child("coordinator", arguments, log=tmp_path / "c.log", ready_file=tmp_path / "c.ready")
    ready = await child.start()
    assert ready["role"] == "coordinator"
    pid = child.pid
    assert pid is not None
    assert psutil.pid_exists(pid)
    await child.stop()
    assert not psutil.pid_exists(pid)
    assert not (tmp_path / "c.ready").exists()
    assert read_serving(tmp_path / "coordinator") is None


def test_a_role_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    ensure_owner_key(tmp_path)
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-m', 'ganglion.cli', 'serve', 'coordinator', '--home', sys.argv[1],"
        " '--bind', '127.0.0.1', '--fleet-port', '0', '--enrolment-port', '0', '--no-mdns', '--with-parent',"
        " '--ready-file', sys.argv[1] + '/ready'], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        waited = threading.Event()
        for _ in range(600):
            if (tmp_path / "ready").exists():
                break
            waited.wait(0.05)
        assert (tmp_path / "ready").exists()
        parent.kill()
        child.wait(20)
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()


def test_serving_is_believed_only_of_the_process_that_wrote_it(tmp_path: Path) -> None:
    with serving(tmp_path, ready_file=tmp_path / "ready") as announce:
        assert read_serving(tmp_path) is None
        announce({"role": "gateway", "api": "http://127.0.0.1:1"})
        found = read_serving(tmp_path)
        assert found is not None
        assert found["pid"] == os.getpid()
        text = (tmp_path / "serving.json").read_text()
        (tmp_path / "serving.json").write_text(text.replace(str(found["started_unix_s"]), "1.0"))
        assert read_serving(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_tail_is_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == ""
    log.write_text("\n".join(str(number) for number in range(100)))
    assert tail(log, 2) == "  98\n  99"


def test_a_second_device_on_a_machine_gets_a_home_of_its_own(tmp_path: Path) -> None:
    first = free_home(tmp_path, "desk", None, fixed=False)
    with first.lock():
        second = free_home(tmp_path, "desk", None, fixed=False)
        assert second.path.name == "desk-2"
        with second.lock():
            assert free_home(tmp_path, "desk", None, fixed=False).path.name == "desk-3"
        with pytest.raises(Conflict, match="in use by process"):
            free_home(tmp_path, "desk", None, fixed=True)
    assert free_home(tmp_path, "desk", None, fixed=False).path.name == "desk"


def test_the_owner_key_is_made_once_and_only_its_public_half_leaves(tmp_path: Path) -> None:
    key, made = ensure_owner_key(tmp_path)
    again, made_again = ensure_owner_key(tmp_path)
    assert (made, made_again) == (True, False)
    assert again.public_key == key.public_key
    assert (tmp_path / "coordinator" / "owner.pub").read_bytes() == key.public_key
    assert Home(tmp_path / "owner").path.stat().st_mode & 0o077 == 0
    assert (tmp_path / "owner" / "owner.key").stat().st_mode & 0o077 == 0


def test_a_fingerprint_covers_both_keys() -> None:
    keys, owner = NodeKeys.generate(), OwnerKey.generate()
    signed = owner.sign_record(make_record(keys, Role.AGENT, TrustLabel.OWNER))
    assert record_fingerprint(signed) == keys_fingerprint(keys.tls_public_key_der, keys.sealing_public_key)
    other = NodeKeys.generate()
    assert record_fingerprint(signed) != keys_fingerprint(keys.tls_public_key_der, other.sealing_public_key)
    assert record_fingerprint(signed) != keys_fingerprint(other.tls_public_key_der, keys.sealing_public_key)


def test_up_says_who_came_went_and_waits() -> None:
    look: list[dict[str, str]] = [
        {"desk": "alive"},
        {"desk": "alive", "lap": "pending"},
        {"desk": "suspect", "lap": "pending"},
        {"desk": "dead", "lap": "alive"},
        {"desk": "alive", "lap": "revoked"},
    ]
    said = [changes(before, now) for before, now in zip([None, *look], look, strict=False)]
    assert said == [
        [],
        [("lap", "pending")],
        [],
        [("desk", "left"), ("lap", "joined")],
        [("desk", "joined"), ("lap", "left")],
    ]


def test_a_token_names_loopback_last() -> None:
    assert reachable_hosts("127.0.0.1") == ["127.0.0.1"]
    hosts = reachable_hosts("0.0.0.0")
    assert hosts[-1] == "127.0.0.1"
    assert len(hosts) <= 6


def test_the_host_name_becomes_a_device_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, name in (("Anna's MacBook.local", "anna-s-macbook"), ("---", "device"), ("über", "ber")):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        assert device_name() == name
