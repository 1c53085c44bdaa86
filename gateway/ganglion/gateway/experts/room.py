"""Edge experts in a running gateway: which are there, whom a request is put to, and what becomes of their answers."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial

from ganglion.gateway.choices import Numbered, interleave
from ganglion.gateway.experts.admission import Admission
from ganglion.gateway.experts.asking import Asking
from ganglion.gateway.experts.call import Call
from ganglion.gateway.experts.choosing import Chooser, Selector
from ganglion.gateway.experts.deadlines import DUE, patience, within_s
from ganglion.gateway.experts.external import ServerClient
from ganglion.gateway.experts.gate import Gate
from ganglion.gateway.experts.mixing import Engine, blend, prepare_all
from ganglion.gateway.experts.outcomes import Answer, Outcome, OutcomeLog
from ganglion.gateway.experts.panel import Ask, Emit, Member, Panel, Stand
from ganglion.gateway.experts.parts import Over, Said, Taken
from ganglion.gateway.experts.parts import Part as Told
from ganglion.gateway.experts.questions import (
    Request,
    check,
    check_combining,
    for_model,
    for_server,
    text_of,
    tokens_of,
)
from ganglion.gateway.experts.reports import Reporter
from ganglion.gateway.experts.saturation import Tally
from ganglion.gateway.experts.scoring import ENOUGH, normalized, shares
from ganglion.gateway.experts.table import ExpertTable
from ganglion.gateway.generation import Began, Ended, Part, Sessions
from ganglion.gateway.parameters import ChatRequest
from ganglion.gateway.preparing import Prepared, Preparer
from ganglion.gateway.transcript import Delta
from ganglion.wire.errors import InvalidRequest, NotFound, Unsupported

Parts = Callable[[], AsyncGenerator[Numbered, None]]

_log = logging.getLogger(__name__)


class ExpertRoom:
    """The parts that requests to edge experts need, put together."""

    def __init__(
        self,
        *,
        selector: Selector,
        admission: Admission,
        clients: ServerClient,
        preparer: Preparer,
        sessions: Sessions,
        gate: Gate,
        reporter: Reporter,
        log: OutcomeLog,
        tally: Tally,
        table: ExpertTable,
        engine: Engine | None = None,
    ) -> None:
        self.table = table
        self._chooser = Chooser(selector, table, admission)
        self._clients = clients
        self._preparer = preparer
        self._sessions = sessions
        self._gate = gate
        self._reporter = reporter
        self._log = log
        self._tally = tally
        self._engine = engine
        self._under_way: Counter[str] = Counter()  # answers of servers, whose queues nobody else tells

    async def prepare(self, asked: Request, identifier: str, arrived_s: float, tenant: str) -> Parts:
        """Choose whom to ask; the answer is made when the result is called.

        Raises InvalidRequest for budgets that no subset meets, and for what cannot be combined.
        """
        if not self.table.experts:
            raise NotFound("this fleet has no edge experts; add one with: ganglion experts add", param="model")
        check(asked)
        chosen = await self._chooser.choose(asked)
        if not chosen.experts:
            raise InvalidRequest(chosen.refused, param="experts")
        budget = chosen.budget
        check_combining(asked, budget.combine)
        admitted, dropped = self._chooser.admit(asked, chosen)
        every = [expert.name for expert in self.table.experts]
        weighed = await asyncio.to_thread(self._gate.weigh, text_of(asked), every)
        if self._gate.experts:  # what an untrained one thinks of them tells nothing
            self._reporter.profile.add(weighed.quality, every)
        call = Call(
            asked,
            identifier,
            tenant,
            arrived_s,
            budget,
            tokens_of(asked, budget),
            secrets.randbits(63) if asked.seed is None else asked.seed,
            admitted,
            shares(weighed.weights, list(admitted)),
            weighed.quality,
            dropped,
        )
        if budget.combine != "blend":
            panel = self._panel(call)
            return lambda: interleave([self._answer(call, panel)])
        engine = self._engine
        if engine is None:
            raise Unsupported(
                "experts.combine blend is not supported by this gateway; use best", param="experts.combine"
            )
        prepared, apart = await prepare_all(call, self._ready)
        weights = shares(call.weights, list(prepared))
        return lambda: interleave([blend(call, engine, prepared, weights, apart)])

    # --- answers

    def _panel(self, call: Call) -> Panel:
        members = [
            Member(
                name,
                call.weights[name],
                call.quality[name],
                patience(one.expert, call.budget, call.tokens),
                one.expert.queue + self._under_way[name],
                foreign=one.server is not None,
            )
            for name, one in call.admitted.items()
        ]
        wanted = call.asked.experts.n if call.asked.experts is not None else None
        automatic = wanted == "auto"
        count: int | None = None
        if isinstance(wanted, int):
            count = wanted
        elif automatic:
            count = self._tally.curve(call.budget.name).saturation()
        if count is not None and count > len(members) and call.asked.temperature == 0:
            if not automatic:
                raise InvalidRequest(
                    f"experts.n is {count}, and at temperature 0 each of the {len(members)} experts that may be asked "
                    f"has one answer; ask for at most {len(members)}, or raise the temperature",
                    param="experts.n",
                )
            count = len(members)
        enough = ENOUGH if automatic else None
        return Panel(
            members,
            call.budget.combine,
            seed=call.seed,
            n=count,
            stream=call.asked.stream,
            due_s=call.arrived_s + DUE * within_s(call.budget, call.tokens),
            enough=enough,
        )

    async def _answer(self, call: Call, panel: Panel) -> AsyncGenerator[Part, None]:
        asking = Asking(panel, partial(self._source, call))
        began = False
        try:
            async with aclosing(asking.run()) as said:
                async for one in said:
                    if not began:
                        began = True
                        yield Began(asking.counted[one.attempt].numeric_class)
                    if isinstance(one, Emit):
                        yield Delta(one.text, ())
                    else:
                        await self._keep(call, panel)
                        yield self._end(call, panel, asking, one.reason)
        finally:
            self._reporter.add(panel.attempts, call.arrived_s, within_s(call.budget, call.tokens))

    def _end(self, call: Call, panel: Panel, asking: Asking, reason: str) -> Ended:
        usage: dict[str, dict[str, int]] = {}
        for one in panel.attempts:
            row = usage.setdefault(one.member.name, {"prompt_tokens": 0, "completion_tokens": 0})
            row["prompt_tokens"] += asking.counted[one.number].prompt_tokens
            row["completion_tokens"] += one.tokens
        return call.ended(
            reason,
            asked=panel.asked,
            answered_by=panel.kept.member.name if panel.kept is not None else None,
            dropped={name: fault.why for name, fault in panel.dropped.items()},
            usage=usage,
            count=len(panel.attempts),
        )

    async def _source(self, call: Call, ask: Ask) -> AsyncGenerator[Told, None]:
        admitted = call.admitted[ask.expert]
        if admitted.server is None:
            source: AsyncGenerator[Told, None] = self._ask_own(call, ask)
        else:
            question = for_server(call.asked, admitted.expert.model, ask.seed, call.tokens, scored=call.scored)
            source = self._clients.ask(admitted.server, question)
        foreign = admitted.server is not None
        self._under_way[ask.expert] += foreign
        try:
            async with aclosing(source) as parts:
                async for part in parts:
                    yield part
        finally:
            self._under_way[ask.expert] -= foreign

    async def _ask_own(self, call: Call, ask: Ask) -> AsyncGenerator[Told, None]:
        prepared = await self._ready(call, ask.expert, ask.seed)
        request = prepared.named(f"{call.identifier}-{ask.attempt}").requests[0]
        generate = self._sessions.generate(prepared.route, request, prepared.transcripts[0], call.arrived_s)
        async with aclosing(generate) as parts:
            async for part in parts:
                if isinstance(part, Began):
                    yield Taken(part.numeric_class, len(request.prompt))
                elif isinstance(part, Ended):
                    yield Over(part.reason, part.prompt_tokens, part.completion_tokens)
                else:
                    drawn = [placed.drawn.logprob for placed in part.tokens] if call.scored else []
                    logprobs = tuple(value for value in drawn if value is not None)
                    yield Said(part.text, len(part.ids), logprobs)

    async def _ready(self, call: Call, name: str, seed: int) -> Prepared:
        asked = for_model(call.asked, call.admitted[name].expert.model, seed, scored=call.scored)
        if isinstance(asked, ChatRequest):
            prepared = await self._preparer.chat(asked, call.tenant, call.budget.tokens)
        else:
            prepared = await self._preparer.completion(asked, call.tenant)
        if call.budget.private and not prepared.route.owned:  # planned anew since it was admitted
            raise Unsupported(f"the request is private, and devices not labelled owner compute for {name} now")
        return prepared

    # --- what is learned

    async def _keep(self, call: Call, panel: Panel) -> None:
        """Count which answer said it first; log the outcome where that is consented to."""
        answers, kept = panel.answers, panel.kept
        if kept is None or kept.stand is not Stand.ENDED:
            return
        wanted = normalized(kept.text)
        said = [normalized(one.text) == wanted for one in answers]
        if call.asked.experts is not None and call.asked.experts.n is not None:
            self._tally.add(call.budget.name, said.index(True) + 1, len(answers))
        if call.budget.private:
            return
        outcome = Outcome(
            time=time.time(),
            request_class=call.budget.name,
            combine=call.budget.combine,
            prompt=text_of(call.asked),
            answers=tuple(Answer(one.member.name, one.text, one.score, one.mean_logprob) for one in answers),
            chosen=next(at for at, one in enumerate(answers) if one is kept),
        )
        try:
            await asyncio.to_thread(self._log.write, outcome)
        except OSError as error:
            _log.warning("an outcome was not logged: %s", error.strerror)
