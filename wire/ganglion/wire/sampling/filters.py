"""Which of a ranking's tokens may be drawn: the filters, in transformers' order (temperature, top-k, top-p, min-p)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ganglion.wire.sampling.parameters import Sampling


def log_sum_exp(terms: NDArray[np.float64]) -> float:
    """log(sum(exp(terms))), added in order: [n] float64 -> float."""
    peak = float(terms.max())
    total = 0.0
    for term in terms.tolist():
        total += math.exp(term - peak)
    return peak + math.log(total)


def passing(
    logits: NDArray[np.float32] | NDArray[np.float64], sampling: Sampling, *, complete: bool, log_mass: float
) -> int | None:
    """How many of a ranking's tokens pass the filters: they are always its first ones; None: it is too short to say.

    logits: [n] by falling adjusted logit, with none missing in between; complete: none is missing after the last one.
    log_mass: log(sum(exp(logit/temperature))) of all that may be drawn; used by a top-p without top-k only. The
    temperature is above 0.
    """
    kept, known = logits.size, complete
    if sampling.top_k > 0 and not (complete and sampling.top_k >= kept):
        if sampling.top_k > kept:
            return None
        # Ties with the k-th are kept, as in transformers; the last of them is known once a smaller logit is seen.
        passed = int((logits >= logits[sampling.top_k - 1]).sum())
        if passed == kept and not complete:
            return None
        kept, known = passed, True
    scaled = logits[:kept].astype(np.float64) / sampling.temperature
    if sampling.top_p < 1.0:
        total = log_sum_exp(scaled) if sampling.top_k > 0 else log_mass
        mass = np.cumsum(np.exp(scaled - total))
        reached = int(np.searchsorted(mass, sampling.top_p))  # the first token at which the mass is enough
        if reached < kept:
            kept, known = reached + 1, True
        elif not known:
            return None
    if sampling.min_p > 0.0:
        floor = scaled[0] + math.log(sampling.min_p)
        passed = max(1, int((scaled[:kept] >= floor).sum()))
        if passed == kept and not known:
            return None
        kept, known = passed, True
    return kept if known else None
