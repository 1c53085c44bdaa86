"""Exceptions by tensor: what a rule says, how classes and graphs are named, and that mixed segments stay exact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_llama, make_qwen3
from reference_runner import Runner, cut_evenly

from ganglion.partitioner.classes import default_format, numeric_class
from ganglion.partitioner.cut import partition
from ganglion.partitioner.quantize import Rules, parse_format, read_rules, write_rules
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import GanglionError, InvalidDocument, InvalidRequest, NotFound
from ganglion.wire.nouns import Manifest, NumericClass

MIXED = Rules(
    (
        ("model.layers.1.self_attn.v_proj.weight", parse_format("int8")),
        ("*.k_proj.weight", parse_format("int8-32")),
        ("*.layers.1.mlp.up_proj.weight", parse_format("fp16")),
        ("*.layers.0.mlp.down_proj.weight", parse_format("int8")),
        ("*.layers.1.mlp.down_proj.weight", parse_format("int4-16z")),
        ("lm_head.weight", parse_format("int8-32z")),
    )
)


def cut(path: Path, weight_format: str, pieces: Path, rules: Rules, *, fast: bool = False) -> Manifest:
    chosen = numeric_class(path, weight_format, fast=fast, rules=rules)  # type: ignore[arg-type]
    return partition(path, DirectorySink(pieces), name="m", numeric_class=chosen, rules=rules)


@pytest.mark.parametrize("weight_format", ["int4", "int8", "fp32"])
def test_segments_of_mixed_formats_are_exact_and_near(weight_format: str, tmp_path: Path) -> None:
    path = make_qwen3(tmp_path / "m", attention_bias=True, intermediate_size=100)
    manifest = cut(path, weight_format, tmp_path / "pieces", MIXED)
    plain = cut(path, "fp32", tmp_path / "pieces", Rules())
    ids = np.random.default_rng(7).integers(0, 283, 40).tolist()
    pieces = DirectorySink(tmp_path / "pieces")
    found = []
    for number, weights in enumerate([(1,), (1, 1), (1, 4, 2)]):
        runner = Runner(manifest, pieces, tmp_path / str(number), cut_evenly(manifest, weights))
        found.append(runner.forward(ids, [None, [33, 1, 6], [1] * 5 + [35]][number]))
    for logits, hidden in found[1:]:
        assert np.array_equal(logits, found[0][0])
        assert np.array_equal(hidden, found[0][1])
    expected = Runner(plain, pieces, tmp_path / "plain", cut_evenly(plain, (1,))).forward(ids)[0]
    assert np.corrcoef(found[0][0].ravel(), expected.ravel())[0, 1] > (0.7 if weight_format == "int4" else 0.98)
    other = cut(path, weight_format, tmp_path / "pieces", MIXED, fast=True)
    logits = Runner(other, pieces, tmp_path / "fast", cut_evenly(other, (1, 1))).forward(ids)[0]
    assert np.corrcoef(logits.ravel(), found[0][0].ravel())[0, 1] > 0.95


def test_kinds_and_classes_show_exceptions(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "m")
    rules = Rules((("*.layers.1.mlp.down_proj.weight", parse_format("int8")),))
    manifest = cut(path, "int4", tmp_path / "pieces", rules)
    kinds = [[segment.kind for segment in layer.segments] for layer in manifest.layers]
    assert kinds == [["attention", "mlp"], ["attention", "mlp+down=int8"]]
    assert {name.split("/")[0] for name in manifest.graphs} == {"attention", "mlp", "mlp+down=int8", "head"}
    name = manifest.numeric_class.name
    assert name == f"int4-32+{manifest.numeric_class.exceptions}-exact"
    assert len(manifest.numeric_class.exceptions) == 8
    same = Rules((("model.layers.1.mlp.down_*", parse_format("int8")),))
    assert numeric_class(path, "int4", rules=same).name == name  # what counts is what the rules come to
    nothing = Rules((("*mlp*", parse_format("int4-32")),))
    assert numeric_class(path, "int4", rules=nothing).name == "int4-32-exact"
    assert numeric_class(path, "int4", rules=Rules(rounding="search")).name not in (name, "int4-32-exact")
    with pytest.raises(InvalidRequest, match=r"int4-32-exact: the checkpoint has int4-32\+"):
        partition(
            path,
            DirectorySink(tmp_path),
            name="m",
            numeric_class=NumericClass(format="int4", block=32, exact=True),
            rules=rules,
        )


def test_an_exact_name_comes_before_patterns() -> None:
    rules = Rules((("a*", parse_format("fp32")), ("ab", parse_format("int8")), ("*", parse_format("fp16"))))
    assert [rules.of(name).name for name in ("ab", "ac", "b")] == ["int8", "fp32", "fp16"]  # type: ignore[union-attr]


def test_classes_of_a_checkpoint(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "m")
    names = {
        ("fp16", None, False): "fp16-exact",
        ("int8", None, False): "int8-exact",
        ("int8", None, True): "int8-fast",
        ("int8", 32, False): "int8-32-exact",
        ("int4", 16, False): "int4-16-exact",
        ("int4", 32, True): "int4-32-fast",
    }
    for (weight_format, block, fast), name in names.items():
        assert numeric_class(path, weight_format, block=block, fast=fast).name == name  # type: ignore[arg-type]
    for weight_format, block, said in (
        ("int4", 0, "int4 has a block of 16 to 128"),
        ("fp16", 32, "fp16 has none"),
        ("int8", 64, "blocks of exact classes are at most 32"),
        ("int4", 48, "block 48"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            numeric_class(path, weight_format, block=block)  # type: ignore[arg-type]
    assert default_format(path, 1 << 30) == "fp32"
    assert default_format(path, 1000) == "int4"


def test_rules_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_bytes(write_rules(MIXED))
    assert read_rules(file) == MIXED
    file.write_text('{"rounding": "search"}')
    assert read_rules(file) == Rules(rounding="search")
    bad: list[tuple[str, type[GanglionError], str]] = [
        ("[]", InvalidDocument, "an object"),
        ("{", InvalidDocument, "not JSON"),
        ('{"a": 1}', InvalidDocument, "exceptions and rounding"),
        ('{"exceptions": []}', InvalidDocument, "an object of tensor names"),
        ('{"exceptions": {"w": 4}}', InvalidDocument, "format of 'w'"),
        ('{"exceptions": {"w": "int3"}}', InvalidRequest, "format 'int3'"),
        ('{"rounding": ["nearest"]}', InvalidDocument, "nearest or search"),
    ]
    for text, kind, said in bad:
        file.write_text(text)
        with pytest.raises(kind, match=said):
            read_rules(file)
    with pytest.raises(NotFound, match="no file"):
        read_rules(tmp_path / "none")
    path = make_llama(tmp_path / "m")
    for pattern, form, said in (
        ("no_such*", "int8", "'no_such\\*', which no matrix"),
        ("lm_head.weight", "int4-64", "blocks are at most 32; use int4-32"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            numeric_class(path, "int4", rules=Rules(((pattern, parse_format(form)),)))
    assert json.loads(write_rules(Rules()))["exceptions"] == {}
