"""Pure: what logged outcomes say of the experts, as examples for training a gate, and how often a gate is right.

    vote     1 for an answer that is the kept one (as the vote counts them), 0 for another; of a single answer nothing
    rerank   the geometric mean of the probabilities of the answer's tokens, as its own expert gives them; of an expert
             that gives none nothing. The gate's weight, by which answers were ranked too, is left out: a gate
             that learns from its own weights drifts
    best     nothing: one expert alone has answered

Of several answers of one expert it is the mean.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from ganglion.gateway.experts.gate_training import Example
from ganglion.gateway.experts.outcomes import Answer, Outcome
from ganglion.gateway.experts.scoring import normalized

HELD_OUT: Final = 5  # one prompt of so many
_EQUAL: Final = 1e-9

Weigh = Callable[[str, Sequence[str]], Mapping[str, float]]
"""A prompt and experts to their weights."""


def example_of(outcome: Outcome) -> Example | None:
    """What one outcome says; None where it says nothing."""
    kept = normalized(outcome.answers[outcome.chosen].text)
    found: dict[str, list[float]] = {}
    for answer in outcome.answers:
        quality = _quality(answer, outcome, kept)
        if quality is not None:
            found.setdefault(answer.expert, []).append(quality)
    if not found:
        return None
    return Example(outcome.prompt, {name: math.fsum(each) / len(each) for name, each in found.items()})


def _quality(answer: Answer, outcome: Outcome, kept: str) -> float | None:
    if outcome.combine == "vote" and len(outcome.answers) > 1:
        return 1.0 if normalized(answer.text) == kept else 0.0
    if outcome.combine == "rerank" and answer.mean_logprob is not None and math.isfinite(answer.mean_logprob):
        return min(1.0, math.exp(answer.mean_logprob))
    return None


def split(examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """For training, and held out: by the prompt, so that a prompt that comes twice is on one side."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[hashlib.sha256(example.text.encode("utf-8", "replace")).digest()[0] % HELD_OUT == 0].append(example)
    return parts


def agreement(examples: Iterable[Example], weigh: Weigh) -> tuple[float, int]:
    """How often the heaviest of the experts that were asked was one of the best, and of how many examples.

    Those count in which experts differ; of equal weights each counts its part.
    """
    right = []
    for example in examples:
        quality = example.quality
        best = max(quality.values())
        if best - min(quality.values()) < _EQUAL:
            continue
        weights = weigh(example.text, list(quality))
        top = max(weights.values())
        heaviest = [name for name in quality if weights[name] >= top - _EQUAL]
        right.append(sum(quality[name] >= best - _EQUAL for name in heaviest) / len(heaviest))
    return (math.fsum(right) / len(right) if right else 0.0), len(right)
