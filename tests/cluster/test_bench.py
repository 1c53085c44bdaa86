"""`ganglion bench` before a real cluster: a model split for the time of it, and everything as before afterwards."""

from __future__ import annotations

import json

from cluster.harness import Cluster, until

EXCHANGES, ROW_BYTES = 12, 256 * 8  # of the demo model: two sums of a layer, each of a row of float64


def test_a_split_for_the_time_of_the_benchmark(cluster: Cluster) -> None:
    cluster.coordinator()
    cluster.join("one", "two")
    cluster.gateway()
    until("both measured", lambda: cluster.alive() == ["one", "two"])
    cluster.cli("run", "demo", "--devices", "one")
    manifests = cluster.home / "agents" / "one" / "store" / "manifests"
    before = cluster.json("ps"), sorted(manifests.iterdir())

    only = "decode,concurrent,second-turn,memory"
    split = ("--mode", "tensor", "--devices", "one,two")
    done = cluster.run("bench", "demo", "--quick", "--json", "--only", only, *split)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    assert list(found) == ["machine", "settings", "ours", "against", "missing", "checks", "notes"]
    [ours] = found["ours"]
    assert (ours["name"], ours["deployment"]["mode"]) == ("demo-bench", "tensor")
    assert ours["decode"]["ms_per_token"]["median"] > 0
    assert ours["account_ms"]["exchange"] > 0
    # Both ways, an exchange of both sides' partial sums; the rest is headers, the step, the row and the candidates.
    assert 1 < ours["wire_bytes_per_token"]["median"] / (2 * EXCHANGES * ROW_BYTES) < 1.5
    assert [row["sessions"] for row in ours["concurrent"]] == [1, 2]
    assert ours["second_turn"]["ratio"]["median"] > 0
    assert [row["device"] for row in ours["memory"]] == ["one", "two"]
    assert all(row["resident_bytes"] > row["anonymous_bytes"] > 0 for row in ours["memory"])
    assert (ours["prefill"], ours["arrivals"]) == ([], None)
    assert found["checks"] == ["demo-bench alone and beside other sessions: equal tokens, 2 times of 2"]

    assert (cluster.json("ps"), sorted(manifests.iterdir())) == before
