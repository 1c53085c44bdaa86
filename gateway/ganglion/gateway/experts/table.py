"""Pure core: what the coordinator says of edge experts, and which of them it chose for each class of requests.

Names, figures and choices are taken from it; where text goes is not: see `admission.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ganglion.proto import admin_pb2
from ganglion.wire.errors import InvalidRequest, NotFound

MODEL: Final = "experts"  # the id that the API shows; of a class other than the default one "experts:CLASS"
DEFAULT: Final = "default"
EXPERTS: Final = 256  # of one fleet at most; the rest is not looked at
TOKENS: Final = 128  # of an answer, where a budget says nothing
NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
CLASS: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")

Combining = Literal["best", "vote", "rerank", "blend"]
_COMBINES: Final[dict[int, Combining]] = {
    admin_pb2.COMBINE_UNSPECIFIED: "best",
    admin_pb2.COMBINE_BEST: "best",
    admin_pb2.COMBINE_VOTE: "vote",
    admin_pb2.COMBINE_RERANK: "rerank",
    admin_pb2.COMBINE_BLEND: "blend",
}
_BY_NAME: Final = {name: number for number, name in _COMBINES.items() if number}


@dataclass(frozen=True)
class Expert:
    """One edge expert. url: of somebody else's server, "" of a deployment.

    model: what the server, or this fleet, calls it. queue: answers under way or waiting. ttft_p95_s, tpot_p95_s: 0 is
    not known.
    """

    name: str
    url: str = ""
    model: str = ""
    domains: tuple[str, ...] = ()
    state: str = "ready"
    why: str = ""
    queue: int = 0
    ttft_p95_s: float = 0.0
    tpot_p95_s: float = 0.0
    tokenizer_digest: str = ""


@dataclass(frozen=True)
class Budget:
    """What a class of requests may cost, and how its answers are combined; 0: no bound (`tokens`: of an answer)."""

    name: str = DEFAULT
    latency_s: float = 0.0
    energy_j: float = 0.0
    tokens: int = TOKENS
    combine: Combining = "best"
    most: int = 0
    private: bool = False
    domains: tuple[str, ...] = ()

    @classmethod
    def of(cls, said: admin_pb2.Budget) -> Budget:
        """From the wire."""
        return cls(
            name=said.name or DEFAULT,
            latency_s=_figure(said.latency_p95_s),
            energy_j=_figure(said.energy_j),
            tokens=said.tokens or TOKENS,
            combine=_COMBINES.get(said.combine, "best"),
            most=said.most,
            private=said.private,
            domains=tuple(said.domains),
        )

    def message(self) -> admin_pb2.Budget:
        """For the wire."""
        return admin_pb2.Budget(
            name=self.name,
            latency_p95_s=self.latency_s,
            energy_j=self.energy_j,
            tokens=self.tokens,
            combine=_BY_NAME[self.combine],  # type: ignore[arg-type]
            most=self.most,
            private=self.private,
            domains=self.domains,
        )


@dataclass(frozen=True)
class Chosen:
    """The subset of experts for a budget. refused: why there is none."""

    budget: Budget
    experts: tuple[str, ...]
    refused: str = ""

    @classmethod
    def of(cls, said: admin_pb2.Selection) -> Chosen:
        """From the wire."""
        names = tuple(dict.fromkeys(name for name in said.experts if NAME.fullmatch(name)))
        return cls(Budget.of(said.budget), names[:EXPERTS], "" if names else said.refused or "no expert was chosen")


class ExpertTable:
    """Experts by name and choices by class, as the coordinator last said."""

    def __init__(self) -> None:
        self._experts: dict[str, Expert] = {}
        self._chosen: dict[str, Chosen] = {}

    def update(self, fleet: admin_pb2.Fleetwide) -> None:
        """Take the state of the fleet."""
        found = [_expert(state) for state in fleet.experts[:EXPERTS] if NAME.fullmatch(state.spec.name)]
        self._experts = {expert.name: expert for expert in found}
        chosen = [Chosen.of(said) for said in fleet.selections[:EXPERTS]]
        self._chosen = {one.budget.name: one for one in chosen if CLASS.fullmatch(one.budget.name)}

    @property
    def experts(self) -> Sequence[Expert]:
        """Every expert, by name."""
        return [self._experts[name] for name in sorted(self._experts)]

    @property
    def models(self) -> list[str]:
        """The ids that the API shows; none without experts."""
        if not self._experts:
            return []
        return [MODEL, *(f"{MODEL}:{name}" for name in sorted(self._chosen) if name != DEFAULT)]

    def get(self, name: str) -> Expert | None:
        """The expert of that name."""
        return self._experts.get(name)

    def chosen(self, name: str) -> Chosen:
        """What was chosen for a class. Raises NotFound for a class without a budget, but for the default one.

        That has then no bound to meet, and the more experts there are the better is the best of them: it is all.
        """
        found = self._chosen.get(name)
        if found is not None:
            return found
        if name == DEFAULT:
            return Chosen(Budget(), tuple(one.name for one in self.experts if one.state == "ready"))
        there = ", ".join(sorted({DEFAULT, *self._chosen}))
        raise NotFound(
            f"no class of requests is called {name[:64]!r}; there are: {there} (ganglion experts budget)", param="model"
        )


def class_of(model: str) -> str | None:
    """The class of requests that a model's id names; None where it names no edge experts. Raises InvalidRequest."""
    if model == MODEL:
        return DEFAULT
    if not model.startswith(f"{MODEL}:"):
        return None
    name = model.removeprefix(f"{MODEL}:")
    if not CLASS.fullmatch(name):
        raise InvalidRequest(
            f"{model[:64]!r} names no class of requests; a class is made of a-z, 0-9 and -", param="model"
        )
    return name


def _expert(state: admin_pb2.ExpertState) -> Expert:
    spec, figures = state.spec, state.figures
    return Expert(
        name=spec.name,
        url=spec.url,
        model=spec.model or spec.name,
        domains=tuple(spec.domains),
        state=state.state,
        why=state.why,
        queue=state.queue,
        ttft_p95_s=_figure(figures.ttft_p95_s) or _figure(figures.ttft_s),
        tpot_p95_s=_figure(figures.tpot_p95_s) or (1 / rate if (rate := _figure(figures.tokens_per_s)) else 0.0),
        tokenizer_digest=state.tokenizer_digest,
    )


def _figure(value: float) -> float:
    """A figure of somebody else's: what is no positive number is not known."""
    return value if math.isfinite(value) and value > 0 else 0.0
