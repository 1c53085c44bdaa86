"""The hybrid walk: `up` here, a device of its own home that drafts for it, the same text from both; away and back."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
from cluster.harness import Cluster, until

PORTS = ("--bind", "127.0.0.1", "--port", "0", "--fleet-port", "0", "--enrolment-port", "0", "--no-mdns")
PROMPT = "def read_lines(path):"


def about(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "serving.json").read_bytes())
    return found


def ask(api: str, **options: Any) -> dict[str, Any]:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "temperature": 0} | options
    answer: dict[str, Any] = httpx.post(f"{api}/v1/completions", json=body, timeout=60).json()
    return answer


def text_of(answer: dict[str, Any]) -> str:
    assert "choices" in answer, answer
    return str(answer["choices"][0]["text"])


def test_the_hybrid_walk(cluster: Cluster, tmp_path: Path) -> None:
    started = cluster.run("up", "--detach", "--threads", "1", *PORTS)
    assert started.returncode == 0, started.stderr
    up = psutil.Process(about(cluster.home / "owner")["pid"])
    try:
        walk(cluster, tmp_path / "device")
    finally:
        family = [up, *up.children(recursive=True)]
        ended = cluster.run("down")
    assert ended.returncode == 0, ended.stderr
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []


def walk(cluster: Cluster, home: Path) -> None:
    cloud = about(cluster.home / "gateway")["api"]
    common = ("--home", str(home), "--bind", "127.0.0.1", "--threads", "1", "--name", "pocket", "--port", "0")
    plain = cluster.cli("token", "create").strip()
    refused = cluster.run("join", "--draft", plain, *common)
    assert refused.returncode != 0
    assert "ganglion token create --draft" in refused.stderr

    token = cluster.cli("token", "create", "--draft").strip()
    ready = home.with_name("device.ready")
    joining = cluster.begin("device", "join", "--draft", token, "--away", "local", "--ready-file", str(ready), *common)
    until("the device", ready.exists, timeout_s=90)
    said = joining.log
    until("the offer's answer", lambda: "this device drafts for demo" in said.read_text(errors="replace"))
    until("it drafts", lambda: cluster.deployment("demo-drafter")["phase"] == "ready", timeout_s=60)
    row = cluster.deployment("demo-drafter")
    assert (row["drafts_for"], row["lead"], row["drafting"]["away"]) == ("demo", "pocket", "local")
    device = json.loads(ready.read_bytes())["api"]

    # The same text, greedily and with a seed, and the answer says that the device drafted for it.
    for sampling in ({}, {"temperature": 0.8, "seed": 5}):
        wanted = ask(cloud, **sampling)
        found = until("a verified answer", lambda given=sampling: verified(ask(device, **given)), timeout_s=60)
        assert text_of(found) == text_of(wanted)
        assert found["system_fingerprint"] == wanted["system_fingerprint"]
        assert "ganglion" not in wanted

    # The model goes: by policy the device goes on alone and says so, or does not.
    cluster.cli("stop", "demo")
    alone = until("an answer alone", lambda: local(ask(device)), timeout_s=60)
    assert text_of(alone)
    assert ask(device, away="fail")["error"]["code"] == "unavailable"
    assert ask(cloud)["error"]["code"] == "not_found"

    # It comes back, and answers again.
    cluster.cli("run", "demo")
    again = until("a verified answer again", lambda: verified(ask(device)), timeout_s=60)
    assert text_of(again) == text_of(ask(cloud))

    family = [psutil.Process(joining.process.pid), *psutil.Process(joining.process.pid).children(recursive=True)]
    joining.process.send_signal(signal.SIGINT)
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []
    until("it is gone", lambda: cluster.deployment("demo-drafter")["phase"] != "ready")


def verified(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The answer if the model gave all of it, verifying what the device drafted."""
    marks = answer.get("ganglion", {})
    return answer if marks.get("local_tokens") == 0 and marks.get("speculation", {}).get("passes") else None


def local(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The answer if the device gave all of it."""
    tokens = answer.get("usage", {}).get("completion_tokens")
    return answer if tokens and answer.get("ganglion", {}).get("local_tokens") == tokens else None
