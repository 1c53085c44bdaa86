"""The one sampler: a token from the answers of the shares of the output matrix, the same for any split (D7).

Filters in transformers' order: temperature, top-k, top-p, min-p, over the adjusted logits of the tokens that may be
drawn. A threshold is fixed exactly from the candidates; when they do not reach far enough, `More` says how many are
needed next. Log-probabilities are of the raw distribution, before any adjustment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.lead.candidates import Answer
from ganglion.wire.sampling.filters import log_sum_exp, passing
from ganglion.wire.sampling.noise import noise
from ganglion.wire.sampling.parameters import Sampling


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token id and its log-probability in the raw distribution."""

    token: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token; its log-probability and the likeliest tokens when the session asked for them."""

    token: int
    logprob: float | None
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class More:
    """The candidates do not decide: ask every share for `candidates` of them."""

    candidates: int


def draw_token(answers: Sequence[Answer], sampling: Sampling, position: int) -> Drawn | More:
    """Draw the token at `position` from one answer per share, in order of token ids; some token may be drawn."""
    best = max(answers, key=lambda one: (one.best_score, -one.best_id))
    token, logit = best.best_id, best.best_logit
    if sampling.filtered:
        merged = _Merged.of(answers)
        kept = _filter(merged, answers, sampling)
        if isinstance(kept, More):
            return kept
        scores = merged.logits[:kept].astype(np.float64) / sampling.temperature
        scores += noise(sampling.seed, position, merged.ids[:kept])
        tied = np.flatnonzero(scores == scores.max())
        chosen = int(tied[merged.ids[tied].argmin()])
        token, logit = int(merged.ids[chosen]), float(merged.raw_logits[chosen])
    if sampling.top_logprobs < 0:
        return Drawn(token, None, ())
    total = log_sum_exp(np.concatenate([one.log_sum_exp for one in answers]))
    ids = np.concatenate([one.top_ids for one in answers])
    logits = np.concatenate([one.top_logits for one in answers])
    order = np.lexsort((ids, -logits))[: sampling.top_logprobs]
    likeliest = zip(ids[order].tolist(), logits[order].tolist(), strict=True)
    return Drawn(token, logit - total, tuple(TokenLogprob(one, value - total) for one, value in likeliest))


def rank_tokens(
    answers: Sequence[Answer], sampling: Sampling, position: int, most: int
) -> list[tuple[int, float]] | More:
    """At most `most` tokens and their perturbed scores, best first; the first is the one that `draw_token` draws.

    The others are the best of the answers' candidates that pass the filters; ties go to the lower id.
    """
    best = max(answers, key=lambda one: (one.best_score, -one.best_id))
    first = (best.best_id, best.best_score)
    if most == 1 and not sampling.filtered:
        return [first]
    merged = _Merged.of(answers)
    kept = _filter(merged, answers, sampling) if sampling.filtered else merged.ids.size
    if isinstance(kept, More):
        return kept
    ids, scores = merged.ids[:kept], merged.logits[:kept].astype(np.float64)
    if sampling.temperature > 0.0:
        scores /= sampling.temperature
        scores += noise(sampling.seed, position, ids)
    order = np.lexsort((ids, -scores))[:most]
    ranked = list(zip(ids[order].tolist(), scores[order].tolist(), strict=True))
    if sampling.filtered:
        return ranked
    return [first, *(one for one in ranked if one[0] != first[0])][:most]


@dataclass(frozen=True, slots=True)
class _Merged:
    """Candidates of all shares by falling adjusted logit, ties by rising id, as far as none can be missing in between.

    Invariant: every token that may be drawn and ranks before the last one of `ids` is in `ids`.
    """

    ids: NDArray[np.uint32]
    logits: NDArray[np.float32]
    raw_logits: NDArray[np.float32]
    complete: bool
    asked: int

    @staticmethod
    def of(answers: Sequence[Answer]) -> _Merged:
        ids = np.concatenate([one.ids for one in answers])
        logits = np.concatenate([one.logits for one in answers])
        raw = np.concatenate([one.raw_logits for one in answers])
        order = np.lexsort((ids, -logits))
        ids, logits, raw = ids[order], logits[order], raw[order]
        cut = [one for one in answers if not one.complete]
        if not cut:
            return _Merged(ids, logits, raw, True, ids.size)
        edge = max(cut, key=lambda one: (float(one.logits[-1]), -int(one.ids[-1])))
        known = int(np.flatnonzero(ids == edge.ids[-1])[0]) + 1
        return _Merged(ids[:known], logits[:known], raw[:known], False, max(one.ids.size for one in cut))


def _filter(merged: _Merged, answers: Sequence[Answer], sampling: Sampling) -> int | More:
    """How many of the merged candidates pass the filters: they are always the first ones by rank."""
    log_mass = math.nan
    if sampling.mass:
        log_mass = log_sum_exp(np.concatenate([one.scaled_log_sum_exp for one in answers]))
    kept = passing(merged.logits, sampling, complete=merged.complete, log_mass=log_mass)
    return More(max(merged.asked * 4, sampling.top_k + 1)) if kept is None else kept
