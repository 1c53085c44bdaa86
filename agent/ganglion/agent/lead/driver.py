"""The token loop: announces steps, runs the lead's own part, draws tokens, tells the sessions."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.kv import Take
from ganglion.agent.executor.port import StepBatch
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.lead.choosing import Choosing
from ganglion.agent.lead.drawing import Drawer, EntryDraws, Walk
from ganglion.agent.lead.grammar import Grammars
from ganglion.agent.lead.pace import Pace
from ganglion.agent.lead.prefix import PrefixCache, root_of
from ganglion.agent.lead.sampler import Drawn
from ganglion.agent.lead.scheduler import Entry, Scheduler, Step
from ganglion.agent.lead.session import Session, parse_open
from ganglion.agent.lead.speculating import Speculating
from ganglion.agent.roles import to_number
from ganglion.agent.speculation.drafters import Drafter
from ganglion.agent.worker_beat import Beat, LongestRun
from ganglion.agent.worker_stage import StageRunner
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError
from ganglion.wire.frames import Kind
from ganglion.wire.lane import Lane
from ganglion.wire.limits import WINDOW_TOKENS
from ganglion.wire.nouns import Manifest, Plan
from ganglion.wire.sampling.adjusting import VocabShare
from ganglion.wire.session_serving import Said

TELLING_TURNS: Final = 4  # of the event loop between two steps, while a token waits to be sent


@dataclass(slots=True)
class _Marks:
    """Readings of the meters at the beginning of a step."""

    wall: float
    compute_s: float
    exchange_s: float
    seal_s: float
    sample_s: float
    sent_bytes: int
    received_bytes: int


class Lead:
    """Runs the sessions of one deployment. `lanes` by rank: one to every other device of the plan."""

    def __init__(
        self,
        manifest: Manifest,
        plan: Plan,
        runner: StageRunner,
        *,
        embedding: EmbeddingTable,
        lanes: Mapping[int, Lane],
        names: Sequence[str],
        vocab: Mapping[int, VocabShare],
        beat: Beat,
        grammars: Grammars,
        drafter: Drafter | None = None,
    ) -> None:
        """`names` by rank, for messages; `vocab`: the shares of the output matrix by rank, in order of token ids."""
        self._manifest = manifest
        self._plan = plan
        self._runner = runner
        self._embedding = embedding
        self._lanes = lanes
        self._vocab = vocab
        self._beat = beat
        self._grammars = grammars
        self._longest = LongestRun(runner.executor.weights_bytes)
        mixed = bool(manifest.numeric_class.prompt)
        self._scheduler = Scheduler(
            chunk=plan.chunk, sessions=plan.sessions, kv_tokens=plan.kv_tokens, mixed=mixed, begin=self._begin
        )
        self._pace = Pace(mixed=mixed)
        self._prefixes = PrefixCache(plan.prefix_tokens, by_role=mixed)
        self._sessions: dict[int, Session] = {}
        self._admitted: set[int] = set()
        self._numbers = 0
        self._last_step = 0
        self._drawer = Drawer(runner, lanes, names, vocab)
        self._speculating = Speculating(
            drafter, window_tokens=min(WINDOW_TOKENS, plan.chunk - 1), clock=time.perf_counter
        )
        self._choosing = Choosing(manifest.geometry.vocab)
        self._work = asyncio.Event()
        self._over: GanglionError | None = None

    @property
    def violations(self) -> Mapping[str, int]:
        """Drafting sessions that were cut off, by reason."""
        return self._speculating.violations

    # Sessions.

    async def serve(
        self, message: lane_pb2.Open, gateway: str, said: Said
    ) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Events of one session of the node of this id; closing the generator cancels it on every device.

        Raises InvalidRequest, ContextExceeded, Exhausted (the queue is full), what `Grammars.compile` raises, and what
        ended the session.
        """
        if self._over is not None:
            raise self._over
        request = parse_open(message, self._manifest, self._plan)
        constraint = None
        if request.grammar:
            constraint = await self._grammars.compile(request.grammar)
            if self._over is not None:
                raise self._over
        self._numbers += 1
        session = Session(self._numbers, request, constraint)
        root = root_of(gateway.encode(), request.tenant.encode())
        self._scheduler.open(session.number, request.asked_tokens, client=root.hex(), answered=request.answered)
        self._sessions[session.number] = session
        self._prefixes.open(session.number, root, request.asked_tokens)
        terms, vocab = None, 0
        if request.choosing is not None:
            self._choosing.open(session)
            vocab = self._manifest.geometry.vocab
            said.on_choice = functools.partial(self._take_choice, session)
        else:
            terms = self._speculating.open(session)
        if terms is not None:
            said.on_drafts = functools.partial(self._take_drafts, session.number)
        self._work.set()
        try:
            accepted = lane_pb2.Accepted(numeric_class=self._runner.executor.class_name, terms=terms, vocab=vocab)
            yield lane_pb2.SessionEvent(accepted=accepted)
            async with contextlib.aclosing(session.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._close(session)

    def _take_drafts(self, number: int, drafts: lane_pb2.Drafts) -> None:
        if number in self._sessions:
            self._speculating.drafts(number, drafts)
            self._work.set()

    def _take_choice(self, session: Session, said: lane_pb2.Choose | lane_pb2.Ask) -> None:
        if session.ended:
            return
        try:
            chosen = self._choosing.heard(session.number, said)
        except GanglionError as error:
            session.fail(error)
        else:
            if chosen and not session.ended:
                self._scheduler.chosen(session.number, chosen)
        self._work.set()

    def _begin(self, number: int) -> int:
        """A session is admitted: what it begins with of its tokens (some were drawn, if it was put back)."""
        session = self._sessions[number]
        found = self._prefixes.begin(number, session.ids)
        if len(session.ids) == len(session.request.prompt):
            session.cached_tokens = found
        return found

    def _ran(self, session: Session) -> None:
        """Keep what was run of a session for later ones: not the rows of drafts that are still to be drawn."""
        held = min(self._scheduler.held(session.number), len(session.ids))
        self._prefixes.ran(session.number, session.ids, held)

    def _close(self, session: Session) -> None:
        """Free a session wherever it is; its key-value state goes with the next step."""
        session.ended = True
        self._admitted.discard(session.number)
        if self._sessions.pop(session.number, None) is not None:
            self._ran(session)
            self._prefixes.close(session.number)
            self._scheduler.close(session.number)
            self._speculating.close(session.number)
            self._choosing.close(session.number)
            self._work.set()

    def end(self, error: GanglionError) -> None:
        """The epoch is over: every session fails with `error` now, and so does every later one."""
        self._over = error
        for session in list(self._sessions.values()):
            session.fail(error)

    # Steps.

    async def run(self) -> None:
        """Run steps until a lane ends; raises what lanes raise."""
        while True:
            while self._choosing.asked:
                await self._choosing.answer(self._kept)
            self._choose_windows()
            step = self._scheduler.next_step(self._pace.prompt_rows(self._plan.chunk))
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            await self._run_step(step)
            await self._let_tell()

    async def _kept(self, number: int, ids: NDArray[np.uint32] | None) -> NDArray[np.float32]:
        return await self._drawer.kept(self._last_step, number, ids)

    def _choose_windows(self) -> None:
        if self._speculating.active:
            before = time.perf_counter()
            ready = [self._sessions[number] for number in self._scheduler.decoding()]
            for number, (window, branches) in self._speculating.choose(ready).items():
                beside = [(branch.at, len(branch.tokens)) for branch in branches]
                self._scheduler.window(number, None if window is None else len(window), beside)
            took_s = time.perf_counter() - before
            for number in self._admitted:
                self._sessions[number].spent.draft_s += took_s

    async def _let_tell(self) -> None:
        """Let sessions come, go and be told, which a device alone never waits for.

        A session's stream takes a few turns of the loop: to hear that the token before was sent, then to send this one.
        Without them a token would leave one step late.
        """
        for _ in range(TELLING_TURNS):
            await asyncio.sleep(0)
            if not any(session.untold for session in self._sessions.values()):
                return

    async def _run_step(self, step: Step) -> None:
        marks, self._last_step = self._marks(), step.number
        runner, executor = self._runner, self._runner.executor
        # A client may leave while a lane is waited for; its rows are run all the same, and its tokens dropped.
        running = {one.session: self._sessions[one.session] for one in step.entries if one.branch is None}
        self._admit(running, marks.wall)
        drawing = self._drawer.asked(step.entries, running, self._speculating.drafted)
        keeps, begins = self._prefixes.take()
        await self._announce(step, keeps, begins, drawing)
        before = time.perf_counter()
        runner.drop(step.closed)
        executor.prepare(keeps, (*step.closed, *step.put_back), begins)
        runner.meter.compute_s += time.perf_counter() - before
        if not step.entries:
            self._beat.end(executor.sessions, executor.kv_bytes)
            return
        takes = {one.session: Take(one.take_from, one.take_first) for one in step.entries if one.take_from is not None}
        batch = executor.begin([(one.session, one.start, one.count) for one in step.entries], step.role, takes)
        self._beat.begin(self._longest.announce(step.rows), executor.sessions, executor.kv_bytes)
        asked = {one.entry.session: one for one in drawing}
        ids = [token for one in step.entries for token in _ids(one, running, asked.get(one.session))]
        self._embedding.rows(ids, executor.residual(batch))
        await self._forward(step.number, batch, self._drawer.places(batch, drawing))
        walks = await self._drawer.draw(step.number, drawing) if drawing else []
        self._account(running, marks)
        took_s = time.perf_counter() - marks.wall
        for one, walk in zip((one for one in drawing if one.entry.branch is None), walks, strict=True):
            self._take(one, walk, took_s)
        self._longest.finished(step.rows, took_s)
        self._pace.measured(step.decoding, step.prompt_rows, took_s)
        if not step.prompt_rows:
            self._speculating.measured(step.rows, len(step.entries) - len(running), took_s)
        self._beat.end(executor.sessions, executor.kv_bytes)

    async def _forward(self, step: int, batch: StepBatch, rows: Sequence[int]) -> None:
        """Run a step and the head on `rows`.

        Drafts that arrive while it computes can be the next window only if they are heard meanwhile. Among several
        devices the loop has its turns whenever a lane is waited for; alone, the step is run beside it.
        """
        runner = self._runner
        if runner.alone and self._speculating.listens:
            await asyncio.to_thread(runner.run_alone, batch, rows)
        else:
            await runner.forward(step, batch)
            runner.head(batch, rows)

    async def _announce(
        self, step: Step, keeps: Sequence[Keep], begins: Sequence[Begin], drawing: Sequence[EntryDraws]
    ) -> None:
        if not self._lanes:
            return
        before = time.perf_counter()
        told = lane_pb2.Step(
            step=step.number,
            closed=step.closed,
            put_back=step.put_back,
            role=to_number(step.role),
            keeps=[lane_pb2.KeepBlocks(session=one.session, first=one.first, blocks=one.blocks) for one in keeps],
            begins=[
                lane_pb2.BeginWithBlocks(session=one.session, blocks=one.blocks, prompt_tokens=one.prompt_tokens)
                for one in begins
            ],
        )
        same = None if any(one.adjusts for one in drawing) else _announcement(told, step, drawing, None, self._vocab)
        for rank, lane in self._lanes.items():
            payload = same or _announcement(told, step, drawing, rank, self._vocab)
            await lane.send_message(Kind.STEP, step.number, payload)
        self._runner.meter.exchange_s += time.perf_counter() - before

    # Tokens.

    def _take(self, one: EntryDraws, walk: Walk, took_s: float) -> None:
        """Give a session what its rows drew."""
        session, drawn, branch = one.session, walk.drawn, walk.branch
        if session.ended:
            return
        if session.number in self._choosing:
            self._tell(session, drawn[0])
            return
        before, known = time.perf_counter(), len(session.ids)
        failed: GanglionError | None = None
        reason: lane_pb2.FinishReason | None = None
        taken = 0
        while failed is None and reason is None and taken < len(drawn):
            token = drawn[taken]
            taken += 1
            try:
                reason = session.add(token) if isinstance(token, Drawn) else None
            except GanglionError as error:
                failed = error
            if isinstance(token, GanglionError):
                self._prefixes.distrust(session.number)
                failed = token
        session.spent.sample_s += time.perf_counter() - before  # of a grammar's next masks
        number = branch.branch if branch is not None else None
        self._speculating.passed(session, one.window, session.ids[known:], took_s, branch=number)
        self._scheduler.drawn(session.number, taken, branch.session if branch is not None else None)
        if failed is not None:
            session.fail(failed)
            self._close(session)
        elif reason is not None:
            session.finish(reason)
            self._close(session)
        else:
            self._ran(session)

    def _tell(self, session: Session, drawn: Drawn | lane_pb2.Scored | GanglionError) -> None:
        """Give a session whose client chooses the distribution after its last row."""
        if isinstance(drawn, GanglionError):
            self._prefixes.distrust(session.number)
            session.fail(drawn)
            self._close(session)
            return
        if isinstance(drawn, lane_pb2.Scored) and self._choosing.awaits(session.number, drawn.position):
            self._choosing.tell(session.number, drawn)
        self._ran(session)

    # Times.

    def _marks(self) -> _Marks:
        meter = self._runner.meter
        lanes = self._lanes.values()
        sealing_s = sum(lane.sealing_s for lane in lanes)
        sent, received = sum(lane.sent_bytes for lane in lanes), sum(lane.received_bytes for lane in lanes)
        wall = time.perf_counter()
        return _Marks(wall, meter.compute_s, meter.exchange_s, sealing_s, self._drawer.sample_s, sent, received)

    def _admit(self, running: Mapping[int, Session], now: float) -> None:
        for number, session in running.items():
            if number not in self._admitted:
                self._admitted.add(number)
                session.waited(now)

    def _account(self, running: Mapping[int, Session], before: _Marks) -> None:
        """Charge the step's time to the sessions in it; to those that were admitted and left out it was the queue."""
        now = self._marks()
        seal_s = now.seal_s - before.seal_s
        for number in self._admitted:
            spent = self._sessions[number].spent
            if number in running:
                spent.compute_s += now.compute_s - before.compute_s
                spent.exchange_s += max(0.0, now.exchange_s - before.exchange_s - seal_s)
                spent.seal_s += seal_s
                spent.sample_s += now.sample_s - before.sample_s
                spent.sent_bytes += now.sent_bytes - before.sent_bytes
                spent.received_bytes += now.received_bytes - before.received_bytes
            else:
                spent.queue_s += now.wall - before.wall


def _ids(entry: Entry, running: Mapping[int, Session], draws: EntryDraws | None) -> Sequence[int]:
    """The tokens that an entry's rows run."""
    if draws is None:
        return running[entry.session].ids[entry.start :][: entry.count]
    if draws.first_token is not None:
        return draws.first_token, *draws.window
    return (*draws.session.ids[entry.start :], *draws.window)[: entry.count]


def _announcement(
    told: lane_pb2.Step, step: Step, drawing: Sequence[EntryDraws], rank: int | None, vocab: Mapping[int, VocabShare]
) -> bytes:
    """`told` with the entries, as the device of `rank` hears it; None: every device, when no draw adjusts anything."""
    asked = {one.entry.session: one for one in drawing}
    del told.entries[:]
    for entry in step.entries:
        announced = told.entries.add(session=entry.session, start=entry.start, count=entry.count)
        if entry.take_from is not None:
            announced.take_from, announced.take_first = entry.take_from, entry.take_first
        draws = asked.get(entry.session)
        if draws is not None:
            draws.write(rank, vocab, announced)
    return told.SerializeToString()
