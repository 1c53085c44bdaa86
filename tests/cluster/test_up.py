"""The first minute: `up`, a second terminal that joins, a prompt, a crash of a child, `down`."""

from __future__ import annotations

import json
import re
from typing import Any

import psutil
from cluster.harness import Cluster, until

from ganglion.cli.owner import device_name

TOKEN = re.compile(r"ganglion join (gj1\.\S+)")
PORTS = ("--bind", "127.0.0.1", "--port", "0", "--fleet-port", "0", "--enrolment-port", "0", "--no-mdns")


def about(cluster: Cluster, home: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cluster.home / home / "serving.json").read_bytes())
    return found


def test_the_first_minute(cluster: Cluster) -> None:
    started = cluster.run("up", "--detach", "--threads", "1", *PORTS)
    assert started.returncode == 0, started.stderr
    assert started.stdout == ""
    up = psutil.Process(about(cluster, "owner")["pid"])
    family = [up, *up.children(recursive=True)]
    api = about(cluster, "gateway")["api"]
    assert f"{api}/v1" in started.stderr
    [first] = TOKEN.findall(started.stderr)

    again = cluster.run("up", *PORTS)
    assert again.returncode == 5
    assert f"process {up.pid}" in again.stderr
    assert api in again.stderr

    said = cluster.run("run", "demo", "def read_lines(path):", "--max-tokens", "16", "--temperature", "0")
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip()

    # The home of the first agent is in use: without a name the second gets the next one.
    second = f"{device_name()}-2"
    cluster.begin("second", "join", first, "--bind", "127.0.0.1", "--threads", "1")
    until("the second device", lambda: second in cluster.alive(), timeout_s=60)
    log = cluster.home / "log" / "up.log"
    until("up says so and offers a fresh token", lambda: len(set(TOKEN.findall(log.read_text()))) == 2)
    assert f"{second} joined" in log.read_text()
    used = cluster.run("join", first, "--name", "third")
    assert used.returncode == 4, used.stderr

    agent = psutil.Process(about(cluster, f"agents/{device_name()}")["pid"])
    agent.kill()
    until("the agent again", lambda: "the agent runs again" in log.read_text(), timeout_s=60)
    assert "the agent ended unexpectedly with exit code -9" in log.read_text()
    assert about(cluster, f"agents/{device_name()}")["pid"] != agent.pid

    family += up.children(recursive=True)
    ended = cluster.run("down")
    assert ended.returncode == 0, ended.stderr
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    assert not (cluster.home / "owner" / "serving.json").exists()
    assert cluster.run("down").returncode == 3


def test_a_port_in_use_ends_up_and_says_which(cluster: Cluster) -> None:
    cluster.coordinator()
    port = cluster.roles["coordinator"].about["fleet_port"]
    other = ("--home", str(cluster.folder / "home2"), "--bind", "127.0.0.1", "--port", "0", "--enrolment-port", "0")
    done = cluster.run("up", *other, "--fleet-port", str(port), "--no-mdns")
    assert done.returncode == 5
    assert str(port) in done.stderr
    assert "--fleet-port" in done.stderr
    assert "Traceback" not in done.stderr
