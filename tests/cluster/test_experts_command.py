"""`ganglion experts` against a coordinator that runs: what is set is shown, and what nothing meets is said."""

from __future__ import annotations

from pathlib import Path

from cluster.harness import Cluster


def test_experts_and_budgets_from_the_command_line(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.coordinator()
        cluster.cli("experts", "add", "demo", "--domains", "c")
        server = ("--url", "http://192.0.2.7:11434/v1", "--model", "Big-7B", "--tokens-per-s", "40", "--energy", "0.5")
        cluster.cli("experts", "add", "big", *server, "--label", "friend")
        cluster.cli("experts", "add", "big", "--domains", "docs,python")  # what is not given stays
        away, big = sorted(cluster.json("experts", "ls"), key=lambda row: row["name"] == "big")
        assert (away["name"], away["state"]) == ("demo", "away")
        assert (big["url"], big["model"], big["label"]) == ("http://192.0.2.7:11434/v1", "Big-7B", "friend")
        assert (big["domains"], big["tokens_per_s"]) == (["docs", "python"], 40.0)
        listed = cluster.cli("experts", "ls")
        assert "ganglion run demo" in listed
        assert "none: as claimed" in listed

        chosen = cluster.json("experts", "explain")
        assert (chosen["class"], chosen["experts"]) == ("default", ["big"])
        assert chosen["left_out"]["demo"].startswith("away")
        refused = cluster.run("experts", "budget", "quick", "--latency", "100ms", "--combine", "vote", "--tokens", "64")
        assert refused.returncode == 0
        assert "the fastest expert is big" in refused.stderr
        assert "refused   latency_s 0.1" in cluster.cli("experts", "explain", "quick")
        cluster.cli("experts", "budget", "quick", "--latency", "10s", "--energy", "70")
        told = cluster.cli("experts", "explain", "quick")
        assert "chosen    big" in told
        assert "energy    64 J" in told
        cluster.cli("experts", "budget", "rm", "quick")
        assert cluster.run("experts", "explain", "quick").returncode == 3
        cluster.cli("experts", "rm", "big")
        assert [row["name"] for row in cluster.json("experts", "ls")] == ["demo"]
