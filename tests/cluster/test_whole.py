"""From the command line to the OpenAI client and back: three devices answer as transformers does, and leave nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil
from cluster import reference
from cluster.conftest import start_three
from cluster.harness import Cluster
from openai import OpenAI

PROMPT = "def read_lines(path):"
TOKENS = 24


def test_three_devices_answer_as_transformers_and_leave_nothing(cluster: Cluster, checkpoint: Path) -> None:
    start_three(cluster)
    split = ["--devices", "one,two,three", "--shares", "2,1,1", "--mode", "tensor", "--format", "fp32"]
    cluster.cli("run", str(checkpoint), "--name", "tiny", *split)
    deployed = cluster.deployment("tiny")
    assert deployed["phase"] == "ready"
    assert deployed["mode"] == "tensor"
    assert deployed["numeric_class"] == "fp32-exact"
    heads = {shard["device"]: shard["heads"][1] - shard["heads"][0] for shard in deployed["shards"]}
    assert heads == {"one": 2, "two": 1, "three": 1}

    expected = reference.answer(checkpoint, PROMPT, TOKENS).text
    with OpenAI(base_url=f"{cluster.api}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0)
        assert whole.choices[0].text == expected
        assert whole.usage is not None
        assert whole.usage.completion_tokens == TOKENS
        chunks = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )
        in_chat = reference.answer(checkpoint, "<s>user: hello\nassistant: ", 8)
        assert chat.choices[0].message.content == in_chat.text
    said = cluster.run("run", "tiny", PROMPT, "--max-tokens", str(TOKENS), "--temperature", "0")
    assert said.returncode == 0, said.stderr
    assert said.stdout.rstrip("\n") == expected.rstrip("\n")

    processes, ports = cluster.processes(), cluster.ports()
    assert len(processes) >= 8  # coordinator, gateway, three supervisors, three workers
    cluster.cli("stop", "tiny")
    for name in ("gateway", "three", "two", "one", "coordinator"):
        assert cluster.roles[name].stop() == 0, cluster.logs()
    psutil.wait_procs(processes, timeout=10)
    assert [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, f"port {port} is still open"
    # HOME and TMPDIR of every process were this folder: what is here is all that was written.
    assert sorted(path.name for path in cluster.folder.iterdir()) == ["home", "logs", "tmp"]
    assert list((cluster.folder / "tmp").iterdir()) == []
    assert list(cluster.home.glob("**/serving.json")) == []
    assert list(cluster.home.glob("agents/*/run/*")) == []
