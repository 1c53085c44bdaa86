"""The rounds: everything that is compared takes its turn within each, so that a noisy minute falls on all alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ganglion.cli.bench import measures
from ganglion.cli.bench.asking import Asker, Prompts
from ganglion.cli.bench.deployed import Deployed
from ganglion.cli.bench.energy import Meter
from ganglion.cli.bench.measures import SHARED, Decoded, Drawn, Sizes
from ganglion.cli.bench.rivals import Rival
from ganglion.wire.errors import Internal

STREAMS: Final = 2  # that run while prompts arrive, where the deployment admits as many and one more
Progress = Callable[[str, int, int], None]
"""(what runs now, steps done, steps in all)"""


@dataclass
class Collected:
    """The rounds of one deployment or competitor, in order; sizes map to a figure a round."""

    decode: list[Decoded] = field(default_factory=list)
    prefill_s: dict[int, list[float]] = field(default_factory=dict)
    concurrent: dict[int, list[float]] = field(default_factory=dict)
    quiet_s: list[list[float]] = field(default_factory=list)
    busy_s: list[list[float]] = field(default_factory=list)
    turns_s: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Ours:
    """A deployment and what was measured of it."""

    name: str
    deployed: Deployed
    asker: Asker
    found: Collected = field(default_factory=Collected)

    @property
    def agrees(self) -> str | None:
        """What its tokens are equal over; None in fast classes, whose tokens depend on the plan."""
        numeric = self.deployed.plan.numeric_class
        return f"{self.deployed.manifest.source_digest} {numeric.name}" if numeric.exact else None


@dataclass
class Theirs:
    """A competitor and what was measured of it."""

    rival: Rival
    found: Collected = field(default_factory=Collected)


@dataclass(frozen=True)
class Asked:
    """What a run does."""

    measures: tuple[str, ...]
    sizes: Sizes
    rounds: int
    seed: int


class Runner:
    """Runs the rounds. `checks` says afterwards which tokens were compared; a difference that may not be raises."""

    def __init__(self, ours: Sequence[Ours], theirs: Sequence[Theirs], asked: Asked, progress: Progress) -> None:
        self.ours = list(ours)
        self.theirs = list(theirs)
        self.asked = asked
        self.checks: list[str] = []
        self.meter = Meter()
        self._progress = progress
        self._compared: dict[str, list[bool]] = {}
        self._done = 0

    async def run(self) -> None:
        """All rounds, after one that warms up and is not counted."""
        first = self.ours[0].deployed
        geometry, ends = first.manifest.geometry, first.manifest.eos_ids
        prompts = Prompts(geometry.vocab, self.asked.seed, ends)
        streams = min(STREAMS, max(0, min(each.deployed.plan.sessions for each in self.ours) - 1))
        await self._warm(prompts)
        for number in range(self.asked.rounds):
            drawn = Drawn.of(prompts, self.asked.sizes, streams)
            for measure in self.asked.measures:
                turn = number % len(self.ours)
                for ours in (*self.ours[turn:], *self.ours[:turn]):
                    self._step(f"{measure}: {ours.name}")
                    await self._measure(ours, measure, drawn)
                for theirs in self.theirs if measure in SHARED else ():
                    self._step(f"{measure}: {theirs.rival.about.name}")
                    await asyncio.to_thread(self._measure_rival, theirs, measure, drawn)
            self._compare_plans()
        self.checks += [f"{what}: {_verdict(equal)}" for what, equal in self._compared.items()]

    @property
    def _steps(self) -> int:
        shared = sum(measure in SHARED for measure in self.asked.measures)
        return self.asked.rounds * (len(self.asked.measures) * len(self.ours) + shared * len(self.theirs))

    def _step(self, what: str) -> None:
        self._progress(what, self._done, self._steps)
        self._done += 1

    async def _warm(self, prompts: Prompts) -> None:
        for ours in self.ours:
            self._progress(f"warming up {ours.name}", 0, self._steps)
            await ours.asker.ask(prompts.fresh(measures.SHORT), measures.SHORT)
        for theirs in self.theirs:
            prompt = prompts.fresh(measures.SHORT)
            await asyncio.to_thread(theirs.rival.decode, prompt, measures.SHORT)

    async def _measure(self, ours: Ours, measure: str, drawn: Drawn) -> None:
        found, asker, sizes = ours.found, ours.asker, self.asked.sizes
        match measure:
            case "decode":
                found.decode.append(await measures.decode(asker, drawn, sizes.tokens, self.meter))
            case "prefill":
                for size, prompt in drawn.prefill.items():
                    found.prefill_s.setdefault(size, []).append(await measures.prefill(asker, prompt))
            case "concurrent":
                for count, prompts in drawn.together.items():
                    rate, ids = await measures.concurrent(asker, prompts, sizes.tokens)
                    found.concurrent.setdefault(count, []).append(rate)
                    self._compare_alone(ours, ids, count)
            case "arrivals" if drawn.running:
                quiet, busy = await measures.arrivals(asker, drawn, sizes.running)
                found.quiet_s.append(quiet)
                found.busy_s.append(busy)
            case "second-turn":
                found.turns_s.append(await measures.second_turn(asker, drawn))

    def _measure_rival(self, theirs: Theirs, measure: str, drawn: Drawn) -> None:
        if measure == "decode":
            theirs.found.decode.append(theirs.rival.decode(drawn.short, self.asked.sizes.tokens))
            return
        for size, prompt in drawn.prefill.items():
            theirs.found.prefill_s.setdefault(size, []).append(theirs.rival.prefill(prompt))

    def _compare_alone(self, ours: Ours, ids: list[int], sessions: int) -> None:
        """The same prompt alone and beside others."""
        if ours.found.decode:
            self._compare(f"{ours.name} alone and beside other sessions", ours, ours.found.decode[-1].ids, ids)

    def _compare_plans(self) -> None:
        """The same prompt on every deployment whose tokens must be equal."""
        for at, ours in enumerate(self.ours):
            for other in self.ours[:at]:
                if ours.agrees == other.agrees and ours.found.decode and other.found.decode:
                    ids = ours.found.decode[-1].ids
                    self._compare(f"{other.name} and {ours.name}", ours, other.found.decode[-1].ids, ids)

    def _compare(self, what: str, ours: Ours, one: list[int] | None, other: list[int] | None) -> None:
        if one != other and ours.agrees is not None:
            raise Internal(
                f"{what}: other tokens in the class {ours.deployed.plan.numeric_class.name}, which is exact "
                f"(after {_common(one or [], other or [])} equal ones; seed {self.asked.seed})"
            )
        self._compared.setdefault(what, []).append(one == other)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _verdict(equal: Sequence[bool]) -> str:
    if all(equal):
        return f"equal tokens, {len(equal)} times of {len(equal)}"
    return f"equal tokens, {sum(equal)} times of {len(equal)} (a fast class promises none)"


def same_tokens(ours: Collected, theirs: Collected) -> tuple[int, int] | None:
    """(tokens that both begin with, tokens in all) over the rounds; None where the competitor says no ids."""
    pairs = [
        (one.ids, other.ids)
        for one, other in zip(ours.decode, theirs.decode, strict=False)
        if one.ids is not None and other.ids is not None
    ]
    return (sum(_common(*pair) for pair in pairs), sum(len(one) for one, _ in pairs)) if pairs else None
