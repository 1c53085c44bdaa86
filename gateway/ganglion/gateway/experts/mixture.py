"""What is known of a mixture of distributions, each told in part: its logits, and bounds on those that were not told.

The mixture is the linear pool p(v) = sum of w_k p_k(v). Its logit is log p(v), shifted by the weighted mean of the
experts' log-sum-exps, so that it lies where their own logits do (a repetition penalty asks whether a logit is above 0).
Of one expert alone it is that expert's logit, float32 bit for bit; of several it is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation

Logits = NDArray[np.floating[Any]]

_SUM_SLACK = 1e-6  # of probabilities: a sum that is further from what it must be is nonsense


@dataclass(frozen=True, slots=True)
class Row:
    """What is known of one expert's distribution. ids [n] int64, rising; logits [n] float32, raw.

    edge: no id that is not known has a greater logit; -inf: all `vocab` are known.
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    log_sum_exp: float
    vocab: int
    edge: float

    @property
    def complete(self) -> bool:
        """Whether the whole distribution is known."""
        return self.ids.size == self.vocab

    def at(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits of ids [n], `edge` where they are not known, -inf beyond the vocabulary; and which are known."""
        place = np.minimum(np.searchsorted(self.ids, ids), self.ids.size - 1)
        known = self.ids[place] == ids
        beyond = ids >= self.vocab
        logits = np.where(known, self.logits[place], np.float32(self.edge))
        return np.where(beyond, np.float32(-np.inf), logits), known | beyond

    def lacks(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of ids whose logits are not known."""
        return ids[~self.at(ids)[1]]


def read_row(told: lane_pb2.Scored, *, position: int, vocab: int, candidates: int) -> Row:
    """Parse an expert's distribution; raises ProtocolViolation for what cannot be, naming the figure."""
    if told.position != position or told.asked:
        raise ProtocolViolation(f"a distribution of position {told.position}, expected one of {position}")
    logits, ids = np.array(told.logits, np.float32), np.array(told.ids, np.int64)
    listed = vocab if candidates == 0 else min(candidates, vocab)
    if not ids.size and listed == vocab:
        ids = np.arange(vocab)
    _check_finite(logits, listed, told.log_sum_exp)
    if ids.size != listed or ids.max() >= vocab:
        raise ProtocolViolation(f"{ids.size} ids up to {ids.max(initial=0)}; {listed} of {vocab} were asked for")
    edge = float(logits.min()) if listed < vocab else -math.inf
    order = np.argsort(ids)
    ids, logits = ids[order], logits[order]
    if (ids[1:] == ids[:-1]).any():
        raise ProtocolViolation("an id is listed more than once")
    row = Row(ids, logits, told.log_sum_exp, vocab, edge)
    _check_sum(row)
    return row


def learn(row: Row, told: lane_pb2.Scored, *, position: int, asked: NDArray[np.int64] | None) -> Row:
    """`row` with the answer to a question for `asked` ids, or the whole vocabulary (None); raises ProtocolViolation."""
    if told.position != position or not told.asked or told.log_sum_exp != row.log_sum_exp:
        raise ProtocolViolation(f"not the answer to the question about position {position}, but of {told.position}")
    ids = np.arange(row.vocab) if asked is None else asked
    logits = np.array(told.logits, np.float32)
    if not np.array_equal(np.array(told.ids, np.int64), ids[:0] if asked is None else ids):
        raise ProtocolViolation(f"an answer for {len(told.ids)} ids that are not the {ids.size} that were asked for")
    _check_finite(logits, ids.size, told.log_sum_exp)
    known, listed = row.at(ids)
    if (np.where(listed, logits != known, logits > known)).any():
        raise ProtocolViolation("an answer that does not go with the candidates that were told before")
    if asked is not None:
        ids, logits = np.concatenate((row.ids, ids[~listed])), np.concatenate((row.logits, logits[~listed]))
        order = np.argsort(ids)
        ids, logits = ids[order], logits[order]
    found = Row(ids, logits, row.log_sum_exp, row.vocab, -math.inf if ids.size == row.vocab else row.edge)
    _check_sum(found)
    return found


def _check_finite(logits: NDArray[np.float32], expected: int, log_sum_exp: float) -> None:
    if logits.size != expected or not np.isfinite(logits).all() or not math.isfinite(log_sum_exp):
        raise ProtocolViolation(f"{logits.size} logits of {expected}, or not all of its figures are finite")


def _check_sum(row: Row) -> None:
    total = float(np.exp(row.logits.astype(np.float64) - row.log_sum_exp).sum())
    if total > 1.0 + _SUM_SLACK or (row.complete and total < 1.0 - _SUM_SLACK):
        raise ProtocolViolation(f"the probabilities of {row.ids.size} of {row.vocab} ids add up to {total:.6g}")


@dataclass(frozen=True, slots=True)
class Bounded:
    """Logits of ids between low and high [n]; where `exact` [n] both are the logit."""

    low: Logits
    high: Logits
    exact: NDArray[np.bool_]


class Mixture:
    """The mixture of rows by weights above 0, which add up to 1. log_sum_exp: of its logits."""

    def __init__(self, rows: Sequence[Row], weights: Sequence[float]) -> None:
        self.rows = rows
        self.vocab = max(row.vocab for row in rows)
        self.log_sum_exp = rows[0].log_sum_exp
        if len(rows) > 1:
            self.log_sum_exp = sum(weight * row.log_sum_exp for weight, row in zip(weights, rows, strict=True))
        # Added to an expert's logit it is the logarithm of its part of the mixture's probability.
        self._offsets = [math.log(weight) - row.log_sum_exp for weight, row in zip(weights, rows, strict=True)]

    def known(self) -> NDArray[np.int64]:
        """Rising ids of which any expert's logit is known."""
        return np.unique(np.concatenate([row.ids for row in self.rows]))

    def logits(self, ids: NDArray[np.int64]) -> Bounded:
        """What is known of the logits of ids."""
        found = [row.at(ids) for row in self.rows]
        exact = np.logical_and.reduce([known for _, known in found])
        if len(found) == 1:
            own = found[0][0]
            return Bounded(np.where(exact, own, np.float32(-np.inf)), own, exact)
        high, part = self._pool([values for values, _ in found]), ~exact
        low = high.copy()
        if part.any():
            low[part] = self._pool([np.where(known, values, -np.inf)[part] for values, known in found])
        return Bounded(low, high, exact)

    def rest(self) -> float:
        """No id that no expert has told anything of has a greater logit; -inf: there is none."""
        edges = [np.array([row.edge], np.float32) for row in self.rows]
        if len(edges) == 1:
            return self.rows[0].edge
        return float(self._pool(edges)[0])

    def _pool(self, logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        terms = np.array([one.astype(np.float64) + shift for one, shift in zip(logits, self._offsets, strict=True)])
        peak = terms.max(axis=0)
        shift = np.where(np.isneginf(peak), 0.0, peak)
        total = np.zeros(peak.size)
        for term in terms:
            total += np.exp(term - shift)
        with np.errstate(divide="ignore"):
            return np.asarray(shift + np.log(total) + self.log_sum_exp, np.float64)
