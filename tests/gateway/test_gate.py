"""The gate in its room: the prior, a trained one, its renormalization on subsets, and what it reports."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ganglion.gateway.experts.deadlines import Patience
from ganglion.gateway.experts.encoder import BUCKETS
from ganglion.gateway.experts.gate import PRIOR_QUALITY, UNTRIED, FolderGate, PriorGate
from ganglion.gateway.experts.gate_file import FACTS_FILE, copy_gate, write_gate
from ganglion.gateway.experts.gate_training import EMBEDDING, HIDDEN, Example, GateWeights, run
from ganglion.gateway.experts.panel import Member, Panel
from ganglion.gateway.experts.profile import KINDS, Profile
from ganglion.gateway.experts.reports import Reporter
from ganglion.proto import admin_pb2
from ganglion.wire.errors import Corrupt, Unavailable

EXPERTS = ("a", "b", "c")


def test_the_prior_goes_by_domains() -> None:
    gate = PriorGate({"py": ("python",), "web": ("javascript",), "any": ()}.__getitem__)
    assert gate.weigh("def f(): pass", ["py", "web", "any"]).weights == {"py": 0.6, "web": 0.2, "any": 0.2}
    assert gate.weigh("hello", ["web", "any"]).weights == {"web": 0.5, "any": 0.5}
    assert gate.weigh("", ["py"]).quality == {"py": PRIOR_QUALITY}


def made(seed: int) -> GateWeights:
    """Of nothing but chance."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    count, hidden = len(EXPERTS), normal(EMBEDDING, HIDDEN)
    heads = (normal(HIDDEN, count), normal(count), normal(HIDDEN, count), normal(count))
    return GateWeights(EXPERTS, normal(BUCKETS, EMBEDDING), hidden, normal(HIDDEN), *heads)


def test_a_subset_is_renormalized(tmp_path: Path) -> None:
    weights = made(1)
    write_gate(tmp_path, weights, [Example(text, {}) for text in ("xyzzy", "x", "y")])
    gate = FolderGate(tmp_path, PriorGate())
    assert gate.experts == EXPERTS
    for text in ("xyzzy", "x", ""):
        softmax, judged = run(weights, text)
        whole = gate.weigh(text, EXPERTS)
        assert list(whole.weights.values()) == pytest.approx(softmax.tolist(), rel=0.02, abs=1e-4)
        assert list(whole.quality.values()) == pytest.approx(judged.tolist(), rel=0.02, abs=1e-4)
        part = gate.weigh(text, ["c", "a"])
        kept = whole.weights["a"] + whole.weights["c"]
        assert part.weights["c"] == pytest.approx(whole.weights["c"] / kept, rel=1e-5)
        assert part.quality["a"] == whole.quality["a"]
        other = gate.weigh(text, ["a", "new", "b"])
        assert other.weights["new"] == pytest.approx(1 / 3), "the prior's share"
        assert other.quality["new"] == pytest.approx((whole.quality["a"] + whole.quality["b"]) / 2), "on their scale"
        assert sum(other.weights.values()) == pytest.approx(1)
        assert gate.weigh(text, ["new"]).weights == {"new": 1.0}
    *trained, (share, untried) = gate.kinds(["a", "b", "new"])
    assert sum(share for share, _ in trained) + share == pytest.approx(1, abs=1e-4)
    for _, quality in trained:
        assert quality["new"] == pytest.approx((quality["a"] + quality["b"]) / 2)
    assert share == UNTRIED
    assert untried["new"] > max(untried["a"], untried["b"]), "so that it is asked at all"
    assert gate.kinds(["new"]) == ()
    assert sum(share for share, _ in gate.kinds(["a", *(f"new-{at}" for at in range(40))])[-40:]) == pytest.approx(0.5)


def test_a_gate_that_is_trained_anew_is_read_anew(tmp_path: Path) -> None:
    texts = [Example("x", {})]
    write_gate(tmp_path, made(1), texts)
    gate = FolderGate(tmp_path, PriorGate())
    before = gate.weigh("abc", EXPERTS)
    write_gate(tmp_path, made(2), texts)
    os.utime(tmp_path / FACTS_FILE, ns=(1, 1))
    assert gate.weigh("abc", EXPERTS) != before


def test_a_gate_comes_and_goes_while_the_gateway_runs(tmp_path: Path) -> None:
    prior = PriorGate()
    gate = FolderGate(tmp_path, prior)
    profile = Profile()
    assert gate.weigh("abc", EXPERTS) == prior.weigh("abc", EXPERTS)
    assert profile.begin(EXPERTS, gate.kinds(EXPERTS))
    assert (gate.experts, profile.message()) == ((), None)
    write_gate(tmp_path, made(1), [Example("x", {})])
    assert gate.weigh("abc", EXPERTS) != prior.weigh("abc", EXPERTS)
    assert gate.experts == EXPERTS
    assert profile.begin(EXPERTS, gate.kinds(EXPERTS)), "the gate has something to say of the same experts"
    assert not profile.begin(EXPERTS, gate.kinds(EXPERTS))
    assert profile.message() is not None
    (tmp_path / FACTS_FILE).unlink()
    assert gate.weigh("abc", EXPERTS) == prior.weigh("abc", EXPERTS)


def test_a_gate_that_cannot_be_read(tmp_path: Path) -> None:
    write_gate(tmp_path, made(1), [Example("x", {})])
    gate = FolderGate(tmp_path, PriorGate())
    before = gate.weigh("abc", EXPERTS)
    (tmp_path / FACTS_FILE).write_text("[]")
    os.utime(tmp_path / FACTS_FILE, ns=(1, 1))
    assert gate.weigh("abc", EXPERTS) == before, "it stays as it was"
    with pytest.raises(Corrupt, match=r"gate\.json"):
        FolderGate(tmp_path, PriorGate())


def test_a_gate_is_copied_whole(tmp_path: Path) -> None:
    write_gate(tmp_path / "a", made(1), [Example("x", {})])
    copied = copy_gate(tmp_path / "a", tmp_path / "b")
    assert copied.experts == EXPERTS
    found = [FolderGate(tmp_path / name, PriorGate()).weigh("abc", EXPERTS) for name in "ab"]
    assert found[0] == found[1]
    assert sorted(each.name for each in (tmp_path / "b").iterdir()) == ["gate.json", "gate.onnx"]
    (tmp_path / "a" / FACTS_FILE).write_text("[]")
    with pytest.raises(Corrupt):
        copy_gate(tmp_path / "a", tmp_path / "b")


def test_the_profile_keeps_kinds_and_their_shares() -> None:
    profile = Profile()
    assert profile.message() is None
    for at in range(300):
        profile.add({"a": 0.9, "b": 0.1} if at % 3 else {"a": 0.2, "b": 0.8}, ["a", "b"])
    message = profile.message()
    assert message is not None
    rows = sorted((row.share, [round(value, 3) for value in row.quality]) for row in message.rows)
    assert [quality for _, quality in rows] == [[0.2, 0.8], [0.9, 0.1]]
    assert rows[0][0] == pytest.approx(1 / 3, abs=0.02)
    generator = np.random.default_rng(2)
    for _ in range(200):
        profile.add(dict(zip("ab", generator.uniform(0, 1, 2).tolist(), strict=True)), ["a", "b"])
    message = profile.message()
    assert message is not None
    assert len(message.rows) <= 2 * KINDS
    assert sum(row.share for row in message.rows) == pytest.approx(1)
    for at in range(200):
        profile.add({"a": 0.04, "b": 0.05} if at % 2 else {"a": 0.04, "b": 0.03}, ["a", "b"])
    message = profile.message()
    assert message is not None
    assert len({row.quality[0] > row.quality[1] for row in message.rows}) == 2, "what each is best for stays apart"
    profile.add({"c": 0.5}, ["c"])
    message = profile.message()
    assert message is not None
    assert list(message.experts) == ["c"], "it begins anew when the experts change"


async def test_reports_keep_what_the_coordinator_did_not_take() -> None:
    class Coordinator:
        taken: list[admin_pb2.OutcomeReport] = []  # noqa: RUF012
        there = False

        async def report(self, report: admin_pb2.OutcomeReport) -> None:
            if not self.there:
                raise Unavailable("away")
            self.taken.append(report)

    coordinator = Coordinator()
    reporter = Reporter(coordinator)
    await reporter.flush()
    panel = Panel([Member("a", 1.0, 0.5, Patience(1.0, 1.0))], "best")
    panel.start(0.0)
    panel.said(0, "x", 1, (), 0.5)
    panel.said(0, "y", 1, (), 0.75)
    panel.ended(0, "stop", 3, 1.0)
    reporter.add(panel.attempts)
    reporter.profile.add({"a": 0.5}, ["a"])
    await reporter.flush()
    coordinator.there = True
    await reporter.flush()
    await reporter.flush()
    (report,) = coordinator.taken
    (outcome,) = report.outcomes
    assert (outcome.ttft_s, outcome.tpot_s, outcome.tokens) == (0.5, 0.25, 3)
    assert list(report.profile.experts) == ["a"]
