"""The container file, the compose example and the systemd units, checked without running them."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ganglion.cli.main import app

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
SANDBOX = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "CapabilityBoundingSet": "",
    "DynamicUser": "yes",
    "UMask": "0077",
}


def unit(path: Path) -> configparser.ConfigParser:
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(path)
    return parsed


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Containerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def test_there_is_a_unit_for_every_role() -> None:
    assert [path.stem for path in UNITS] == ["ganglion-agent", "ganglion-coordinator", "ganglion-gateway"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_are_sandboxed(path: Path) -> None:
    service = unit(path)["Service"]
    for key, value in SANDBOX.items():
        assert service[key] == value, key
    assert "@system-service" in path.read_text()


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_call_commands_and_options_that_exist(path: Path) -> None:
    service = unit(path)["Service"]
    program, *arguments = service["ExecStart"].split()
    assert program == "/opt/ganglion/bin/ganglion"
    words = [word for word in arguments if not word.startswith(("-", "$"))]
    shown = CliRunner().invoke(app, [*words, "--help"])
    assert shown.exit_code == 0
    for option in (word for word in arguments if word.startswith("--")):
        assert option in shown.output
    assert service["StateDirectory"] == path.stem
    assert f"GANGLION_HOME=/var/lib/{path.stem}" in path.read_text()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_the_units(path: Path, tmp_path: Path) -> None:
    program = tmp_path / "ganglion"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("/opt/ganglion/bin/ganglion", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=60, check=False
    )
    complaints = [line for line in done.stderr.splitlines() if path.name in line]
    assert complaints == []


def test_the_image_is_not_root_and_has_a_health_check() -> None:
    found = instructions()
    last_stage = found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]
    users = [value for name, value in last_stage if name == "USER"]
    assert users == ["10001:10001"]
    health = next(value for name, value in last_stage if name == "HEALTHCHECK")
    assert "/healthz" in health
    names = [name for name, _ in last_stage]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")


def test_the_image_pins_its_base_and_copies_what_the_wheel_is_built_from() -> None:
    found = instructions()
    assert {value.split()[0] for name, value in found if name == "FROM"} == {"python:3.11-slim-bookworm"}
    assert not any(name == "ADD" for name, _ in found)
    assert not any("curl" in value or "apt-get" in value for name, value in found if name == "RUN")
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())
    copied = {value.split()[0] for name, value in found if name == "COPY"}
    for folder in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
        assert folder in copied or folder.split("/")[0] in copied, folder
    assert {"pyproject.toml", project["project"]["readme"]} <= {
        word for name, value in found if name == "COPY" for word in value.split()
    }


def test_the_image_starts_a_command_that_exists() -> None:
    last = dict(instructions())
    assert last["ENTRYPOINT"] == '["ganglion"]'
    assert last["CMD"] == '["up"]'
    assert last["STOPSIGNAL"] == "SIGTERM"


def test_the_compose_example_drops_every_capability() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    services = re.split(r"\n  (?=\w+:\n)", text.split("services:")[1].split("\nvolumes:")[0])[1:]
    assert len(services) == 2
    for service in services:
        assert 'cap_drop: ["ALL"]' in service
        assert "read_only: true" in service
        assert "no-new-privileges:true" in service
        assert "privileged:" not in service
