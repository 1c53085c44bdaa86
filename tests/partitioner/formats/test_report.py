"""The quality report: against a dumb runner, in every family, and on the demo model by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from checkpoints import make, make_llama
from family_shapes import FIRST, SHAPES
from mixture_shapes import SHAPES as MIXTURES
from mixture_shapes import make_mixture
from reference_runner import Runner, cut_evenly
from typer.testing import CliRunner

from ganglion.agent.executor.loader import start_runtime
from ganglion.cli.main import app
from ganglion.models import demo_path
from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.classes import lay_out
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.quality import Measured, TensorQuality, measure, rows_of_text, suggest
from ganglion.partitioner.quantize import Rules, parse_format
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import WEIGHTS_FILE


def open_session(graph: bytes, weights: bytes) -> Any:
    start_runtime(1)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [weights], [len(weights)])
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def measured(path: Path, weight_format: str, rows: list[list[int]], rules: Rules | None = None) -> Measured:
    chosen = numeric_class(path, weight_format, rules=rules or Rules())  # type: ignore[arg-type]
    layout = lay_out(open_checkpoint(path), chosen, rules or Rules())
    seen: list[tuple[int, int]] = []
    found = measure(layout, rows, open_session, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()


def test_figures_are_those_of_the_cut_model(models: Any, tmp_path: Path) -> None:
    """Perplexities, KL and choices from the logits of a dumb runner over pieces."""
    path = models.checkpoint("llama-kv4-biases")
    rows = [[256, *np.random.default_rng(at).integers(0, 256, 30 + at).tolist()] for at in range(2)]
    found = measured(path, "int4", rows)
    logits = []
    for weight_format in ("fp32", "int4"):
        cut = models.cut("llama-kv4-biases", weight_format)
        folder = tmp_path / weight_format
        runner = Runner(cut.manifest, cut.pieces, folder, cut_evenly(cut.manifest, (1,)))
        logits.append(np.concatenate([log_softmax(runner.forward(row)[0][:-1]) for row in rows]))
    following = np.concatenate([row[1:] for row in rows])
    places = np.arange(len(following))
    assert found.tokens == len(following)
    for perplexity, one in zip((found.perplexity_fp32, found.perplexity), logits, strict=True):
        assert perplexity == pytest.approx(np.exp(-one[places, following].mean()), rel=1e-6)
    kl = np.sum(np.exp(logits[0]) * (logits[0] - logits[1]), axis=1).mean()
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.top1 == pytest.approx((logits[0].argmax(1) == logits[1].argmax(1)).mean())
    # The parts of the KL are a division of it.
    assert sum(one.kl for one in found.tensors) == pytest.approx(found.kl, rel=0.2)
    assert [one.kl for one in found.tensors] == sorted((one.kl for one in found.tensors), reverse=True)
    assert len(found.tensors) == 3 * 7 + 1


@pytest.mark.parametrize("name", FIRST.values())
def test_float32_is_itself_in_every_family(name: str, tmp_path: Path) -> None:
    """Every kind of segment goes through: what is not rounded differs in nothing."""
    shape = SHAPES[name]
    path = make(tmp_path / "m", shape.family, dtype=shape.dtype, **shape.config)
    rows = [np.random.default_rng(1).integers(0, 256, 25).tolist()]
    found = measured(path, "fp32", rows)
    assert found.kl == 0
    assert found.top1 == 1
    assert found.perplexity == found.perplexity_fp32
    assert found.tensors == ()


FIRST_MIXTURES = {shape.family: name for name, shape in reversed(MIXTURES.items())}


@pytest.mark.parametrize("name", FIRST_MIXTURES.values())
def test_experts_are_measured_together(name: str, tmp_path: Path) -> None:
    path = make_mixture(tmp_path / "m", MIXTURES[name])
    rows = [np.random.default_rng(1).integers(0, 256, 25).tolist()]
    assert measured(path, "fp32", rows).kl == 0
    found = measured(path, "int4", rows)
    layers = {one.name: one for one in found.tensors if one.name.endswith("*")}
    assert layers
    for one in layers.values():
        assert 15 < one.sqnr_db < 30
        assert one.noise > 0
    assert not [name for name, _ in suggest(found, 0.0).exceptions if name.endswith("*")]


def test_the_report_finds_the_tensor_that_hurts(tmp_path: Path) -> None:
    """One matrix gets an outlier column that the others lack: rounding it costs most, keeping it is the advice."""
    from safetensors.torch import load_file, save_file

    path = make_llama(tmp_path / "m", hidden_size=128, head_dim=32, intermediate_size=256)
    file = path / "model.safetensors"
    tensors = load_file(file)
    bad = "model.layers.0.self_attn.v_proj.weight"
    tensors[bad][:, 5::32] *= 30  # in every block of 32
    save_file(tensors, file, metadata={"format": "pt"})
    rows = [np.random.default_rng(1).integers(0, 256, 80).tolist()]
    found = measured(path, "int4", rows)
    assert found.tensors[0].name == bad
    assert found.tensors[0].peak > 2 * max(one.peak for one in found.tensors[1:])
    assert found.tensors[0].noise > 1.3 * found.tensors[1].noise
    advice = suggest(found, found.kl / 2)
    assert bad in dict(advice.exceptions)
    assert advice.kl <= found.kl / 2
    rules = Rules(advice.exceptions)
    again = measured(path, "int4", rows, rules)
    assert again.kl < 0.75 * found.kl
    assert {one.name: one.format for one in again.tensors}[bad] == "int8-32"
    # What is stored as it was, or in more bits, is as good as float32.
    everything = Rules((("*", parse_format("int8-32")),))
    assert measured(path, "int4", rows, everything).kl < found.kl / 50


def test_suggestions_are_greedy_by_gain_per_byte() -> None:
    def tensor(name: str, form: str, kl: float, outputs: int) -> TensorQuality:
        size = parse_format(form).weight_bytes(outputs, 64)
        return TensorQuality(name, form, 20.0, 5.0, 0.1, kl, size, outputs, 64)

    tensors = (
        tensor("large", "int4-32", 0.05, 1000),
        tensor("small", "int4-32", 0.02, 10),
        tensor("wide", "int8", 0.001, 10),
        tensor("kept", "fp16", 0.001, 10),
        tensor("none", "int4-32", 0.0, 10),
    )
    report = Measured(None, 10, 2.0, 2.1, 0.072, 0.9, tensors)  # type: ignore[arg-type]
    assert suggest(report, 0.1).exceptions == ()
    assert [name for name, _ in suggest(report, 0.053).exceptions] == ["small"]
    advice = suggest(report, 0.0)
    assert [(name, form.name) for name, form in advice.exceptions] == [
        ("small", "int8-32"),
        ("wide", "fp16"),
        ("large", "int8-32"),
    ]
    assert advice.kl == pytest.approx(0.001)
    assert advice.more_bytes == 1010 * 2 * 36 - 1010 * 2 * 20 + 10 * (64 * 2 - 68)


def test_a_text_becomes_rows() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    rows = rows_of_text("abcdefg", encode, first=9, tokens=100, row_tokens=4, context=64)
    assert rows == [[9, 97, 98, 99], [9, 100, 101, 102], [9, 103]]
    assert rows_of_text("abcdefg", encode, first=None, tokens=5, row_tokens=99, context=4) == [[97, 98, 99, 100]]
    with pytest.raises(InvalidRequest, match="leave nothing to predict"):
        rows_of_text("", encode, first=9, tokens=5, row_tokens=8, context=8)


def test_the_command_reports_writes_and_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANGLION_HOME", str(tmp_path / "home"))
    written = tmp_path / "rules.json"
    one = ["--threads", "1"]  # a process has one pool, and this one has it
    base = ["quantize", "demo", "--report", "--tokens", "120", "--json", *one]
    first = CliRunner().invoke(app, [*base, "--target", "0.03", "--write", str(written)])
    assert first.exit_code == 0, first.output
    document = json.loads(first.stdout)
    assert document["numeric_class"] == "int4-32-exact"
    assert len(document["tensors"]) == 6 * 7 + 1
    assert {one["format"] for one in document["tensors"]} == {"int4-32"}
    assert document["suggested"]["exceptions"] == json.loads(written.read_text())["exceptions"]
    second = CliRunner().invoke(app, [*base, "--exceptions", str(written)])
    again = json.loads(second.stdout)
    assert again["kl_nats"] < document["kl_nats"]
    assert again["numeric_class"] != document["numeric_class"]
    third = CliRunner().invoke(app, [*base, "--exceptions", str(written), "--target", "0.001", "--write", str(written)])
    assert third.exit_code == 0, third.output
    merged = json.loads(written.read_text())["exceptions"]
    assert merged.keys() > document["suggested"]["exceptions"].keys()
    assert merged.items() >= json.loads(third.stdout)["suggested"]["exceptions"].items()  # wider than before
    quick = json.loads(CliRunner().invoke(app, [*base, "--no-tensors"]).stdout)
    assert (quick["kl_nats"], quick["tensors"]) == (document["kl_nats"], [])
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return 1\n" * 20)
    table = CliRunner().invoke(app, ["quantize", "demo", "--report", "--format", "int8", "--text", str(text), *one])
    assert "int8-exact on" in table.stdout
    assert "no exceptions are needed" in table.stdout
    for arguments, code, said in (
        (["demo", "--write", "x"], 2, "belong to --report"),
        (["demo", "--rounding", "up"], 2, "--rounding 'up'"),
        (["demo", "--report", "--text", str(tmp_path / "none")], 3, "no file"),
        (["demo", "--exceptions", str(tmp_path / "none")], 3, "no file"),
        (["demo", "--block", "7"], 2, "block 7"),
        (["demo"], 7, "no agent yet"),
    ):
        wrong = CliRunner().invoke(app, ["quantize", *arguments])
        assert (wrong.exit_code, said in wrong.output) == (code, True), wrong.output


def test_the_search_is_better_on_the_demo_model(tmp_path: Path) -> None:
    rows = [np.random.default_rng(1).integers(0, 2048, 60).tolist()]
    path = demo_path("demo")
    sqnr = {}
    for rounding in ("nearest", "search"):
        found = measured(path, "int4", rows, Rules(rounding=rounding))  # type: ignore[arg-type]
        sqnr[rounding] = {one.name: one.sqnr_db for one in found.tensors}
    assert all(sqnr["search"][name] > sqnr["nearest"][name] + 0.2 for name in sqnr["nearest"])


def test_a_cut_with_rules_is_what_was_measured(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "m")
    rules = Rules((("*.down_proj.weight", parse_format("int8")),))
    chosen = numeric_class(path, "int4", rules=rules)
    pieces = DirectorySink(tmp_path / "pieces")
    manifest = partition(path, pieces, name="m", numeric_class=chosen, rules=rules)
    ids = np.random.default_rng(1).integers(0, 256, 20).tolist()
    logits = Runner(manifest, pieces, tmp_path / "run", cut_evenly(manifest, (1,))).forward(ids)[0]
    found = measured(path, "int4", [ids], rules)
    expected = -log_softmax(logits[:-1])[np.arange(19), ids[1:]].mean()
    assert found.perplexity == pytest.approx(np.exp(expected), rel=1e-6)
