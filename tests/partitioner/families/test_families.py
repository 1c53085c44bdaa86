"""Every family against transformers in fp32, and bit for bit against itself over splits and chunkings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from family_shapes import FIRST, SHAPES
from reference_runner import Cut, Runner, cut_evenly

from ganglion.wire.nouns import Range

RELATIVE = 1e-4  # largest difference of a logit at any position, over the largest logit at any position


def logits_of(reference: torch.nn.Module, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def chunks(tokens: int, number: int) -> list[int] | None:
    """A few ways to chunk a text, one row alone and rows around what the window sees among them."""
    ways = [None, [17, 1, 1, 2, tokens - 21], [1] * 5 + [tokens - 38, 33]]
    return ways[number % len(ways)]


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_transformers_and_do_not_depend_on_the_split(name, families, tmp_path):
    cut, ids, expected = families.cut(name), families.ids(name), families.expected(name)
    first = None
    for number, weights in enumerate([(1,), (3, 1), (2, 5, 1)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        logits, hidden = runner.forward(ids, chunks(len(ids), number))
        if first is None:
            first = logits, hidden
            assert difference(logits, expected) < RELATIVE
            assert (logits.argmax(1) == expected.argmax(1)).all()
            assert len(set(expected.argmax(1))) > 10  # the comparison is about something
        assert np.array_equal(logits, first[0]), weights
        assert np.array_equal(hidden, first[1]), weights


@pytest.mark.parametrize("name", FIRST.values())
def test_greedy_text_is_transformers(name, families, tmp_path):
    """Not only teacher-forced: each token follows the ones before it, and transformers has its cache."""
    cut, ids = families.cut(name), families.ids(name)[:25]
    with torch.no_grad():
        found = families.reference(name).generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)
    runner = Runner(cut.manifest, cut.pieces, tmp_path, cut_evenly(cut.manifest, (1, 3)))
    assert runner.greedy(ids, 8) == found[0, len(ids) :].tolist()


@pytest.mark.parametrize(("weight_format", "alike"), [("int4", 0.7), ("int8", 0.99)])
@pytest.mark.parametrize("name", FIRST.values())
def test_quantized_exact_classes_do_not_depend_on_the_split(name, weight_format, alike, families, tmp_path):
    cut, ids, expected = families.cut(name, weight_format), families.ids(name), families.expected(name)
    found = []
    for number, weights in enumerate([(1,), (2, 5, 1)]):
        runner = Runner(cut.manifest, cut.pieces, tmp_path / str(number), cut_evenly(cut.manifest, weights))
        found.append(runner.forward(ids, chunks(len(ids), number)))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    assert np.corrcoef(found[0][0].ravel(), expected.ravel())[0, 1] > alike


@pytest.mark.parametrize("name", FIRST.values())
def test_fast_classes_are_transformers(name, families, tmp_path):
    cut, ids = families.cut(name, "fp32", True), families.ids(name)
    runner = Runner(cut.manifest, cut.pieces, tmp_path, cut_evenly(cut.manifest, (1, 2)))
    logits, _ = runner.forward(ids, chunks(len(ids), 1))
    assert difference(logits, families.expected(name)) < RELATIVE


@pytest.mark.parametrize("name", [name for name in SHAPES if "-kv1" in name])
def test_one_key_value_head_stays_on_one_device(name, families, tmp_path):
    """Attention is on as many devices as there are key-value heads; the others have columns and vocabulary alone."""
    cut, ids, expected = families.cut(name), families.ids(name), families.expected(name)
    g = cut.manifest.geometry
    nothing, heads = Range(0, 0), Range(0, 1)
    third = g.column_groups // 3
    shares = [
        Cut(nothing, Range(0, third), Range(0, 1)),
        Cut(heads, Range(third, 2 * third), nothing),
        Cut(nothing, Range(2 * third, g.column_groups), Range(1, g.vocab_groups)),
    ]
    logits, _ = Runner(cut.manifest, cut.pieces, tmp_path, shares).forward(ids, chunks(len(ids), 1))
    assert difference(logits, expected) < RELATIVE


def test_a_rope_of_two_variants_goes_by_the_deployments_context(families, tmp_path):
    """As transformers up to the original context; transformers changes over within a text that outgrows it."""
    name = "phi3-kv1-long"
    cut = families.cut(name)
    short, long = cut.manifest.ropes["default"]
    assert (short.context, long.context) == (32, 256)
    ids = families.ids(name)[:32]
    expected = logits_of(families.reference(name), ids)
    found = [
        Runner(cut.manifest, cut.pieces, tmp_path / str(context), cut_evenly(cut.manifest, (1, 1)), context=context)
        for context in (32, 33)
    ]
    assert difference(found[0].forward(ids)[0], expected) < RELATIVE
    assert difference(found[1].forward(ids)[0], expected) > 100 * RELATIVE


@pytest.mark.parametrize("name", [*FIRST.values(), "gemma3-kv1-wide", "cohere-kv3-biases"])
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_agents_accept_every_graph(name, fast, families):
    families.cut(name, "int4", fast).check_graphs()
