"""What a share of the output matrix answers about one row of its logits: best, candidates, log-sum-exp by group."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.lead.draw import Draw
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.sampling.adjusting import VocabShare
from ganglion.wire.sampling.noise import NOISE_MAX, from_hashes, hash_at_least, hashes, noise

# Tokens within this many nats of the likeliest are scored first: they nearly always hold the winner.
_NEAR_NATS = 4.0

_NO_FLOATS: NDArray[np.float64] = np.empty(0, np.float64)


_NO_IDS: NDArray[np.uint32] = np.empty(0, np.uint32)
_NO_LOGITS: NDArray[np.float32] = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class Answer:
    """A share's answer. ids [k] uint32 by falling adjusted logit, ties by rising id; logits [k] float32 adjusted.

    best_score: -inf when none of the share's tokens may be drawn. best_logit, raw_logits [k] float32 (of `ids`): raw.
    complete: `ids` holds every token that may be drawn. log_sum_exp [groups] float64, of the raw logits, and top_ids,
    top_logits [n], the likeliest by raw logit: when log-probabilities were asked for. scaled_log_sum_exp [groups]
    float64, of the adjusted logits over the temperature: when the mass was asked for. numeric_error: the logits were
    not finite and nothing else counts.
    """

    best_id: int
    best_score: float
    best_logit: float
    ids: NDArray[np.uint32] = field(default_factory=lambda: _NO_IDS)
    logits: NDArray[np.float32] = field(default_factory=lambda: _NO_LOGITS)
    raw_logits: NDArray[np.float32] = field(default_factory=lambda: _NO_LOGITS)
    complete: bool = False
    log_sum_exp: NDArray[np.float64] = field(default_factory=lambda: _NO_FLOATS)
    scaled_log_sum_exp: NDArray[np.float64] = field(default_factory=lambda: _NO_FLOATS)
    top_ids: NDArray[np.uint32] = field(default_factory=lambda: _NO_IDS)
    top_logits: NDArray[np.float32] = field(default_factory=lambda: _NO_LOGITS)
    numeric_error: bool = False


_NUMERIC_ERROR = Answer(0, 0.0, 0.0, numeric_error=True)


def answer(logits: NDArray[np.float32], share: VocabShare, draw: Draw) -> Answer:
    """Answer `draw` from a row of raw logits [share.count] float32."""
    if not (math.isfinite(float(logits.max())) and math.isfinite(float(logits.min()))):
        return _NUMERIC_ERROR
    adjusted, available = logits, share.count
    if draw.adjusting is not None:
        adjusted, available = draw.adjusting.apply(logits, share), draw.adjusting.available(share)
        if int(np.count_nonzero(np.isfinite(adjusted))) != available:
            return _NUMERIC_ERROR
    best_id, score, best_logit = share.first, -math.inf, 0.0
    if available:
        index, score = _best(adjusted, share.first, draw)
        best_id, best_logit = share.first + index, float(logits[index])
    if draw.candidates == 0 and draw.top_logprobs < 0:
        return Answer(best_id, score, best_logit)
    chosen = top_indices(adjusted, _listed(draw, available))
    listed = adjusted[chosen]
    raw, top = listed, chosen[: max(0, draw.top_logprobs)]
    if draw.adjusting is not None:
        raw, top = logits[chosen], top_indices(logits, max(0, draw.top_logprobs))
    plain = group_log_sum_exp(logits, share.group_rows, 1.0) if draw.top_logprobs >= 0 else _NO_FLOATS
    scaled = _NO_FLOATS
    if draw.mass:
        same = draw.temperature == 1.0 and draw.adjusting is None and plain.size
        scaled = plain if same else group_log_sum_exp(adjusted, share.group_rows, draw.temperature)
    return Answer(
        best_id,
        score,
        best_logit,
        (chosen + share.first).astype(np.uint32),
        listed,
        raw,
        chosen.size == available,
        plain,
        scaled,
        (top + share.first).astype(np.uint32),
        logits[top],
    )


def _listed(draw: Draw, available: int) -> int:
    """How many candidates an answer lists: without adjustments the likeliest by raw logit are the first of them."""
    return min(max(draw.candidates, 0 if draw.adjusting is not None else draw.top_logprobs), available)


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
    if count == 0:
        return np.empty(0, np.intp)
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
        if peak == -math.inf:  # no token of the group may be drawn
            found[group] = peak
            continue
        scaled -= peak
        np.exp(scaled, out=scaled)
        found[group] = peak + math.log(float(scaled.sum()))
    return found


def to_message(reply: Answer, draw: Draw) -> lane_pb2.Candidates:
    """The answer to `draw` as it travels."""
    if reply.numeric_error:
        return lane_pb2.Candidates(numeric_error=True)
    message = lane_pb2.Candidates(
        ids=reply.ids.tolist(),
        logits=reply.logits.tolist(),
        log_sum_exp=reply.log_sum_exp.tolist(),
        scaled_log_sum_exp=reply.scaled_log_sum_exp.tolist(),
    )
    if reply.best_score != -math.inf:
        message.best_id, message.best_score, message.best_logit = reply.best_id, reply.best_score, reply.best_logit
    if draw.adjusting is not None and draw.top_logprobs >= 0:
        message.raw_logits.extend(reply.raw_logits.tolist())
        message.top_ids.extend(reply.top_ids.tolist())
        message.top_logits.extend(reply.top_logits.tolist())
    return message


def from_message(message: lane_pb2.Candidates, share: VocabShare, draw: Draw) -> Answer:
    """Parse a share's answer to `draw`; raises ProtocolViolation when it is not what was asked."""
    if message.numeric_error:
        return _NUMERIC_ERROR
    available, adjusted, logprobs = draw.available(share), draw.adjusting is not None, draw.top_logprobs >= 0
    listed = _listed(draw, available)
    ids, logits = np.array(message.ids, np.uint32), np.array(message.logits, np.float32)
    _check_ranked(ids, logits, listed, share)
    sums = np.array(message.log_sum_exp, np.float64)
    scaled = np.array(message.scaled_log_sum_exp, np.float64)
    _check_sums(sums, share.groups if logprobs else 0, np.isfinite(sums))
    _check_sums(scaled, share.groups if draw.mass else 0, np.isfinite(scaled) | (adjusted & np.isneginf(scaled)))
    raw, top_ids, top_logits = logits, ids[: max(0, draw.top_logprobs)], logits[: max(0, draw.top_logprobs)]
    if adjusted and logprobs:
        raw = np.array(message.raw_logits, np.float32)
        if raw.size != listed or not np.isfinite(raw).all():
            raise ProtocolViolation(f"candidates: {raw.size} raw logits of {listed}, or not all are finite")
        top_ids, top_logits = np.array(message.top_ids, np.uint32), np.array(message.top_logits, np.float32)
        _check_ranked(top_ids, top_logits, min(draw.top_logprobs, share.count), share)
    best_id, score, best_logit = share.first, -math.inf, 0.0
    if available:
        best_id, score, best_logit = message.best_id, message.best_score, message.best_logit
        if not (math.isfinite(score) and math.isfinite(best_logit)):
            raise ProtocolViolation("candidates: the best score is not finite")
        named = np.append(ids, np.uint32(best_id)).astype(np.int64) - share.first
        if not 0 <= named[-1] < share.count:
            raise ProtocolViolation(f"candidates: an id outside {share.first}..{share.first + share.count - 1}")
        if (
            draw.adjusting is not None
            and draw.adjusting.allowed is not None
            and not draw.adjusting.allowed[named].all()
        ):
            raise ProtocolViolation("candidates: a token that may not be drawn")
    complete = listed == available
    return Answer(best_id, score, best_logit, ids, logits, raw, complete, sums, scaled, top_ids, top_logits)


def _check_ranked(ids: NDArray[np.uint32], logits: NDArray[np.float32], expected: int, share: VocabShare) -> None:
    if ids.size != expected or logits.size != expected:
        raise ProtocolViolation(f"candidates: {ids.size} ids and {logits.size} logits; asked for {expected}")
    if expected and (ids.min() < share.first or ids.max() >= share.first + share.count):
        raise ProtocolViolation(f"candidates: an id outside {share.first}..{share.first + share.count - 1}")
    if not np.isfinite(logits).all():
        raise ProtocolViolation("candidates: a logit is not finite")
    falls, same = logits[1:] < logits[:-1], logits[1:] == logits[:-1]
    if not (falls | (same & (ids[1:] > ids[:-1]))).all() or np.unique(ids).size != expected:
        raise ProtocolViolation("candidates: not by falling logit and rising id")


def _check_sums(sums: NDArray[np.float64], expected: int, good: NDArray[np.bool_]) -> None:
    if sums.size != expected or not good.all():
        raise ProtocolViolation(f"candidates: {sums.size} sums of {expected}, or not all are finite")
