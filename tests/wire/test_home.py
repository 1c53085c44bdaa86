"""Homes and addresses."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ganglion.wire.address import join_address, split_address
from ganglion.wire.errors import Conflict, InvalidRequest, PermissionDenied
from ganglion.wire.home import Home, read_secret, root, write_secret


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_folders_are_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        home = Home(tmp_path / "a" / "home")
        folders = [home.path, home.identity, home.store, home.run]
    finally:
        os.umask(old)
    assert [folder.name for folder in folders] == ["home", "identity", "store", "run"]
    assert {mode(folder) for folder in folders} == {0o700}


def test_B10_a_looser_folder_is_refused_with_the_way_to_mend_it(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.path.chmod(0o750)
    with pytest.raises(PermissionDenied, match=f"mode 0750.*chmod 700 {home.path}"):
        Home(home.path)
    home.path.chmod(0o700)
    home.identity.chmod(0o701)
    with pytest.raises(PermissionDenied, match="chmod 700"):
        _ = home.identity


def test_B10_a_secret_is_0600_and_a_looser_one_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    old = os.umask(0)
    try:
        write_secret(secret, b"one")
        write_secret(secret, b"two")
    finally:
        os.umask(old)
    assert (mode(secret), read_secret(secret)) == (0o600, b"two")
    assert list(tmp_path.iterdir()) == [secret]
    secret.chmod(0o640)
    with pytest.raises(PermissionDenied, match=f"chmod 600 {secret}"):
        read_secret(secret)


def test_a_secret_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    write_secret(secret, b"one")
    with pytest.raises(TypeError):
        write_secret(secret, "text")  # type: ignore[arg-type]
    assert read_secret(secret) == b"one"
    assert list(tmp_path.iterdir()) == [secret]


def test_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GANGLION_HOME", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert root() == tmp_path / "own"
    monkeypatch.delenv("GANGLION_HOME")
    assert root() == tmp_path / "data" / "ganglion"
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert root() == tmp_path / ".local" / "share" / "ganglion"


def test_D7_the_second_process_is_told_who_has_the_home(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from ganglion.wire.home import Home\n"
        "with Home(pathlib.Path(sys.argv[1])).lock(): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "home")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Conflict, match=f"process {holder.pid}"), Home(tmp_path / "home").lock():
            pass
    finally:
        holder.communicate(timeout=30)
    with Home(tmp_path / "home").lock():
        pass
    with Home(tmp_path / "home").lock():
        pass


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("example.org:80", ("example.org", 80)),
        (" 10.0.0.1:7461 ", ("10.0.0.1", 7461)),
        ("[::1]:7461", ("::1", 7461)),
        ("[fe80::1%eth0]", ("fe80::1%eth0", 99)),
        ("host", ("host", 99)),
    ],
)
def test_addresses(text: str, found: tuple[str, int]) -> None:
    assert split_address(text, 99) == found
    assert split_address(join_address(*found)) == found


@pytest.mark.parametrize(
    "text",
    ["", ":80", "host:", "host:0", "host:65536", "host:9999999", "host:８0", "::1:80", "[::1", "[::1]80", "a b:1"],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidRequest, match="address"):
        split_address(text)
