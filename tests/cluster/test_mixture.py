"""One mixture over several devices: the same text as on one, by routes that devices report, also after a loss."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from cluster import reference
from cluster.conftest import start_three
from cluster.detector import leaks
from cluster.harness import Cluster, until

from ganglion.models import demo_path
from ganglion.proto import fleet_pb2
from ganglion.wire.limits import ROUTED_TOKENS
from ganglion.wire.rpc import read_recording

MODEL = "demo-mixture"
PROMPT = "def read_lines(path):"
LONG = 96  # tokens of an answer in whose middle a device is lost
ASKED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 0, "prompt": "/* Returns the length of a string. */\nsize_t"},
    {"temperature": 0.7, "seed": 8, "top_p": 0.9, "prompt": "function parse(text) {"},
)


def test_experts_on_two_and_three_devices(cluster: Cluster, tmp_path: Path) -> None:
    record = tmp_path / "messages"
    start_three(cluster, "--record", str(record))

    # On one device, and with its experts on two.
    cluster.cli("run", MODEL, "--experts", "whole", "--mode", "single", "--format", "int8")
    alone = cluster.deployment(MODEL)
    assert (alone["mode"], alone["numeric_class"]) == ("single", "int8-32-exact")
    wanted = [ask(cluster, **each) for each in ASKED]
    candidates = plan(cluster, "--experts", "whole", "--format", "int8")
    assert "cut it with --experts columns" in candidates["tensor"]["reason"]
    assert "devices touched by a token in a layer" in candidates["expert"]["reason"]
    assert "no routes of this model were reported yet" in candidates["expert"]["reason"]
    expert("one,two", cluster, "--format", "int8")
    assert [ask(cluster, **each) for each in ASKED] == wanted

    # In float32 as transformers has it, on three devices, several at once, streamed.
    expert("one,two,three", cluster, "--format", "fp32")
    expected = reference.answer(demo_path(MODEL), PROMPT, 48)
    assert ask(cluster) == expected.text
    each_alone = [ask(cluster, **each) for each in ASKED]
    with ThreadPoolExecutor(len(ASKED)) as pool:
        assert list(pool.map(lambda each: "".join(streamed(cluster, **each)), ASKED)) == each_alone

    # What the lead counted reaches the coordinator as counts, and the next plan goes by it.
    text = "The quick brown fox keeps a secret. " * 40
    until("routes", lambda: ask(cluster, prompt=text, max_tokens=8) and reports(record))
    (report, *_) = [fleet_pb2.RouteReport.FromString(each) for each in reports(record)]
    assert report.tokens >= ROUTED_TOKENS
    for layer in report.layers:
        counts = [one.tokens for one in layer.sets]
        assert sum(counts) + layer.others == report.tokens
        assert counts == sorted(counts, reverse=True)  # the order says nothing of the text's
    assert (
        leaks(
            b"\0\0".join(reports(record)), text=[PROMPT, text, expected.text], ids=[expected.ids], rows=expected.hidden
        )
        == []
    )
    by_routes = plan(cluster, "--mode", "expert")["expert"]["reason"]
    assert f"experts placed by the routes of {report.tokens} tokens" in by_routes

    # A device with experts is lost in the middle of an answer: the others answer the next, and the text is the same.
    whole = ask(cluster, max_tokens=LONG)
    lead = cluster.deployment(MODEL)["lead"]
    lost = next(name for name in ("three", "two") if name != lead)
    said = streamed(cluster, max_tokens=LONG)
    begun = [next(said) for _ in range(8)]
    cluster.roles[lost].kill()
    with pytest.raises(LostAnswerError, match="device_lost"):
        begun.extend(said)
    assert whole.startswith("".join(begun))
    until("the others", lambda: ready_without(lost, cluster), timeout_s=60)
    assert cluster.deployment(MODEL)["mode"] == "expert"
    assert ask(cluster, max_tokens=LONG) == whole


class LostAnswerError(Exception):
    """The error that ends a stream."""


def expert(devices: str, cluster: Cluster, *options: str) -> None:
    """Deploy the mixture with its experts on `devices`, about as many on each."""
    shares = ",".join("1" for _ in devices.split(","))
    cluster.cli("run", MODEL, "--mode", "expert", "--devices", devices, "--shares", shares, *options)
    deployed = cluster.deployment(MODEL)
    assert deployed["mode"] == "expert"
    assert sorted(shard["device"] for shard in deployed["shards"]) == sorted(devices.split(","))
    assert all(shard["experts"] for shard in deployed["shards"])
    assert [shard["device"] for shard in deployed["shards"] if shard["heads"][1]] == [deployed["lead"]]


def plan(cluster: Cluster, *options: str) -> dict[str, Any]:
    """The best candidate of each mode."""
    report = cluster.json("plan", MODEL, "--explain", *options)
    return {row["mode"]: row for row in reversed(report["candidates"])}


def body(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": 48, "temperature": 0} | options


def ask(cluster: Cluster, **options: Any) -> str:
    answer = httpx.post(f"{cluster.api}/v1/completions", json=body(**options), timeout=60).json()
    assert "choices" in answer, f"{answer}\n{cluster.logs()}"
    return str(answer["choices"][0]["text"])


def streamed(cluster: Cluster, **options: Any) -> Iterator[str]:
    """The pieces of a streamed answer; raises LostAnswerError where the stream says one."""
    url, asked = f"{cluster.api}/v1/completions", body(**options) | {"stream": True}
    with httpx.stream("POST", url, json=asked, timeout=60) as response:
        for line in response.iter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                continue
            said = msgspec.json.decode(data)
            if "error" in said:
                raise LostAnswerError(said["error"])
            yield from (choice["text"] for choice in said["choices"])


def reports(record: Path) -> list[bytes]:
    """The reports of routes that the coordinator got, serialized."""
    said = []
    for direction, method, message in read_recording(record):
        if direction == "in" and method.endswith("/Control"):
            found = fleet_pb2.AgentMessage.FromString(message)
            if found.HasField("routes"):
                said.append(found.routes.SerializeToString())
    return said


def ready_without(lost: str, cluster: Cluster) -> bool:
    deployed = cluster.deployment(MODEL)
    return deployed["phase"] == "ready" and lost not in [shard["device"] for shard in deployed["shards"]]
