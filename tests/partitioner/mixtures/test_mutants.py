"""What makes a mixture what it is, left out or done otherwise: the comparison with transformers sees each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_runner import Runner, cut_evenly

from ganglion.partitioner import classes
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.experts import Mixture, Separate
from ganglion.partitioner.families.latent import Latent
from ganglion.partitioner.families.plans import Attention, SegmentPlan
from ganglion.partitioner.sink import DirectorySink

RELATIVE = 1e-4

Change = Callable[[SegmentPlan], SegmentPlan]


def experts(**facts: Any) -> Change:
    """Other facts of the experts."""
    return lambda plan: replace(plan, core=replace(plan.core, **facts)) if isinstance(plan.core, Mixture) else plan


def routing(**facts: Any) -> Change:
    """Another routing."""

    def change(plan: SegmentPlan) -> SegmentPlan:
        if not isinstance(plan.core, Mixture):
            return plan
        return replace(plan, core=replace(plan.core, routing=replace(plan.core.routing, **facts)))

    return change


def attends(**facts: Any) -> Change:
    """Another attention, or another one inside a latent one."""

    def change(plan: SegmentPlan) -> SegmentPlan:
        if isinstance(plan.core, Latent):
            return replace(plan, core=replace(plan.core, inner=replace(plan.core.inner, **facts)))
        return replace(plan, core=replace(plan.core, **facts)) if isinstance(plan.core, Attention) else plan

    return change


def gate_for_up(plan: SegmentPlan) -> SegmentPlan:
    if not isinstance(plan.core, Mixture) or not isinstance(plan.core.stored, Separate):
        return plan
    stored = plan.core.stored
    return replace(plan, core=replace(plan.core, stored=replace(stored, gate=stored.up, up=stored.gate)))


def no_sinks(plan: SegmentPlan) -> SegmentPlan:
    if not isinstance(plan.core, Attention):
        return plan
    return replace(plan, grouped=(), core=replace(plan.core, sinks=False))


def norms_swapped(plan: SegmentPlan) -> SegmentPlan:
    tensors = [one.tensor for one in reversed(plan.grouped)]
    grouped = (replace(one, tensor=tensor) for one, tensor in zip(plan.grouped, tensors, strict=True))
    return replace(plan, grouped=tuple(grouped))


def another_epsilon(plan: SegmentPlan) -> SegmentPlan:
    return replace(plan, core=replace(plan.core, epsilon=0.1)) if isinstance(plan.core, Latent) else plan


MUTANTS: dict[str, tuple[str, Change]] = {
    "mixtral: weights do not add up to one": ("mixtral", routing(softmax="all")),
    "mixtral: gate for up": ("mixtral", gate_for_up),
    "mixtral: no window": ("mixtral-window", attends(window=0)),
    "olmoe: weights add up to one": ("olmoe", routing(softmax="chosen")),
    "olmoe: the queries' norm for keys": ("olmoe", norms_swapped),
    "olmoe: weights do not add up to one": ("olmoe-normalized", routing(softmax="all")),
    "qwen3-moe: weights do not add up to one": ("qwen3-moe", routing(softmax="all")),
    "qwen3-moe: an expert fewer": ("qwen3-moe", routing(chosen=2)),
    "gpt-oss: no sinks": ("gpt-oss", no_sinks),
    "gpt-oss: no biases of experts": ("gpt-oss", experts(bias=False)),
    "gpt-oss: no bias of the router": ("gpt-oss", experts(router_bias=False)),
    "gpt-oss: softmax over all": ("gpt-oss", routing(softmax="all")),
    "gpt-oss: up without one more": ("gpt-oss", experts(beta=0.0)),
    "gpt-oss: plain silu": ("gpt-oss", experts(alpha=1.0)),
    "gpt-oss: nothing clamped": ("gpt-oss-unbiased-tied", experts(limit=None)),
    "deepseek: no shared experts": ("deepseek-lite", experts(shared=0, stored_shared=None)),
    "deepseek: weights add up to one": ("deepseek-lite", routing(softmax="chosen")),
    "deepseek: plain scale": ("deepseek-lite", attends(scale=None)),
    "deepseek: halves for pairs": ("deepseek-lite", attends(interleaved=False)),
    "deepseek: another epsilon": ("deepseek-lite", another_epsilon),
    "deepseek: experts of any group": ("deepseek-groups", routing(chosen_groups=0)),
    "deepseek: weights not scaled": ("deepseek-groups", routing(scale=1.0)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, mixtures, monkeypatch, tmp_path):
    name, change = MUTANTS[mutant]
    path = mixtures.checkpoint(name)

    def mutated(config):
        family = family_of(config)

        def layer(model, split, number):
            return tuple(map(change, family.layer(model, split, number)))

        return replace(family, layer=layer)

    monkeypatch.setattr(classes, "family_of", mutated)
    sink = DirectorySink(tmp_path / "pieces")
    manifest = partition(path, sink, name=name, numeric_class=numeric_class(path, "fp32"))
    runner = Runner(manifest, sink, tmp_path / "run", cut_evenly(manifest, (1,)))
    logits, expected = runner.forward(mixtures.ids(name))[0], mixtures.expected(name)
    assert np.abs(logits - expected).max() > 100 * RELATIVE * np.abs(expected).max()
