"""Whom a request may be put to: the choice for its class or for a budget of its own, as far as text may go there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from ganglion.gateway.experts.admission import Admission, Admitted
from ganglion.gateway.experts.questions import Request, is_structured, tokens_of
from ganglion.gateway.experts.table import MODEL, Chosen, ExpertTable, class_of
from ganglion.proto import admin_pb2
from ganglion.wire.errors import GanglionError, InvalidRequest, PermissionDenied, Unavailable, Unsupported


class Selector(Protocol):
    """What is asked of the coordinator."""

    async def select(self, budget: admin_pb2.Budget) -> admin_pb2.Selection:
        """The subset of edge experts for a budget; raises errors of the tree."""
        ...


class Chooser:
    """Chooses by the table, by the coordinator where a request has a budget of its own, and by admission."""

    def __init__(self, selector: Selector, table: ExpertTable, admission: Admission) -> None:
        self._selector = selector
        self._table = table
        self._admission = admission

    async def choose(self, asked: Request) -> Chosen:
        """The choice for the request's class, asked of the coordinator where the request has a budget of its own."""
        name = class_of(asked.model) or ""
        field = asked.experts
        if field is not None and field.class_ is not None:
            if asked.model != MODEL and field.class_ != name:
                raise InvalidRequest(
                    f"experts.class is {field.class_!r} and the model {asked.model}; leave one of them out",
                    param="experts.class",
                )
            name = field.class_
        known = self._table.chosen(name)
        if field is None:
            return known
        changes: dict[str, Any] = {
            key: value
            for key in ("combine", "latency_s", "energy_j", "most")
            if (value := getattr(field, key)) is not None
        }
        if field.latency_s is not None or field.energy_j is not None:
            changes["tokens"] = tokens_of(asked, known.budget)  # they are of this request's answer
        # A request may ask for more privacy than its class, never for less.
        private = known.budget.private or bool(field.private)
        budget = replace(known.budget, **changes, private=private)
        if budget == known.budget:
            return known
        found = Chosen.of(await self._selector.select(budget.message()))
        # What was asked for holds, whatever was understood there.
        return Chosen(budget, found.experts, found.refused)

    def admit(self, asked: Request, chosen: Chosen) -> tuple[dict[str, Admitted], dict[str, str]]:
        """Those of the chosen experts that may be asked, and why others may not; raises what fits where none may."""
        private, structured = chosen.budget.private, is_structured(asked)
        admitted: dict[str, Admitted] = {}
        refused: dict[str, GanglionError] = {}
        for name in chosen.experts:
            try:
                admitted[name] = self._admission.admit(
                    self._table.get(name), name, private=private, structured=structured
                )
            except GanglionError as error:
                refused[name] = error
        dropped = {name: error.message for name, error in refused.items()}
        if not admitted:
            told = "; ".join(f"{name}: {error.message}" for name, error in refused.items())
            kinds = {type(error) for error in refused.values()}
            kind = next((one for one in (PermissionDenied, Unsupported) if kinds == {one}), Unavailable)
            raise kind(f"no expert of the class {chosen.budget.name} may be asked ({told})", param="experts")
        return admitted, dropped
