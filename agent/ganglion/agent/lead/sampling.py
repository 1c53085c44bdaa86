"""The sampling parameters of a session, parsed once at the edge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ganglion.proto.lane_pb2 import Sampling as SamplingMessage
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.limits import TOP_LOGPROBS

TEMPERATURE_MIN = 1e-3
TEMPERATURE_MAX = 100.0
FILTER_CANDIDATES = 256


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: greedy; top_k 0, top_p 1 and min_p 0: off; top_logprobs -1: no log-probabilities are wanted."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    top_logprobs: int = -1

    @property
    def filtered(self) -> bool:
        """Whether a draw needs a threshold: never when greedy, as the likeliest token passes every filter."""
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def candidates(self) -> int:
        """How many raw candidates a share is asked for at first; 0 when its best and its log-sum-exp will do."""
        if self.filtered:
            return max(FILTER_CANDIDATES, min(self.top_k + 1, 4 * FILTER_CANDIDATES))
        return self.top_logprobs + 1 if self.top_logprobs >= 0 else 0


def parse_sampling(message: SamplingMessage) -> Sampling:
    """Check a peer's parameters; raises InvalidRequest naming the field and its bounds."""
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
    return Sampling(temperature, message.top_k, message.top_p, message.min_p, message.seed, message.top_logprobs)
