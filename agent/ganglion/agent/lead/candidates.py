"""What a share of the output matrix answers about one row of its logits: best, candidates, log-sum-exp by group."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.lead.noise import NOISE_MAX, from_hashes, hash_at_least, hashes, noise
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation

# Tokens within this many nats of the likeliest are scored first: they nearly always hold the winner.
_NEAR_NATS = 4.0

_NO_FLOATS: NDArray[np.float64] = np.empty(0, np.float64)


@dataclass(frozen=True, slots=True)
class VocabShare:
    """A share's token ids first..first+count-1, in groups of `group_rows` (the last one may be shorter)."""

    first: int
    count: int
    group_rows: int

    @property
    def groups(self) -> int:
        """Vocabulary groups of the share."""
        return -(-self.count // self.group_rows)


@dataclass(frozen=True, slots=True)
class Draw:
    """What is asked of a share; `candidates` 0: only the best. `position` is that of the token to be drawn."""

    candidates: int
    temperature: float
    seed: int
    position: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A share's answer. ids [k] uint32 by falling logit, ties by rising id; logits [k] float32 raw.

    log_sum_exp, scaled_log_sum_exp: [groups] float64, of the logits and of the logits over the temperature; empty when
    no candidates were asked for. numeric_error: the logits were not finite and nothing else counts.
    """

    best_id: int
    best_score: float
    best_logit: float
    ids: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    logits: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    log_sum_exp: NDArray[np.float64] = field(default_factory=lambda: _NO_FLOATS)
    scaled_log_sum_exp: NDArray[np.float64] = field(default_factory=lambda: _NO_FLOATS)
    numeric_error: bool = False


def answer(logits: NDArray[np.float32], share: VocabShare, draw: Draw) -> Answer:
    """Answer `draw` from a row of logits [share.count] float32."""
    if not (math.isfinite(float(logits.max())) and math.isfinite(float(logits.min()))):
        return Answer(0, 0.0, 0.0, numeric_error=True)
    index, score = _best(logits, share.first, draw)
    best_id, best_logit = share.first + index, float(logits[index])
    if draw.candidates == 0:
        return Answer(best_id, score, best_logit)
    top = top_indices(logits, draw.candidates)
    plain = group_log_sum_exp(logits, share.group_rows, 1.0)
    scaled = draw.temperature not in (0.0, 1.0)
    return Answer(
        best_id,
        score,
        best_logit,
        (top + share.first).astype(np.uint32),
        logits[top],
        plain,
        group_log_sum_exp(logits, share.group_rows, draw.temperature) if scaled else _NO_FLOATS,
    )


def _best(logits: NDArray[np.float32], first: int, draw: Draw) -> tuple[int, float]:
    """Index and score of the best perturbed logit; exact, though noise is computed only where it could win."""
    likeliest = int(logits.argmax())
    if draw.temperature == 0.0:
        return likeliest, float(logits[likeliest])
    temperature, peak = draw.temperature, float(logits[likeliest])
    near = logits >= np.float32(peak - _NEAR_NATS * temperature)
    indices = np.flatnonzero(near)
    scores = logits[indices].astype(np.float64) / temperature
    scores += noise(draw.seed, draw.position, (indices + first).astype(np.uint32))
    winner = int(scores.argmax())
    index, score = int(indices[winner]), float(scores[winner])

    # A far token needs noise above score - logit/T; the slack covers the rounding of the bounds to float32.
    floor = (score - NOISE_MAX) * temperature
    floor -= 1e-5 * (1.0 + abs(floor))
    far = np.flatnonzero(~near & (logits >= np.float32(floor)))
    if far.size == 0:
        return index, score
    codes = hashes(draw.seed, draw.position, (far + first).astype(np.uint32))
    bound = score - float(logits[far].max()) / temperature
    alive = codes >= np.uint32(hash_at_least(bound - 1e-9 * (1.0 + abs(bound))))
    far, codes = far[alive], codes[alive]
    if far.size == 0:
        return index, score
    scores = logits[far].astype(np.float64) / temperature + from_hashes(codes)
    winner = int(scores.argmax())
    rival = (float(scores[winner]), -int(far[winner]))
    return (index, score) if (score, -index) > rival else (-rival[1], rival[0])


def top_indices(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest (all, when there are fewer), by falling logit, ties by rising index."""
    if count >= logits.size:
        chosen = np.arange(logits.size)
    else:
        threshold = np.partition(logits, logits.size - count)[logits.size - count]
        above = np.flatnonzero(logits > threshold)
        level = np.flatnonzero(logits == threshold)[: count - above.size]
        chosen = np.concatenate((above, level))
    return np.asarray(chosen[np.lexsort((chosen, -logits[chosen]))], np.intp)


def group_log_sum_exp(logits: NDArray[np.float32], group_rows: int, temperature: float) -> NDArray[np.float64]:
    """log(sum(exp(logits/temperature))) of each group: [n] float32 -> [ceil(n / group_rows)] float64.

    Each group is summed on its own, in one order, so that the figures do not depend on how groups are shared out.
    """
    found = np.empty(-(-logits.size // group_rows), np.float64)
    for group in range(found.size):
        scaled = logits[group * group_rows : (group + 1) * group_rows].astype(np.float64)
        scaled /= temperature
        peak = float(scaled.max())
        scaled -= peak
        np.exp(scaled, out=scaled)
        found[group] = peak + math.log(float(scaled.sum()))
    return found


def log_sum_exp(terms: NDArray[np.float64]) -> float:
    """log(sum(exp(terms))), added in order: [n] float64 -> float."""
    peak = float(terms.max())
    total = 0.0
    for term in terms.tolist():
        total += math.exp(term - peak)
    return peak + math.log(total)


def to_message(reply: Answer) -> lane_pb2.Candidates:
    """The answer as it travels."""
    if reply.numeric_error:
        return lane_pb2.Candidates(numeric_error=True)
    return lane_pb2.Candidates(
        ids=reply.ids.tolist(),
        logits=reply.logits.tolist(),
        log_sum_exp=reply.log_sum_exp.tolist(),
        best_id=reply.best_id,
        best_score=reply.best_score,
        best_logit=reply.best_logit,
        scaled_log_sum_exp=reply.scaled_log_sum_exp.tolist(),
    )


def from_message(message: lane_pb2.Candidates, share: VocabShare, draw: Draw) -> Answer:
    """Parse a share's answer to `draw`; raises ProtocolViolation when it is not what was asked."""
    if message.numeric_error:
        return Answer(0, 0.0, 0.0, numeric_error=True)
    ids = np.array(message.ids, np.uint32)
    logits = np.array(message.logits, np.float32)
    plain = np.array(message.log_sum_exp, np.float64)
    scaled = np.array(message.scaled_log_sum_exp, np.float64)
    asked = min(draw.candidates, share.count)
    groups = share.groups if asked else 0
    scaled_groups = groups if draw.temperature not in (0.0, 1.0) else 0
    if (ids.size, logits.size, plain.size, scaled.size) != (asked, asked, groups, scaled_groups):
        raise ProtocolViolation(
            f"candidates: {ids.size} ids, {logits.size} logits, {plain.size} and {scaled.size} sums;"
            f" asked for {asked}, {asked}, {groups} and {scaled_groups}"
        )
    named = np.append(ids, np.uint32(message.best_id))
    if named.min() < share.first or named.max() >= share.first + share.count:
        raise ProtocolViolation(f"candidates: an id outside {share.first}..{share.first + share.count - 1}")
    if not (np.isfinite(logits).all() and np.isfinite(plain).all() and np.isfinite(scaled).all()):
        raise ProtocolViolation("candidates: a figure is not finite")
    order = np.lexsort((ids, -logits))
    if not (order == np.arange(asked)).all() or (asked and np.unique(ids).size != asked):
        raise ProtocolViolation("candidates: not by falling logit and rising id")
    if not (math.isfinite(message.best_score) and math.isfinite(message.best_logit)):
        raise ProtocolViolation("candidates: the best score is not finite")
    return Answer(message.best_id, message.best_score, message.best_logit, ids, logits, plain, scaled)
