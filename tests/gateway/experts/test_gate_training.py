"""The gate: features, training against numeric gradients, files, and what a subset makes of it."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.gateway.experts import gate_training
from ganglion.gateway.experts.encoder import BUCKETS, GRAMS, HEAD_BYTES, TAIL_BYTES, features
from ganglion.gateway.experts.gate_file import FACTS_FILE, GRAPH_FILE, GateFile, write_gate
from ganglion.gateway.experts.gate_training import Example, GateWeights, run, train
from ganglion.wire.errors import Corrupt, InvalidRequest

EXPERTS = ("fish", "bird", "tree", "idle")
WORDS = {
    "fish": ["fin", "gill", "scale", "swim", "river", "school", "tide"],
    "bird": ["wing", "feather", "nest", "song", "flight", "beak", "egg"],
    "tree": ["leaf", "bark", "root", "branch", "shade", "ring", "acorn"],
}


def example(generator: np.random.Generator, kind: str) -> Example:
    text = " ".join(generator.choice(WORDS[kind], 12))
    quality = {name: 0.6 if name == kind else 0.1 for name in EXPERTS}
    return Example(text, quality)


def examples(count: int, seed: int) -> list[Example]:
    generator = np.random.default_rng(seed)
    return [example(generator, list(WORDS)[at % 3]) for at in range(count)]


def reference_features(text: str) -> dict[int, int]:
    """One n-gram after the other, in Python's integers."""
    data = text.encode("utf-8", "replace")
    if len(data) > HEAD_BYTES + TAIL_BYTES:
        data = data[:HEAD_BYTES] + data[-TAIL_BYTES:]
    counts: dict[int, int] = {}
    for size in GRAMS:
        for at in range(len(data) - size + 1):
            found = 2166136261 ^ size
            for byte in data[at : at + size]:
                found = (found ^ byte) * 16777619 % 2**32
            bucket = (found ^ (found >> 15)) % BUCKETS
            counts[bucket] = counts.get(bucket, 0) + 1
    return counts


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
@hypothesis.example("long " * 700)
def test_features_are_counted_n_grams(text: str) -> None:
    found, expected = features(text), reference_features(text)
    assert found.buckets.tolist() == sorted(expected)
    if expected:
        raw = np.log1p([expected[bucket] for bucket in sorted(expected)])
        np.testing.assert_allclose(found.weights, raw / np.linalg.norm(raw), rtol=1e-5)


def test_a_gate_learns_which_expert_a_prompt_wants_and_how_good_it_is() -> None:
    gate = train(examples(120, 0), EXPERTS, epochs=12)
    for one in examples(30, 1):
        weights, quality = run(gate, one.text)
        best = max(one.quality, key=lambda name: one.quality[name])
        assert EXPERTS[int(weights.argmax())] == best
        assert weights.max() > 0.9
        np.testing.assert_allclose(quality, list(one.quality.values()), atol=0.15)


def test_gradients_are_those_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_training, "EMBEDDING", 5)
    monkeypatch.setattr(gate_training, "HIDDEN", 4)
    some = examples(6, 2)
    some[0] = Example(some[0].text, {"fish": 0.3, "idle": 0.2})  # the others were not asked
    names = EXPERTS
    known = np.array([[name in one.quality for name in names] for one in some])
    quality = np.array([[one.quality.get(name, 0.0) for name in names] for one in some], np.float32)
    targets = gate_training._softmax(np.where(known, np.log(np.maximum(quality, 1e-4)) / 0.5, -np.inf))
    read = [features(one.text) for one in some]
    model = gate_training._Model(names, 3)
    model._values["weight"] *= 30  # away from the start, where everything is alike
    model.step(read, targets, quality, known, 0.0)
    gradients = {name: one.copy() for name, one in model._gradients.items()}
    generator = np.random.default_rng(0)
    for name, value in model._values.items():
        rows = value.reshape(-1)
        touched = np.flatnonzero(gradients[name].reshape(-1))
        for at in generator.choice(touched, 3):
            before, losses = rows[at], []
            for moved in (before + 3e-3, before - 3e-3):
                rows[at] = moved
                losses.append(model.step(read, targets, quality, known, 0.0))
            rows[at] = before
            numeric = (losses[0] - losses[1]) / 6e-3
            assert numeric == pytest.approx(float(gradients[name].reshape(-1)[at]), rel=0.05, abs=3e-4), name


def test_of_a_subset_the_full_gate_renormalised_is_as_good_as_one_trained_on_it() -> None:
    """Luce's axiom on a case that a gate can learn; what real experts give is in bench/RESULTS.md."""
    full = train(examples(120, 0), EXPERTS, temperature=0.5, epochs=12)
    subset = ("fish", "bird")
    columns = [EXPERTS.index(name) for name in subset]
    own = train(
        [Example(e.text, {n: e.quality[n] for n in subset}) for e in examples(120, 0)],
        subset,
        temperature=0.5,
        epochs=12,
    )
    losses = []
    for one in examples(60, 5):
        target = gate_training._softmax(np.log([one.quality[name] for name in subset])[None] / 0.5)[0]
        from_full = run(full, one.text)[0][columns]
        pair = (from_full / from_full.sum(), run(own, one.text)[0])
        losses.append([-(target * np.log(weights)).sum() for weights in pair])
    renormalised, trained = np.mean(losses, axis=0)
    assert renormalised < trained + 0.05


def test_what_cannot_be_trained_from_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="31 outcomes"):
        train(examples(31, 0), EXPERTS)
    with pytest.raises(InvalidRequest, match="no outcome has tried stone"):
        train(examples(40, 0), (*EXPERTS, "stone"))
    with pytest.raises(InvalidRequest, match="no number from 0 to 1"):
        train([*examples(40, 0), Example("x", {"fish": float("nan")})], EXPERTS)


@pytest.fixture(scope="module")
def gate() -> GateWeights:
    return train(examples(60, 0), EXPERTS, epochs=4)


def test_the_file_gives_what_the_weights_give(gate: GateWeights, tmp_path: Path) -> None:
    write_gate(tmp_path, gate, examples(60, 0))
    read = GateFile(tmp_path)
    assert read.facts.experts == EXPERTS
    assert sum(read.facts.shares) == pytest.approx(1, abs=1e-4)
    for text in ("", "a", *(one.text for one in examples(5, 9))):
        logits, judged = read.run(text)
        weights, expected = run(gate, text)
        np.testing.assert_allclose(gate_training._softmax(logits[None])[0], weights, atol=2e-3)
        np.testing.assert_allclose(judged, expected, atol=2e-3)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (GRAPH_FILE, b"no graph", "no graph that ONNX Runtime loads"),
        (FACTS_FILE, b"{", "truncated"),
        (
            FACTS_FILE,
            b'{"format":1,"buckets":4,"experts":["a"],"examples":1,"shares":[],"quality":[]}',
            "with 4 buckets",
        ),
        (
            FACTS_FILE,
            b'{"format":1,"buckets":8192,"experts":["a"],"examples":1,"shares":[1],"quality":[[1,1]]}',
            "columns",
        ),
    ],
)
def test_a_broken_file_is_refused(gate: GateWeights, tmp_path: Path, file: str, content: bytes, says: str) -> None:
    write_gate(tmp_path, gate, examples(40, 0))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(Corrupt, match=says):
        GateFile(tmp_path)


def test_a_gate_of_other_experts_than_it_says_is_refused(gate: GateWeights, tmp_path: Path) -> None:
    write_gate(tmp_path, gate, examples(40, 0))
    facts = msgspec.json.decode((tmp_path / FACTS_FILE).read_bytes())
    facts["experts"], facts["quality"] = ["one"], [[1.0]] * len(facts["shares"])
    (tmp_path / FACTS_FILE).write_bytes(msgspec.json.encode(facts))
    with pytest.raises(Corrupt, match="for 1 experts"):
        GateFile(tmp_path).run("x")
