"""Keeps a subset of experts chosen for every class of requests: solves anew when an expert joins, leaves or slows.

* When who may be asked changes (an expert is added, removed, ready, away, dropped, back), or a budget or the
  gates' view does, every class is solved anew at once; changes within COALESCE_S are one.
* When only figures change: once the time or the energy of an expert's answer is DRIFT away from what was solved with,
  and SETTLE_S after the last time. Experts outside a subset then need a margin to get in (choosing.MARGIN).

Nothing else changes a selection, so noise in the figures does not. The search itself runs in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from google.protobuf.message import DecodeError

from ganglion.coordinator.deployments.deployment import Deployment
from ganglion.coordinator.deployments.driver import Deployments
from ganglion.coordinator.deployments.events import Phase
from ganglion.coordinator.registry import BudgetRow, ExpertRow, Registry
from ganglion.coordinator.roster import Roster
from ganglion.coordinator.selection.choosing import Choice, Profile, choose
from ganglion.coordinator.selection.experts import LABELS, Expert, ExpertTable, Present
from ganglion.coordinator.selection.figures import answer_time
from ganglion.coordinator.selection.reading import (
    budget_message,
    check_report,
    expert_message,
    one_line,
    read_budget,
    read_profile,
    read_spec,
    selection_message,
    spec_message,
)
from ganglion.coordinator.selection.request import CLASSES, DEFAULT_CLASS, DEFAULT_TOKENS, Budget
from ganglion.proto import admin_pb2
from ganglion.wire.errors import Exhausted, InvalidRequest, NotFound
from ganglion.wire.identity import TrustLabel
from ganglion.wire.nouns import tokenizer_digest

log = logging.getLogger(__name__)

COALESCE_S: Final = 0.05
SETTLE_S: Final = 2.0
DRIFT: Final = 1.2
TICK_S: Final = 1.0
SAVE_S: Final = 30.0
KEPT_CHOICES: Final = 64  # for budgets of single requests


class Experts:
    """Experts, budgets and selections; for one event loop."""

    def __init__(
        self, registry: Registry, roster: Roster, deployments: Deployments, clock: Callable[[], float] = time.time
    ) -> None:
        self._registry = registry
        self._roster = roster
        self._deployments = deployments
        self._clock = clock
        self._table = ExpertTable()
        self._budgets: dict[str, Budget] = {DEFAULT_CLASS: Budget()}
        self._profile: Profile | None = None
        self._choices: dict[str, tuple[Choice, int]] = {}  # by class, with the generation
        self._asked: dict[Budget, Choice] = {}
        self._generation = 0
        self._version = 0  # of what every choice depends on, figures aside
        self._solved: tuple[int, dict[str, Expert]] = (-1, {})
        self._solved_s = 0.0
        self._solving = asyncio.Lock()
        self._tokenizers: dict[str, str] = {}

    def restore(self) -> None:
        """Bring back what was known before a restart."""
        for row in self._registry.experts():
            try:
                self._table.put(read_spec(admin_pb2.ExpertSpec.FromString(row.spec)), row.measured)
            except (DecodeError, InvalidRequest, ValueError) as error:
                log.error("expert %s is of another release: left out: %s", row.name, error)
        for budget in self._registry.budgets():
            try:
                known = read_budget(admin_pb2.Budget.FromString(budget.budget), named=True)
                self._budgets[known.name] = known
            except (DecodeError, InvalidRequest) as error:
                log.error("budget %s is of another release: left out: %s", budget.name, error)
        profile = self._registry.quality_profile()
        if profile:
            self._profile = read_profile(admin_pb2.QualityProfile.FromString(profile))

    # What people want

    async def put(self, message: admin_pb2.ExpertSpec) -> admin_pb2.ExpertState:
        """Add or replace an expert; raises InvalidRequest, Exhausted."""
        spec = read_spec(message)
        self._table.put(spec)
        stored = spec_message(spec).SerializeToString()
        row = ExpertRow(name=spec.name, spec=stored, measured=self._table.measured(spec.name))
        self._registry.put_expert(row)
        await self._changed()
        return next(expert_message(each) for each in self.experts() if each.name == spec.name)

    async def remove(self, name: str) -> None:
        """Forget an expert; raises NotFound."""
        self._table.remove(name)
        self._registry.remove_expert(name)
        await self._changed()

    async def put_budget(self, message: admin_pb2.Budget) -> admin_pb2.Selection:
        """Set what a class may cost; the subset chosen for it. Raises InvalidRequest, Exhausted."""
        budget = read_budget(message, named=True)
        if budget.name not in self._budgets and len(self._budgets) >= CLASSES:
            raise Exhausted(f"{CLASSES} classes have budgets already: remove one (ganglion experts budget rm CLASS)")
        self._budgets[budget.name] = budget
        stored = budget_message(budget).SerializeToString()
        self._registry.put_budget(BudgetRow(name=budget.name, budget=stored))
        await self._changed()
        if budget.name not in self._choices:
            raise NotFound(f"class {budget.name} was removed meanwhile", param="class")
        return self._selection(self._budgets.get(budget.name, budget))

    async def remove_budget(self, name: str) -> None:
        """Forget a class; the class "default" goes back to no limits. Raises NotFound."""
        if name not in self._budgets:
            raise NotFound(f"no class {name[:80]!r}; there are: {', '.join(sorted(self._budgets))}", param="class")
        del self._budgets[name]
        self._choices.pop(name, None)
        self._budgets.setdefault(DEFAULT_CLASS, Budget())
        self._registry.remove_budget(name)
        await self._changed()

    async def select(self, message: admin_pb2.Budget) -> admin_pb2.Selection:
        """The subset for the budget of one request, kept until all are solved anew; raises InvalidRequest."""
        budget = read_budget(message, named=False)
        key = replace(budget, name="")
        if key not in self._asked:
            version = self._version
            choice = await asyncio.to_thread(choose, self.experts(), budget, self._profile)
            if version == self._version:
                while len(self._asked) >= KEPT_CHOICES:
                    self._asked.pop(next(iter(self._asked)))
                self._asked[key] = choice
            return selection_message(budget, choice, self._generation)
        return selection_message(budget, self._asked[key], self._generation)

    # What gateways measured

    async def report(self, message: admin_pb2.OutcomeReport) -> None:
        """Take outcomes, links and a gate's view; raises InvalidRequest, and takes nothing then."""
        check_report(message)
        profile = read_profile(message.profile) if message.HasField("profile") else None
        now_s, turned = self._clock(), False
        for each in message.outcomes:
            if each.failed:
                turned |= self._table.failed(each.expert, one_line(each.failed)[:40], one_line(each.why), now_s)
            else:
                tpot_s = each.tpot_s if each.tokens > 1 else 0.0
                turned |= self._table.answered(each.expert, each.ttft_s, tpot_s, now_s)
        for link in message.links:
            self._table.linked(link.expert, link.rtt_s)
        if profile is not None:
            self._profile = profile
            self._registry.put_quality_profile(message.profile.SerializeToString())
        if turned or profile is not None:
            await self._changed()
        else:
            self._roster.changes.mark()

    # What Watch shows

    def experts(self) -> list[Expert]:
        """Everyone now, by name."""
        return self._table.experts(self._present(), self._clock())

    def states(self) -> list[admin_pb2.ExpertState]:
        """The same for the wire."""
        return [expert_message(each) for each in self.experts()]

    def selections(self) -> list[admin_pb2.Selection]:
        """Of every class, by name."""
        return [self._selection(budget) for _, budget in sorted(self._budgets.items()) if budget.name in self._choices]

    def _selection(self, budget: Budget) -> admin_pb2.Selection:
        choice, generation = self._choices[budget.name]
        return selection_message(budget, choice, generation)

    # Solving

    async def run(self) -> None:
        """Keep the selections right until cancelled; what was measured is saved now and then, and at the end."""
        saved_s = self._clock()
        try:
            while True:
                version = self._roster.changes.version
                if self._table.tick(self._clock()):
                    self._version += 1
                try:
                    await self._refresh()
                except Exception as error:
                    log.error("choosing experts failed by a defect", exc_info=error)
                if self._clock() - saved_s > SAVE_S:
                    self._save()
                    saved_s = self._clock()
                # Not wait_for: of Python 3.11 it loses a cancellation that comes with the change.
                try:
                    async with asyncio.timeout(TICK_S):
                        await self._roster.changes.after(version)
                except TimeoutError:
                    continue
                await asyncio.sleep(COALESCE_S)
        finally:
            self._save()

    def _save(self) -> None:
        for name, measured in self._table.unsaved():
            self._registry.put_measured(name, measured)

    async def _changed(self) -> None:
        self._version += 1
        await self._refresh()

    async def _refresh(self) -> None:
        """Solve anew where something that matters changed since the last time."""
        async with self._solving:
            experts, version = self.experts(), self._version
            known_version, known = self._solved
            if version != known_version or {_who(each) for each in experts} != {_who(each) for each in known.values()}:
                steady = False
            elif time.monotonic() - self._solved_s >= SETTLE_S and any(_drifted(known[e.name], e) for e in experts):
                steady = True
            else:
                return
            self._asked.clear()
            for name, budget in sorted(self._budgets.items()):
                before = self._choices.get(name)
                serving = before[0].experts if steady and before is not None else None
                choice = await asyncio.to_thread(choose, experts, budget, self._profile, serving)
                if self._budgets.get(name) != budget:
                    continue  # it was changed meanwhile: that change waits for this search to end
                if before is None or before[0].experts != choice.experts or before[0].refused != choice.refused:
                    self._generation += 1
                    self._choices[name] = (choice, self._generation)
                    log.info("experts of class %s: %s", name, ", ".join(choice.experts) or choice.refused)
                else:
                    self._choices[name] = (choice, before[1])
            self._solved, self._solved_s = (version, {each.name: each for each in experts}), time.monotonic()
            self._roster.changes.mark()

    # Deployments as experts

    def _present(self) -> Mapping[str, Present]:
        wanted = self._table.served_models()
        return {
            each.model: self._present_one(each)
            for each in self._deployments.all()
            if each.drafting is None and each.model in wanted
        }

    def _present_one(self, each: Deployment) -> Present:
        machine, plan = each.machine, each.plan
        if machine.phase is not Phase.READY or plan is None:
            message = f": {machine.message}" if machine.message else ""
            return Present(deployment=each.deployment, why=f"{each.model} is {machine.phase.name.lower()}{message}")
        labels = [TrustLabel.of(self._registry.device(node_id).label).value for node_id in machine.devices]
        if each.manifest_digest not in self._tokenizers:
            self._tokenizers[each.manifest_digest] = tokenizer_digest(each.manifest).hex()
        return Present(
            deployment=each.deployment,
            why="",
            node_id=machine.devices[0],
            label=min(labels, key=LABELS.index),
            tokenizer_digest=self._tokenizers[each.manifest_digest],
            sessions=each.sessions,
            slots=plan.sessions,
            devices=len(machine.devices),
            ms_per_token=each.ms_per_token,
        )


def _who(expert: Expert) -> tuple[object, ...]:
    """What of an expert says whether it may be asked, for what."""
    return (expert.spec, expert.state, expert.label, expert.deployment, expert.tokenizer_digest)


def _drifted(before: Expert, now: Expert) -> bool:
    """Whether the time or the energy of an answer is DRIFT away from what it was."""

    def costs(each: Expert) -> tuple[float, float, float]:
        took = answer_time(each.figures, DEFAULT_TOKENS, each.queue, each.slots)
        return took.median_s, took.p95_s, each.figures.energy_j_per_token

    return any(max(was, new) > DRIFT * min(was, new) for was, new in zip(costs(before), costs(now), strict=True))
