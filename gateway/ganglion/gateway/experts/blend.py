"""The next token of a mixture of experts of which each told its likeliest tokens, or what else must be asked. Pure.

A threshold algorithm (Fagin, Lotem and Naor, 2003): a token's logit in the mixture is at most what the experts' last
listed logits give where they did not list it, and keyed noise is known for every token. So the best score found among
tokens that are known from every expert stands once no other token's bound reaches it; only those whose bound does are
asked for. With filters a token also has to be certain to pass; where the lists do not reach the filters' threshold and
a token beyond it scores best, the whole vocabulary is asked for.

Near ties are decided in float64 (of one expert alone, its float32 logits decide as at its own lead); those nearer
than NEAR_NATS are counted, because another order of additions may decide them otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.gateway.experts.mixture import Bounded, Logits, Mixture, Row
from ganglion.wire.limits import ASKED_IDS
from ganglion.wire.sampling.adjusting import Adjustments
from ganglion.wire.sampling.filters import log_sum_exp, passing
from ganglion.wire.sampling.noise import NOISE_MAX, hash_at_least, hashes, noise
from ganglion.wire.sampling.parameters import Sampling

NEAR_NATS: Final = 1e-9
_SLACK: Final = 1e-9  # nats: bounds are computed with rounding, and give way by so much
_MASS_SLACK: Final = 1e-12  # the same, of probabilities


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token, its log-probability in the mixture, and the likeliest tokens when they were asked for.

    near: another token's score is within NEAR_NATS.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    near: bool


@dataclass(frozen=True, slots=True)
class Asking:
    """Of every expert in turn, the ids whose logits decide: none where they are empty, None: the whole vocabulary."""

    ids: tuple[NDArray[np.int64] | None, ...]


def next_token(mixture: Mixture, sampling: Sampling, adjustments: Adjustments, position: int) -> Chosen | Asking:
    """The token at `position`, or what else must be known; `adjustments`: of its logits, as of now.

    At most three questions follow one another, and nothing is left to ask after one for the whole vocabulary.
    """
    known = _Known(mixture, sampling, adjustments, position)
    if sampling.top_logprobs > 0 and known.listed(known.raw) < min(sampling.top_logprobs, mixture.vocab):
        return known.more()
    found = known.filtered() if sampling.filtered else known.best()
    if isinstance(found, Asking):
        return found
    place, near = found
    raw = known.raw.high
    top = known.ranked(known.raw)[: max(0, sampling.top_logprobs)]
    total = mixture.log_sum_exp
    likeliest = zip(known.ids[top].tolist(), raw[top].tolist(), strict=True)
    return Chosen(
        int(known.ids[place]),
        float(raw[place]) - total,
        tuple((token, value - total) for token, value in likeliest),
        near,
    )


class _Known:
    """The tokens of which anything is known, at one position: ids [n] rising, raw and adjusted logits."""

    def __init__(self, mixture: Mixture, sampling: Sampling, adjustments: Adjustments, position: int) -> None:
        self._mixture, self._sampling, self._position = mixture, sampling, position
        adjusted = adjustments.ids.astype(np.int64)
        told = adjusted < mixture.vocab
        self.ids = np.union1d(mixture.known(), adjusted[told])
        self._where = np.searchsorted(self.ids, adjusted[told])
        self._adjustments = adjustments.chosen(told)
        self.raw = mixture.logits(self.ids)
        self.adjusted = Bounded(self._adjust(self.raw.low), self._adjust(self.raw.high), self.raw.exact)
        self.rest = mixture.rest() if self.ids.size < mixture.vocab else -math.inf

    def _adjust(self, logits: Logits) -> Logits:
        if not self._where.size:
            return logits
        adjusted = logits.copy()
        adjusted[self._where] = self._adjustments.applied(logits[self._where], self._sampling.repetition_penalty)
        return adjusted

    # Rankings.

    def _ceiling(self, logits: Bounded) -> float:
        """No token that is not exactly known has a greater logit; -inf: all are."""
        return max(self.rest, float(logits.high[~logits.exact].max(initial=-math.inf)))

    def ranked(self, logits: Bounded) -> NDArray[np.intp]:
        """Places of exact tokens by falling logit, ties by rising id, as far as none can be missing in between."""
        places = np.flatnonzero(logits.exact)
        ceiling = self._ceiling(logits)
        if ceiling > -math.inf:
            places = places[logits.high[places] > ceiling + _SLACK]
        return places[np.argsort(-logits.high[places], kind="stable")]

    def listed(self, logits: Bounded) -> int:
        """How many tokens that ranking has."""
        return self.ranked(logits).size

    # Questions.

    def more(self) -> Asking:
        """Everything about the tokens of which anything is known; where that is known already, the whole vocabulary."""
        part = self.ids[~self.raw.exact]
        return self._ask(part) if part.size else self._whole()

    def _whole(self) -> Asking:
        empty = self.ids[:0]
        return Asking(tuple(empty if row.complete else None for row in self._mixture.rows))

    def _ask(self, ids: NDArray[np.int64]) -> Asking:
        asked = ((row, row.lacks(ids)) for row in self._mixture.rows)
        return Asking(tuple(lacking if _few(lacking, row) else None for row, lacking in asked))

    # Draws.

    def _scores(self, logits: Logits, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        if self._sampling.temperature == 0.0:
            return logits.astype(np.float64)
        scores = logits.astype(np.float64) / self._sampling.temperature
        return scores + noise(self._sampling.seed, self._position, ids.astype(np.uint32))

    def _rivals(self, score: float) -> NDArray[np.int64] | None:
        """Ids of tokens that are not exactly known and may reach `score`; None: any of those of which nothing is."""
        part = ~self.adjusted.exact
        scores = self._scores(self.adjusted.high[part], self.ids[part])
        rivals = self.ids[part][scores >= score - _SLACK]
        if self.rest == -math.inf:
            return rivals
        if self._sampling.temperature == 0.0:
            return None if self.rest >= score - _SLACK else rivals
        bound = score - self.rest / self._sampling.temperature
        bound -= _SLACK * (1.0 + abs(bound))
        if bound > NOISE_MAX:
            return rivals
        codes = hashes(self._sampling.seed, self._position, np.arange(self._mixture.vocab, dtype=np.uint32))
        far = np.setdiff1d(np.flatnonzero(codes >= np.uint32(hash_at_least(bound))), self.ids, assume_unique=True)
        return np.union1d(rivals, far)

    def best(self) -> tuple[int, bool] | Asking:
        """The place of the best token where nothing is filtered, and whether another is near."""
        places = np.flatnonzero(self.adjusted.exact)
        if not places.size:
            return self.more()
        scores = self._scores(self.adjusted.high[places], self.ids[places])
        winner = int(scores.argmax())  # ties go to the lowest id
        rivals = self._rivals(float(scores[winner]))
        if rivals is None:
            return self._whole()
        if rivals.size:
            return self._ask(rivals)
        return int(places[winner]), _near(scores)

    def filtered(self) -> tuple[int, bool] | Asking:
        """The same where filters say which may be drawn: the best that certainly may, if none that may scores more."""
        places = self.ranked(self.adjusted)
        if not places.size:
            return self.more()
        certain, possible = self._passing(places)
        scores = self._scores(self.adjusted.high[places], self.ids[places])
        best = float(scores[:certain].max())
        rivals: NDArray[np.int64] | None = self.ids[:0]
        if possible is not None:
            open_ = bool((scores[certain:possible] >= best).any())
        else:
            rivals = self._rivals(best)
            exact = np.setdiff1d(np.flatnonzero(self.adjusted.exact), places, assume_unique=True)
            others = self._scores(self.adjusted.high[exact], self.ids[exact])
            open_ = bool((scores[certain:] >= best).any() or (others >= best).any() or rivals is None or rivals.size)
        if open_:
            return self._settle(rivals)
        tied = np.flatnonzero(scores[:certain] == best)
        return int(places[tied[self.ids[places[tied]].argmin()]]), _near(scores[:possible])

    def _passing(self, places: NDArray[np.intp]) -> tuple[int, int | None]:
        """How many of a ranking certainly pass the filters, at least one; how many perhaps, None: all, and others."""
        logits, sampling = self.adjusted.high[places], self._sampling
        complete = self._ceiling(self.adjusted) == -math.inf
        low, high = self._log_mass() if sampling.mass else (0.0, 0.0)
        certain = passing(logits, sampling, complete=complete, log_mass=low)
        possible = certain if low == high else passing(logits, sampling, complete=complete, log_mass=high)
        if certain is None:
            # A ranking that is too short for a filter passes it as a whole; what the next ones do is not known.
            filters = (sampling.top_k > 0) + (sampling.top_p < 1.0) + (sampling.min_p > 0.0)
            certain = places.size if filters == 1 else 1
        return certain, possible

    def _settle(self, rivals: NDArray[np.int64] | None) -> Asking:
        """What to ask where it is open which tokens pass: of few tokens, if these may settle it."""
        part = self.ids[~self.raw.exact] if self._would_pass() else self.ids[:0]
        wanted = part if rivals is None else np.union1d(part, rivals)
        return self._ask(wanted) if wanted.size else self._whole()

    def _would_pass(self) -> bool:
        """Whether the filters' threshold may be reached by tokens of which anything is known."""
        logits = np.sort(self.adjusted.high[self.adjusted.high > self.rest + _SLACK])[::-1]
        low = self._log_mass()[0] if self._sampling.mass else 0.0
        return passing(logits, self._sampling, complete=self.rest == -math.inf, log_mass=low) is not None

    def _log_mass(self) -> tuple[float, float]:
        """Bounds of log(sum(exp(adjusted logit/temperature))) over the vocabulary."""
        temperature, total = self._sampling.temperature, self._mixture.log_sum_exp
        low = log_sum_exp(self._finite(self.adjusted.low / temperature))
        if self.rest == -math.inf and self.adjusted.exact.all():
            return low, low
        high = log_sum_exp(self._finite(self.adjusted.high / temperature))
        # What is left for tokens of which nothing is known, none of them adjusted: as probabilities q = p^(1/T),
        # each p at most `peak`, so that the sum of q is the sum of p times p^(1/T - 1), which `peak` bounds.
        left = np.array([1.0 - _MASS_SLACK, 1.0 + _MASS_SLACK])
        left -= np.exp(self.raw.high - total).sum(), np.exp(self._finite(self.raw.low) - total).sum()
        power, peak = 1.0 / temperature - 1.0, self.rest - total
        least, most = (_log(value) + power * peak + total / temperature for value in left.tolist())
        if power > 0.0:
            least = -math.inf
        elif power < 0.0:  # p^(1/T - 1) is the least at `peak`: the most is that of equal tokens
            count = self._mixture.vocab - self.ids.size
            most = (_log(left[1]) + total) / temperature - power * math.log(max(1, count))
        return float(np.logaddexp(low, least)), float(np.logaddexp(high, most))

    @staticmethod
    def _finite(terms: Logits) -> NDArray[np.float64]:
        return terms[~np.isneginf(terms)].astype(np.float64)


def _log(value: float) -> float:
    return math.log(value) if value > 0.0 else -math.inf


def _few(ids: NDArray[np.int64], row: Row) -> bool:
    """Whether ids are asked for by name: half of them cost more than all in order."""
    return 2 * ids.size < row.vocab and ids.size <= ASKED_IDS


def _near(scores: NDArray[np.float64]) -> bool:
    return scores.size > 1 and bool(np.partition(scores, -2)[-1] - np.partition(scores, -2)[-2] < NEAR_NATS)
