"""A family that left out one thing of its own would be caught by the comparison with transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from family_shapes import SHAPES
from reference_runner import Runner, cut_evenly

from ganglion.partitioner import classes
from ganglion.partitioner.cut import partition
from ganglion.partitioner.families.model import Family
from ganglion.partitioner.families.plans import SegmentPlan

SEEN = 2e-3  # what the comparison allows is 1e-4
Mutate = Callable[[Family], Family]


def facts(**changes: Any) -> Mutate:
    """The family with other facts of the model; a function is given the right ones."""

    def read(family: Family) -> Callable[[Any], Any]:
        def changed(config: Any) -> Any:
            model = family.read(config)
            found = {name: one(getattr(model, name)) if callable(one) else one for name, one in changes.items()}
            return replace(model, **found)

        return changed

    return lambda family: replace(family, read=read(family))


def segments(change: Callable[[SegmentPlan], SegmentPlan]) -> Mutate:
    """The family with other segments."""

    def mutate(family: Family) -> Family:
        return replace(
            family,
            layer=lambda *given: tuple(change(plan) for plan in family.layer(*given)),
            head=lambda *given: change(family.head(*given)),
        )

    return mutate


def entry(**changes: Any) -> Mutate:
    return segments(lambda plan: replace(plan, entry=replace(plan.entry, **changes)))


def core(**changes: Any) -> Mutate:
    def change(plan: SegmentPlan) -> SegmentPlan:
        known = {name: one for name, one in changes.items() if hasattr(plan.core, name)}
        return replace(plan, core=replace(plan.core, **known))

    return segments(change)


def unshared_sums(plan: SegmentPlan) -> SegmentPlan:
    return replace(plan, exchange=plan.kind != "projection")


def one_after_the_other(plan: SegmentPlan) -> SegmentPlan:
    mode = "add" if plan.entry.mode == "keep" else plan.entry.mode
    return replace(plan, exchange=True, entry=replace(plan.entry, mode=mode))


def swapped(plan: SegmentPlan) -> SegmentPlan:
    """Gate and up, or queries and keys, begin at each other's rows."""
    if len(plan.joined) != 2:
        return plan
    first, second = plan.joined
    return replace(plan, joined=(replace(first, first=second.first), replace(second, first=first.first)))


def everywhere(value: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda of_layers: (value,) * len(of_layers)


def shorter(windows: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(window and window - 1 for window in windows)


MUTANTS: dict[str, tuple[str, Mutate]] = {
    "mistral: no window": ("mistral-window", facts(windows=everywhere(0))),
    "mistral: a window one token shorter": ("mistral-window", facts(windows=shorter)),
    "qwen2: no biases": ("qwen2-kv2", facts(query_bias=False)),
    "qwen2: windows in the other layers": ("qwen2-kv1-tied", facts(windows=lambda found: found[1:] + found[:1])),
    "qwen3: no head norms": ("qwen3-kv1", core(head_norm="none")),
    "gemma2: no soft cap of scores": ("gemma2-kv2-tied", facts(attention_softcap=0.0)),
    "gemma2: no soft cap of logits": ("gemma2-kv2-tied", facts(logit_softcap=0.0)),
    "gemma2: embedding not scaled": ("gemma2-kv2-tied", facts(embedding_scale=1.0)),
    "gemma2: norms without one more": ("gemma2-kv2-tied", facts(norm_add=0.0)),
    "gemma2: scores scaled by the head dimension": ("gemma2-kv2-tied", facts(attention_scale=None)),
    "gemma2: no norms after the halves": ("gemma2-kv2-tied", entry(post=None)),
    "gemma2: no gelu": ("gemma2-kv2-tied", facts(activation="silu")),
    "gemma2: windows in the other layers": ("gemma2-kv2-tied", facts(windows=lambda found: (*found[1:], 0))),
    "gemma3: one rope": ("gemma3-kv2-tied", facts(layer_ropes=everywhere("default"))),
    "gemma3: no head norms": ("gemma3-kv2-tied", core(head_norm="none")),
    "phi3: gate and up the other way round": ("phi3-kv2", segments(swapped)),
    "phi3: no window": ("phi3-kv2", facts(windows=everywhere(0))),
    "phi3: short factors beyond their context": (
        "phi3-kv1-long",
        facts(
            ropes=lambda found: ((found[0][0], tuple(replace(one, rope=found[0][1][0].rope) for one in found[0][1])),)
        ),
    ),
    "olmo2: no norms after the halves": ("olmo2-kv2", entry(post=None)),
    "olmo2: sums of squares of one device": ("olmo2-kv2", segments(unshared_sums)),
    "olmo3: no windows": ("olmo3-kv2", facts(windows=everywhere(0))),
    "olmo3: one rope": ("olmo3-kv2", facts(layer_ropes=everywhere("default"))),
    "granite: residual multiplier": ("granite-kv2", facts(residual_scale=1.0)),
    "granite: embedding multiplier": ("granite-kv2", facts(embedding_scale=1.0)),
    "granite: attention multiplier": ("granite-kv2", facts(attention_scale=None)),
    "granite: divisor of logits": ("granite-kv2", facts(logit_scale=1.0)),
    "smollm3: rope in every layer": ("smollm3-kv2-tied", facts(layer_ropes=everywhere("default"))),
    "cohere: rope in halves": ("cohere-kv2-tied", facts(rope_interleaved=False)),
    "cohere: norms without a mean": ("cohere-kv2-tied", facts(norm_kind="rms")),
    "cohere: one half after the other": ("cohere-kv2-tied", segments(one_after_the_other)),
    "cohere: logits not scaled": ("cohere-kv2-tied", facts(logit_scale=1.0)),
    "cohere: no head norms": ("cohere-kv3-biases", core(head_norm="none")),
    "cohere2: rope in every layer": ("cohere2-kv2-tied", facts(layer_ropes=everywhere("default"))),
    "cohere2: no windows": ("cohere2-kv2-tied", facts(windows=everywhere(0))),
}


def test_every_family_has_a_mutant():
    tested = {SHAPES[shape].family for shape, _ in MUTANTS.values()}
    assert {shape.family for shape in SHAPES.values()} - tested == {"Llama"}  # its mutants are in test_transformers


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_family_without_its_difference_is_caught(mutant, families, tmp_path, monkeypatch):
    name, mutate = MUTANTS[mutant]
    cut, ids = families.cut(name), families.ids(name)
    family_of = classes.family_of
    monkeypatch.setattr(classes, "family_of", lambda config: mutate(family_of(config)))
    manifest = partition(cut.path, cut.pieces, name="m", numeric_class=cut.manifest.numeric_class)
    logits, _ = Runner(manifest, cut.pieces, tmp_path, cut_evenly(manifest, (1, 1))).forward(ids)
    expected = families.expected(name)
    assert np.abs(logits - expected).max() > SEEN * np.abs(expected).max()
