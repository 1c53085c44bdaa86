"""The sampling parameters of a session, parsed once at the edge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ganglion.proto.lane_pb2 import Sampling as SamplingMessage
from ganglion.proto.lane_pb2 import TokenBias
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.limits import LOGIT_BIASES, TOP_LOGPROBS

TEMPERATURE_MIN = 1e-3
TEMPERATURE_MAX = 100.0
REPETITION_PENALTY_MIN = 1e-3  # float32 logits stay finite
REPETITION_PENALTY_MAX = 1e3
PENALTY_MAX = 2.0
BIAS_MAX = 100.0
FILTER_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: greedy; top_k 0, top_p 1 and min_p 0: off; top_logprobs -1: no log-probabilities are wanted.

    repetition_penalty 1, presence_penalty 0 and frequency_penalty 0: off; logit_bias: (id, bias), each id once.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    top_logprobs: int = -1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def filtered(self) -> bool:
        """Whether a draw needs a threshold: never when greedy, as the likeliest token passes every filter."""
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def candidates(self) -> int:
        """How many candidates a share is asked for at first; 0 when its best will do."""
        return max(FILTER_CANDIDATES, min(self.top_k + 1, 4 * FILTER_CANDIDATES)) if self.filtered else 0

    @property
    def mass(self) -> bool:
        """Whether top-p needs the sums over the whole vocabulary; after a top-k the candidates hold all of them."""
        return self.temperature > 0.0 and self.top_p < 1.0 and self.top_k == 0

    @property
    def penalized(self) -> bool:
        """Whether any logit is biased or penalized."""
        plain = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) == (1.0, 0.0, 0.0)
        return not plain or bool(self.logit_bias)


def parse_sampling(message: SamplingMessage, vocab: int) -> Sampling:
    """Check a peer's parameters for `vocab` tokens; raises InvalidRequest naming the field and its bounds."""
    temperature = message.temperature
    if not math.isfinite(temperature) or (temperature != 0.0 and not TEMPERATURE_MIN <= temperature <= TEMPERATURE_MAX):
        raise InvalidRequest(
            f"temperature is {temperature}; use 0 (greedy) or {TEMPERATURE_MIN} to {TEMPERATURE_MAX}",
            param="temperature",
        )
    if not 0.0 < message.top_p <= 1.0:
        raise InvalidRequest(f"top_p is {message.top_p}; use more than 0 and at most 1 (off)", param="top_p")
    if not 0.0 <= message.min_p <= 1.0:
        raise InvalidRequest(f"min_p is {message.min_p}; use 0 (off) to 1", param="min_p")
    if not -1 <= message.top_logprobs <= TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs is {message.top_logprobs}; use -1 (off) to {TOP_LOGPROBS}", param="top_logprobs"
        )
    repetition = message.repetition_penalty or 1.0
    if not REPETITION_PENALTY_MIN <= repetition <= REPETITION_PENALTY_MAX:
        raise InvalidRequest(
            f"repetition_penalty is {repetition}; use {REPETITION_PENALTY_MIN} to {REPETITION_PENALTY_MAX}, 1 is off",
            param="repetition_penalty",
        )
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(message, name)
        if not -PENALTY_MAX <= value <= PENALTY_MAX:
            raise InvalidRequest(f"{name} is {value}; use {-PENALTY_MAX} to {PENALTY_MAX}, 0 is off", param=name)
    return Sampling(
        temperature,
        message.top_k,
        message.top_p,
        message.min_p,
        message.seed,
        message.top_logprobs,
        repetition,
        message.presence_penalty,
        message.frequency_penalty,
        tuple(_bias(one, vocab) for one in _each_once(message.logit_bias)),
    )


def _bias(one: TokenBias, vocab: int) -> tuple[int, float]:
    if one.id >= vocab:
        raise InvalidRequest(f"logit_bias has token id {one.id}; the vocabulary has {vocab}", param="logit_bias")
    if not -BIAS_MAX <= one.bias <= BIAS_MAX:
        raise InvalidRequest(
            f"logit_bias of token {one.id} is {one.bias}; use {-BIAS_MAX} to {BIAS_MAX}", param="logit_bias"
        )
    return one.id, one.bias


def _each_once(biases: Sequence[TokenBias]) -> Sequence[TokenBias]:
    if len(biases) > LOGIT_BIASES:
        raise InvalidRequest(f"logit_bias has {len(biases)} tokens, at most {LOGIT_BIASES}", param="logit_bias")
    seen = set()
    for one in biases:
        if one.id in seen:
            raise InvalidRequest(f"logit_bias names token {one.id} more than once", param="logit_bias")
        seen.add(one.id)
    return biases
