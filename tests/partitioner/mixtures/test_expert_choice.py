"""Which experts are wide: errors against a dumb count, the choice against all choices, and the command."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixture_shapes import SHAPES, make_mixture
from reference_runner import Runner, chained, cut_evenly
from typer.testing import CliRunner

from ganglion.agent.executor.loader import start_runtime
from ganglion.cli.main import app
from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.classes import lay_out
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.quality import ExpertError, Line, choose_widths, expert_errors, measure
from ganglion.partitioner.quantize import Rules, parse_format
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import WEIGHTS_FILE

WIDE = parse_format("int8-32")


def open_session(graph: bytes, weights: bytes) -> Any:
    start_runtime(1)
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_external_initializers_from_files_in_memory([WEIGHTS_FILE], [weights], [len(weights)])
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def laid_out(path: Path, rules: Rules | None = None, experts: Any = "whole") -> Any:
    rules = rules or Rules()
    chosen = numeric_class(path, "int4", rules=rules, experts=experts)
    return lay_out(open_checkpoint(path), chosen, rules, experts)


@given(
    errors=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8),
    most=st.integers(0, 300),
)
def test_no_choice_of_fewer_bytes_is_within_the_budget(errors, most):
    every = [ExpertError(f"e{at}", at, 1, float(narrow), float(wide), 100) for at, (narrow, wide) in enumerate(errors)]
    choice = choose_widths(every, float(most))
    assert choice.error == sum(one.wide if one.name in choice.wide else one.narrow for one in every)
    assert choice.more_bytes == 100 * len(choice.wide)
    sums = [
        (len(some), sum(one.wide if one in some else one.narrow for one in every))
        for size in range(len(every) + 1)
        for some in combinations(every, size)
    ]
    within = [size for size, error in sums if error <= most]
    if within:
        assert len(choice.wide) == min(within)
        assert choice.error <= most
    else:
        assert choice.error == min(error for _, error in sums)


def test_a_line_goes_through_what_was_measured():
    line = Line(narrow=(0.5, 0.12), wide=(0.1, 0.02))
    assert (line.kl(0.5), line.kl(0.1)) == (pytest.approx(0.12), pytest.approx(0.02))
    assert line.kl(line.most(0.05)) - 0.02 == pytest.approx(np.log(1.05))
    assert Line((0.5, 0.02), (0.1, 0.02)).most(0.01) == float("inf")  # nothing to gain


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-lite"])
def test_errors_are_those_of_rows_run_alone(name, mixtures, tmp_path):
    path, pieces = mixtures.checkpoint(name), DirectorySink(tmp_path / "pieces")
    rows = [mixtures.ids(name)[:25], mixtures.ids(name)[25:40]]
    errors = expert_errors(laid_out(path), WIDE, rows, open_session)
    runners = []
    for weights in ("fp32", "int4", "int8"):
        kind = numeric_class(path, weights, experts="whole")
        manifest = partition(path, pieces, name="m", numeric_class=kind, experts="whole")
        runners.append(Runner(manifest, pieces, tmp_path / weights, cut_evenly(manifest, (1,))))
    plain = runners[0]
    states: dict[int, list[tuple[np.ndarray, Any]]] = {}

    def record(layer: int, half: int, res: np.ndarray, delta: Any, each: int) -> Any:
        states.setdefault(layer, []).append((res, delta))
        out = Runner._mixture(plain, layer, half, res, delta, each)
        states[layer][-1] += (out[0] + out[1],)
        return out

    plain._mixture = record
    for row in rows:
        plain.forward(row)
    for layer, seen in states.items():
        half = len(plain.manifest.layers[layer].segments) - 1
        total = np.zeros((2, plain.manifest.layers[layer].segments[-1].groups))
        for res, delta, _ in seen:
            routed = chained(plain.sessions[0, layer, half][:1], {"res": res, "delta": delta})
            for row, chosen, weights in zip(routed["rows"], routed["chosen"], routed["weights"], strict=True):
                for expert, weight in zip(chosen, weights, strict=True):
                    feeds = {"rows": row[None], "index": np.array([expert])}
                    true, *found = (one.sessions[0, layer, half][1].run(["given"], feeds)[0] for one in runners)
                    for at, one in enumerate(found):
                        total[at, expert] += float(weight) ** 2 * np.square(one - true, dtype=np.float64).sum()
        total /= sum(np.square(left).sum() for *_, left in seen)
        of_layer = [one for one in errors if one.layer == layer]
        shared = sum("shared" in one.name for one in of_layer)
        assert sum(one.rows for one in of_layer) == 40 * plain.manifest.layers[layer].segments[-1].experts
        for at, field in enumerate(("narrow", "wide")):
            found = np.array([getattr(one, field) for one in of_layer])
            expected = total[at]
            if shared:  # of one format: taken together
                expected = np.append(expected[: len(of_layer) - 1], expected[len(of_layer) - 1 :].sum())
            assert np.allclose(found, expected, rtol=1e-3)
        assert all(one.narrow > one.wide for one in of_layer if one.rows)


def test_a_choice_is_measured_as_it_is_cut(mixtures, tmp_path):
    path, ids = mixtures.checkpoint("qwen3-moe"), mixtures.ids("qwen3-moe")[:40]
    errors = expert_errors(laid_out(path), WIDE, [ids], open_session)
    choice = choose_widths(errors, sum(one.narrow for one in errors) / 2)
    assert 0 < len(choice.wide) < len(errors)
    rules = Rules(tuple((name, WIDE) for name in choice.wide))
    layout = laid_out(path, rules)
    found = measure(layout, [ids], open_session, by_tensor=False)
    narrow = measure(laid_out(path), [ids], open_session, by_tensor=False)
    assert found.kl < narrow.kl
    pieces = DirectorySink(tmp_path / "pieces")
    chosen = layout.recipe.numeric_class
    manifest = partition(path, pieces, name="m", numeric_class=chosen, rules=rules, experts="whole")
    logits = Runner(manifest, pieces, tmp_path / "run", cut_evenly(manifest, (1,))).forward(ids)[0].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    nats = -logits[np.arange(len(ids) - 1), ids[1:]].mean()
    assert found.perplexity == pytest.approx(np.exp(nats), rel=1e-6)


def test_what_cannot_be_asked_of_experts_is_refused(mixtures):
    path = mixtures.checkpoint("qwen3-moe")
    one = "model.layers.0.mlp.experts.3."
    for exceptions, said in (
        (((f"{one}*", "int8"),), "int4 or int8 with a block"),
        (((f"{one}*", "fp16"),), "as int8-32"),
        (((f"{one}*", "int8-32z"),), "as int8-32"),
        (((f"{one}*", "int8-64"),), "blocks are at most 32"),
        (((f"{one}up_proj.weight", "int8-32"),), "its matrices have one format"),
        (((f"{one}*", "int8-32"), ("model.layers.0.mlp.experts.4.*", "fp32")), "have one other format"),
        ((("model.layers.0.mlp.experts.8.*", "int8-32"),), "no matrix of the model is called"),
    ):
        rules = Rules(tuple((name, parse_format(form)) for name, form in exceptions))
        with pytest.raises(InvalidRequest, match=said):
            numeric_class(path, "int4", rules=rules, experts="whole")
    rules = Rules(((f"{one}*", WIDE),))
    with pytest.raises(InvalidRequest, match="use --experts whole"):
        numeric_class(path, "int4", rules=rules)
    with pytest.raises(InvalidRequest, match="name none"):
        expert_errors(laid_out(path, rules), WIDE, [[1, 2]], open_session)
    with pytest.raises(InvalidRequest, match="cut whole"):
        expert_errors(laid_out(path, experts="columns"), WIDE, [[1, 2]], open_session)
    wide = laid_out(path, Rules((("model.layers.*", WIDE),)))  # whatever else the pattern names
    kinds = [plan.kind for layer in wide.layers for plan in layer]
    assert sum("experts=int8-32" in kind for kind in kinds) == 2


def test_the_command_chooses_writes_and_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANGLION_HOME", str(tmp_path / "home"))
    path = make_mixture(tmp_path / "m", SHAPES["qwen3-moe"])
    written, text = tmp_path / "rules.json", tmp_path / "text.txt"
    text.write_text("def main():\n    return 1\n" * 8)
    base = ["quantize", str(path), "--threads", "1", "--report", "--text", str(text), "--tokens", "60"]
    first = CliRunner().invoke(app, [*base, "--expert-budget", "0.5", "--write", str(written), "--json"])
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)["expert_widths"]
    assert found["experts"] == 16
    assert 0 < len(found["int8_experts"]) < 16
    assert found["chosen"]["kl_nats"] < found["int4"]["kl_nats"]
    assert found["expected_kl_nats"] - found["int8"]["kl_nats"] <= np.log(1.005) + 1e-9
    exceptions = json.loads(written.read_text())["exceptions"]
    assert exceptions == dict.fromkeys(found["int8_experts"], "int8-32")
    again = [*base, "--experts", "whole", "--exceptions", str(written)]
    second = CliRunner().invoke(app, [*again, "--json"])
    assert second.exit_code == 0, second.output
    assert json.loads(second.stdout)["kl_nats"] == pytest.approx(found["chosen"]["kl_nats"])
    tensors = {one["name"] for one in json.loads(second.stdout)["tensors"]}
    assert "model.layers.0.mlp.*" in tensors
    table = CliRunner().invoke(app, [*base, "--expert-budget", "1000"])
    assert "0 of 16 experts in int8" in table.stdout, table.output
    for arguments, said in (
        (["--expert-budget", "1"], "belong to --report"),
        (["--report", "--expert-budget", "1", "--experts", "columns"], "in a cut by --experts whole"),
        (["--report", "--expert-budget", "1", "--format", "int8"], "leave --format int4"),
        (["--report", "--experts", "rows"], "columns or whole"),
        (["--exceptions", str(written)], "use --experts whole"),
    ):
        wrong = CliRunner().invoke(app, ["quantize", str(path), "--threads", "1", *arguments])
        assert (wrong.exit_code, said in wrong.output) == (2, True), wrong.output
    dense = CliRunner().invoke(app, ["quantize", "demo", "--report", "--expert-budget", "1", "--threads", "1"])
    assert (dense.exit_code, "no experts to cut whole" in dense.output) == (2, True), dense.output
