"""Edge experts by real processes: one `up`, the four demo models side by side, and a server that is somebody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
from cluster.harness import Cluster, until

PORTS = ("--bind", "127.0.0.1", "--port", "0", "--fleet-port", "0", "--enrolment-port", "0", "--no-mdns")
DEMO = ["demo", "demo-c", "demo-english", "demo-javascript"]
PYTHON = "import os\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n    def "
C = "#include <stdlib.h>\n\nstruct list {\n    struct list *next;\n    int value;\n};\n\nstatic inline void "


def test_the_walk_of_edge_experts(cluster: Cluster) -> None:
    started = cluster.run("up", "--detach", "--threads", "1", *PORTS)
    assert started.returncode == 0, started.stderr
    up = psutil.Process(json.loads((cluster.home / "owner" / "serving.json").read_bytes())["pid"])
    try:
        assert cluster.run("run", "experts", "x").returncode == 3, "there are none yet"
        said = cluster.run("experts", "demo")
        assert said.returncode == 0, said.stderr
        assert "prompts are weighed by" in said.stderr
        walk = Walk(cluster)
        until("all are known to the gateway", walk.all_weighed)
        walk.best()
        walk.budgets()
        walk.several()
        walk.blended()
        walk.logged()
        walk.lost()
        walk.elsewhere()
    finally:
        family = [up, *up.children(recursive=True)]
        ended = cluster.run("down")
    assert ended.returncode == 0, ended.stderr
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []


class Walk:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.api: str = json.loads((cluster.home / "gateway" / "serving.json").read_bytes())["api"]

    def post(self, prompt: str, **options: Any) -> httpx.Response:
        body = {"model": "experts", "prompt": prompt, "max_tokens": 24, "temperature": 0} | options
        return httpx.post(f"{self.api}/v1/completions", json=body, timeout=60)

    def ask(self, prompt: str, **options: Any) -> tuple[str, dict[str, Any]]:
        """Text, and the account of the experts."""
        answer = self.post(prompt, **options).json()
        assert "choices" in answer, answer
        return answer["choices"][0]["text"], answer.get("ganglion", {}).get("experts", {})

    def refused(self, prompt: str, **options: Any) -> str:
        answer = self.post(prompt, **options)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "experts"
        return str(answer.json()["error"]["message"])

    @contextmanager
    def stream(self, prompt: str, **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
        body = {"model": "experts", "prompt": prompt, "stream": True, "temperature": 0.7} | options
        with httpx.stream("POST", f"{self.api}/v1/completions", json=body, timeout=60) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
            yield (json.loads(line) for line in lines if line != "[DONE]")

    def all_weighed(self) -> bool:
        answer = self.post(C, max_tokens=1).json()
        return sorted(answer.get("ganglion", {}).get("experts", {}).get("weights", {})) == DEMO

    def best(self) -> None:
        for prompt, wanted in ((PYTHON, "demo"), (C, "demo-c")):
            text, account = self.ask(prompt)
            assert (account["combine"], account["answered_by"], account["asked"]) == ("best", wanted, [wanted])
            assert text == self.ask(prompt, model=wanted)[0], "it is that model's own answer"
        printed = self.cluster.cli("run", "experts", C, "--max-tokens", "24", "--temperature", "0")
        assert printed.rstrip("\n") == self.ask(C)[0].rstrip("\n")

    def budgets(self) -> None:
        late = self.refused(C, experts={"latency_s": 0.001})
        assert late.startswith("latency_s 0.001: the fastest expert is ")
        assert "ask for latency_s >= " in late
        dear = self.refused(C, experts={"energy_j": 1e-6, "combine": "vote"})
        assert dear.startswith("energy_j 1e-06: the most frugal expert is ")
        assert "ask for energy_j >= " in dear
        self.cluster.cli("experts", "budget", "two", "--combine", "rerank", "--most", "2", "--tokens", "24")
        assert len(self.cluster.json("experts", "explain", "two")["experts"]) == 2
        until("the class is there", lambda: self.post(C, model="experts:two").status_code == 200)
        assert len(self.ask(C, model="experts:two")[1]["asked"]) == 2
        assert self.cluster.run("run", "experts:three", "x").returncode == 3
        wrong = self.cluster.run("run", "experts", "x", "--format", "int8")
        assert (wrong.returncode, "deployed one by one" in wrong.stderr) == (2, True)

    def several(self) -> None:
        _, voted = self.ask("def", max_tokens=2, experts={"combine": "vote"})
        assert sorted(voted["asked"]) == DEMO
        assert voted["answered_by"] in DEMO
        text, best_of = self.ask(C, temperature=0.8, seed=3, experts={"combine": "rerank", "n": 3})
        assert (text != "", best_of["n"]) == (True, 3)

    def blended(self) -> None:
        drawn = {"experts": {"combine": "blend"}, "seed": 5, "max_tokens": 24, "ignore_eos": True}
        with self.stream(C, **drawn) as events:
            found = list(events)
        texts = [each["choices"][0]["text"] for each in found if each["choices"]]
        assert len([text for text in texts if text]) > 5, "it comes as it is drawn"
        again, account = self.ask(C, temperature=0.7, **drawn)
        assert again == "".join(texts)
        assert (account["combine"], account["answered_by"], sorted(account["asked"])) == ("blend", None, DEMO)

    def logged(self) -> None:
        kept = self.cluster.json("experts", "log", "show")
        assert (kept["on"], kept["count"]) == (False, 0), "nothing without consent"
        self.cluster.cli("experts", "log", "on")
        self.ask(C, max_tokens=2, experts={"combine": "rerank"})
        (outcome,) = self.cluster.json("experts", "log", "show")["last"]
        assert (outcome["combine"], outcome["prompt"]) == ("rerank", C)
        assert outcome["answers"][0]["mean_logprob"] < 0
        few = self.cluster.run("experts", "train")
        assert few.returncode == 2
        assert "1 outcomes are logged" in few.stderr

    def lost(self) -> None:
        """A deployment that ends in the middle of a blend goes from it with a reason; the stream goes on to its end."""
        tokens = 700
        with self.stream(C, seed=1, max_tokens=tokens, ignore_eos=True, experts={"combine": "blend"}) as events:
            next(events)
            self.cluster.cli("stop", "demo-english")
            *_, last = (each for each in events if each.get("ganglion"))
        account = last["ganglion"]["experts"]
        assert list(account["dropped"]) == ["demo-english"]
        assert account["dropped"]["demo-english"]
        assert account["usage"]["demo-c"]["completion_tokens"] == tokens
        left = until("it is away", lambda: self.away("demo-english"))
        assert left["why"].startswith("it is not deployed")
        _, voted = self.ask(C, max_tokens=2, experts={"combine": "vote"})
        assert "demo-english" not in voted["asked"]

    def away(self, name: str) -> dict[str, Any] | None:
        rows: list[dict[str, Any]] = self.cluster.json("experts", "ls")
        return next((row for row in rows if row["name"] == name and row["state"] == "away"), None)

    def elsewhere(self) -> None:
        """A server that speaks OpenAI's API, here this fleet's own: a stranger's, as far as experts go."""
        self.cluster.cli("experts", "add", "outside", "--url", f"{self.api}/v1", "--model", "demo-c", "--domains", "c")
        for name in DEMO:
            self.cluster.cli("experts", "rm", name)
        text, account = until("it answers", self.outside)
        assert text == self.ask(C, model="demo-c")[0]
        assert account["usage"]["outside"]["completion_tokens"] == 24
        assert "private" in self.refused(C, experts={"private": True})
        self.cluster.cli("experts", "key", "outside", "--forget")
        forbidden = self.post(C)
        assert forbidden.status_code == 403, forbidden.text
        assert "ganglion experts key outside --url" in forbidden.json()["error"]["message"]

    def outside(self) -> tuple[str, dict[str, Any]] | None:
        text, account = self.ask(C)
        return (text, account) if account["answered_by"] == "outside" else None
