"""One request to edge experts on its way, and how its answer ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ganglion.gateway.experts.admission import Admitted
from ganglion.gateway.experts.questions import Request
from ganglion.gateway.experts.table import Budget
from ganglion.gateway.generation import Ended

WHY_CHARACTERS: Final = 300  # of the reason for which an expert was dropped


@dataclass(frozen=True)
class Call:
    """One request on its way. weights, quality: of the experts that may be asked. dropped: why others may not."""

    asked: Request
    identifier: str
    tenant: str
    arrived_s: float
    budget: Budget
    tokens: int
    seed: int
    admitted: dict[str, Admitted]
    weights: dict[str, float]
    quality: dict[str, float]
    dropped: dict[str, str]

    @property
    def scored(self) -> bool:
        """Whether log-probabilities of the answers are wanted."""
        return self.budget.combine == "rerank"

    def ended(
        self,
        reason: str,
        *,
        asked: Sequence[str],
        answered_by: str | None,
        dropped: Mapping[str, str],
        usage: Mapping[str, Mapping[str, int]],
        count: int,
    ) -> Ended:
        """The end of the answer with its account; usage: prompt_tokens and completion_tokens by expert."""
        return Ended(
            reason,
            sum(row["prompt_tokens"] for row in usage.values()),
            sum(row["completion_tokens"] for row in usage.values()),
            0,
            experts={
                "combine": self.budget.combine,
                "class": self.budget.name,
                "asked": list(asked),
                "weights": {name: round(weight, 6) for name, weight in self.weights.items()},
                "answered_by": answered_by,
                "dropped": {name: why[:WHY_CHARACTERS] for name, why in (self.dropped | dict(dropped)).items()},
                "n": count,
                "usage": usage,
            },
        )
