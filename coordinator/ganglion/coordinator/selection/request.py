"""A budget as the selection takes it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Combine = Literal["best", "vote", "rerank", "blend"]

DEFAULT_CLASS: Final = "default"
DEFAULT_TOKENS: Final = 128
CLASSES: Final = 32


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a class of requests may cost: latency_p95_s and energy_j of a whole answer of `tokens`, 0 for no limit.

    most: experts of a subset, 0 for any number. private: only experts labelled owner. domains: of what is asked.
    """

    name: str = DEFAULT_CLASS
    latency_p95_s: float = 0.0
    energy_j: float = 0.0
    tokens: int = DEFAULT_TOKENS
    combine: Combine = "best"
    most: int = 0
    private: bool = False
    domains: tuple[str, ...] = ()
