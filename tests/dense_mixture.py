"""The dumb draw from a mixture of distributions: by the definitions, over the whole vocabulary, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjustments
from ganglion.wire.sampling.noise import noise
from ganglion.wire.sampling.parameters import Sampling


def exact_sum(logits: np.ndarray) -> float:
    """log(sum(exp(logits)))."""
    peak = float(logits.max())
    return peak + math.log(math.fsum(math.exp(float(value) - peak) for value in logits.tolist()))


def draw_dense(
    rows: Sequence[np.ndarray],
    weights: Sequence[float],
    sampling: Sampling,
    adjustments: Adjustments = NO_ADJUSTMENTS,
    *,
    position: int,
) -> tuple[int, float]:
    """The token that is drawn from rows of raw logits [vocab], and its log-probability in the mixture."""
    vocab = max(row.size for row in rows)
    probability, shift = np.zeros(vocab), 0.0
    for row, weight in zip(rows, weights, strict=True):
        total = exact_sum(row)
        probability[: row.size] += weight * np.exp(row.astype(np.float64) - total)
        shift += weight * total
    with np.errstate(divide="ignore"):
        logprobs = np.log(probability)
    logits = logprobs + shift
    for at, token in enumerate(adjustments.ids.tolist()):
        value = logits[token] + float(adjustments.bias[at])
        if adjustments.repeated[at]:
            penalty = float(np.float32(sampling.repetition_penalty))
            value = value * penalty if value < 0 else value / penalty
        logits[token] = value - float(adjustments.subtract[at])
    if sampling.temperature == 0.0:
        token = int(logits.argmax())
        return token, float(logprobs[token])
    scaled = logits / sampling.temperature
    order = sorted(range(vocab), key=lambda i: (-scaled[i], i))
    if sampling.top_k:
        level = scaled[order[min(sampling.top_k, vocab) - 1]]
        order = [i for i in order if scaled[i] >= level]
    if sampling.top_p < 1.0:
        mass = np.exp(scaled[order] - scaled[order[0]])
        above = np.concatenate(([0.0], np.cumsum(mass)[:-1])) / mass.sum()
        order = [i for i, before in zip(order, above, strict=True) if before < sampling.top_p]
    if sampling.min_p:
        order = [i for i in order if math.exp(scaled[i] - scaled[order[0]]) >= sampling.min_p]
    kept = np.array(sorted(order))
    scores = scaled[kept] + noise(sampling.seed, position, kept.astype(np.uint32))
    token = int(kept[scores.argmax()])
    return token, float(logprobs[token])
