"""A class that mixes formats: prompt tokens as in int8, generated ones as in int4, over one key-value state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from reference_runner import Runner, cut_evenly

from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.classes import CHOICES, lay_out
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.format_choice import figures_of
from ganglion.partitioner.quantize import Rules, parse_format
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import InvalidDocument, InvalidRequest, Unsupported
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, NumericClass, from_json, to_json

PROMPT = 23
WAYS = [((1,), [23, 17]), ((3, 1), [1] * 40), ((1, 5), [22, 1, 2, 15])]


@pytest.mark.parametrize("shape", ["llama-kv1-tied", "qwen3-kv2"])
def test_each_role_has_the_numbers_of_its_format_in_any_split_and_chunking(
    shape: str, models: Any, text: Any, tmp_path: Path
) -> None:
    mixed, int4, int8 = (models.cut(shape, one) for one in ("mixed", "int4", "int8"))
    ids = text(mixed.manifest, 40)

    def run(cut: Any, weights: Any = (1,), chunks: Any = None, prompt: int = PROMPT) -> Any:
        folder = tmp_path / f"{cut.manifest.numeric_class.name}-{weights}"
        return Runner(cut.manifest, cut.pieces, folder, cut_evenly(cut.manifest, weights)).forward(
            ids, chunks, prompt=prompt
        )

    logits, hidden = run(mixed, *WAYS[0])
    for weights, chunks in WAYS[1:]:
        found = run(mixed, weights, chunks)
        assert np.array_equal(found[1], hidden)
        assert np.array_equal(found[0], logits)
    as_int4, as_int8 = run(int4)[1], run(int8)[1]
    assert np.array_equal(run(mixed, prompt=0)[1], as_int4)
    if mixed.manifest.geometry == int8.manifest.geometry:  # else its groups, which are rounded apart, are others
        assert np.array_equal(hidden[:PROMPT], as_int8[:PROMPT])
    assert not np.array_equal(hidden[PROMPT:], as_int4[PROMPT:])  # over the prompt's keys and values


def test_what_is_common_is_stored_and_opened_once(models: Any) -> None:
    manifest = models.cut("qwen3-kv2", "mixed").manifest
    models.cut("qwen3-kv2", "mixed").check_graphs()
    for layer, prompt in zip(manifest.layers, manifest.prompt_layers, strict=True):
        for one, other in zip(layer.segments, prompt.segments, strict=True):
            assert one.kind != other.kind
            slots, others = ({slot.name: slot.pieces for slot in each.slots} for each in (one, other))
            assert slots["norm"] == others["norm"]
            if one.attends:
                graphs, more = (manifest.graphs[f"{each.kind}/2"] for each in (one, other))
                assert graphs[1] == more[1]
                assert graphs[0] != more[0]
    assert manifest.head.kind == "head"


def test_names_and_what_there_is_not(models: Any) -> None:
    path = models.checkpoint("llama-kv2")
    assert numeric_class(path, "mixed").name == "int8:int4-32-exact"
    assert numeric_class(path, "mixed", fast=True).name == "int8:int4-32-fast"
    assert numeric_class(path, "mixed").choice == "mixed"
    assert "mixed" in CHOICES
    checkpoint = open_checkpoint(path)
    with pytest.raises(InvalidRequest, match="generated tokens run in int4"):
        lay_out(checkpoint, NumericClass(format="fp32", block=0, exact=True, prompt="int8"))


def test_rules_hold_for_both_roles_and_mark_the_class(models: Any) -> None:
    checkpoint = open_checkpoint(models.checkpoint("llama-kv2"))
    kind = numeric_class(checkpoint.path, "mixed")
    marks = set()
    for form in ("fp32", "int4-32", "int8"):
        layout = lay_out(checkpoint, kind, Rules((("*.1.mlp.down_proj.weight", parse_format(form)),)))
        down, prompt_down = (plans[1][1].summed for plans in (layout.layers, layout.prompt_layers))
        assert layout.recipe.of(down) == layout.prompt_recipe.of(prompt_down) == parse_format(form)
        assert layout.prompt_recipe.of(layout.prompt_layers[0][1].summed) == parse_format("int8")
        marks.add(layout.recipe.numeric_class.name)
    assert len(marks) == 3  # int4-32 is no exception to generated tokens, but it is to a prompt's
    assert kind.name not in marks


def test_any_number_of_threads_gives_the_same_manifest(models: Any, tmp_path: Path) -> None:
    path = models.checkpoint("llama-kv2")
    kind = numeric_class(path, "mixed")
    found = {
        to_json(partition(path, DirectorySink(tmp_path / str(n)), name="m", numeric_class=kind, threads=n))
        for n in (1, 3)
    }
    assert len(found) == 1


def test_a_manifest_whose_two_sets_do_not_match_is_refused(models: Any) -> None:
    manifest: Manifest = models.cut("llama-kv2", "mixed").manifest
    assert from_json(Manifest, to_json(manifest), limit_bytes=MANIFEST_BYTES) == manifest
    plain = models.cut("llama-kv2", "int4").manifest
    head, *rest = manifest.prompt_layers
    first, second = head.segments
    wider = msgspec.structs.replace(head, segments=(msgspec.structs.replace(first, attends=False), second))
    for change in (
        {"prompt_layers": ()},
        {"prompt_layers": manifest.prompt_layers[1:]},
        {"prompt_layers": (wider, *rest)},
        {"numeric_class": plain.numeric_class},
    ):
        document = msgspec.to_builtins(manifest) | {key: msgspec.to_builtins(one) for key, one in change.items()}
        with pytest.raises(InvalidDocument, match="prompt layers"):
            from_json(Manifest, msgspec.json.encode(document), limit_bytes=MANIFEST_BYTES)


def test_a_mixture_of_experts_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from mixture_shapes import SHAPES, make_mixture

    path = make_mixture(tmp_path, shape=SHAPES["olmoe"])
    with pytest.raises(Unsupported, match="mixture of experts"):
        numeric_class(path, "mixed")
    figures = figures_of(path, fast=False, small_bytes=0)
    assert set(figures.classes) == {"int4", "int8"}
    assert figures.active_numbers < figures.layer_numbers
