"""The token loop: announces steps, runs the lead's own part, draws tokens, tells the sessions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from google.protobuf.message import DecodeError

from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Batch
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.lead.adjusting import NO_ADJUSTMENTS, Adjustments, VocabShare
from ganglion.agent.lead.candidates import Answer, from_message
from ganglion.agent.lead.draw import Draw, write_draw
from ganglion.agent.lead.grammar import Grammars
from ganglion.agent.lead.pace import Pace
from ganglion.agent.lead.prefix import PrefixCache, root_of
from ganglion.agent.lead.sampler import Drawn, draw_token
from ganglion.agent.lead.scheduler import Entry, Scheduler, Step
from ganglion.agent.lead.session import Session, parse_open
from ganglion.agent.roles import to_number
from ganglion.agent.worker_beat import Beat, LongestRun
from ganglion.agent.worker_stage import StageRunner
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError, Internal, ProtocolViolation
from ganglion.wire.frames import Expectation, Kind
from ganglion.wire.lane import Lane
from ganglion.wire.nouns import Manifest, Plan

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


class _Drawing:
    """An entry that draws, with what its shares are asked, by rank, and the adjustments that they are told now."""

    __slots__ = ("asked", "draws", "entry", "newer", "session")

    def __init__(self, session: Session, entry: Entry, vocab: Mapping[int, VocabShare]) -> None:
        sampling = session.request.sampling
        self.session = session
        self.entry = entry
        self.asked = Draw(
            sampling.candidates,
            sampling.temperature,
            sampling.seed,
            entry.start + entry.count,
            sampling.top_logprobs,
            sampling.mass,
        )
        self.draws = dict.fromkeys(vocab, self.asked)
        self.newer: dict[int, Adjustments] = {}
        if session.steering is not None:
            for rank, (adjusting, newer) in session.steering.ask(vocab).items():
                self.draws[rank] = replace(self.asked, adjusting=adjusting)
                self.newer[rank] = newer

    def write(self, rank: int | None, vocab: Mapping[int, VocabShare], into: lane_pb2.Draw) -> None:
        """What a device is asked; None: any, when nothing is adjusted."""
        if rank is None or rank not in vocab:
            write_draw(self.asked, NO_ADJUSTMENTS, None, into)
        else:
            write_draw(self.draws[rank], self.newer.get(rank, NO_ADJUSTMENTS), vocab[rank], into)


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
    ) -> None:
        """`names` by rank, for messages; `vocab`: the shares of the output matrix by rank, in order of token ids."""
        self._manifest = manifest
        self._plan = plan
        self._runner = runner
        self._embedding = embedding
        self._lanes = lanes
        self._names = names
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
        self._sample_s = 0.0
        self._work = asyncio.Event()
        self._over: GanglionError | None = None

    # Sessions.

    async def serve(self, message: lane_pb2.Open, gateway: str) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Events of one session of the gateway of this node id; closing the generator cancels it on every device.

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
        self._scheduler.open(session.number, len(request.prompt), client=root.hex())
        self._sessions[session.number] = session
        self._prefixes.open(session.number, root, len(request.prompt))
        self._work.set()
        try:
            accepted = lane_pb2.Accepted(numeric_class=self._manifest.numeric_class.name)
            yield lane_pb2.SessionEvent(accepted=accepted)
            async with contextlib.aclosing(session.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._close(session)

    def _begin(self, number: int) -> int:
        """A session is admitted: what it begins with of its tokens (some were drawn, if it was put back)."""
        session = self._sessions[number]
        found = self._prefixes.begin(number, session.ids)
        if len(session.ids) == len(session.request.prompt):
            session.cached_tokens = found
        return found

    def _ran(self, session: Session) -> None:
        """Keep what was run of a session for later ones."""
        self._prefixes.ran(session.number, session.ids, self._scheduler.held(session.number))

    def _close(self, session: Session) -> None:
        """Free a session wherever it is; its key-value state goes with the next step."""
        session.ended = True
        self._admitted.discard(session.number)
        if self._sessions.pop(session.number, None) is not None:
            self._ran(session)
            self._prefixes.close(session.number)
            self._scheduler.close(session.number)
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
            step = self._scheduler.next_step(self._pace.prompt_rows(self._plan.chunk))
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            await self._run_step(step)
            await self._let_tell()

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
        marks = self._marks()
        runner, executor = self._runner, self._runner.executor
        # A client may leave while a lane is waited for; its rows are run all the same, and its tokens dropped.
        running = {entry.session: self._sessions[entry.session] for entry in step.entries}
        self._admit(running, marks.wall)
        before = time.perf_counter()
        drawing = [_Drawing(running[entry.session], entry, self._vocab) for entry in step.entries if entry.draws]
        self._sample_s += time.perf_counter() - before
        keeps, begins = self._prefixes.take()
        await self._announce(step, keeps, begins, drawing)
        before = time.perf_counter()
        executor.prepare(keeps, (*step.closed, *step.put_back), begins)
        runner.meter.compute_s += time.perf_counter() - before
        if not step.entries:
            self._beat.end(executor.sessions, executor.kv_bytes)
            return
        batch = executor.begin([(entry.session, entry.start, entry.count) for entry in step.entries], step.role)
        self._beat.begin(self._longest.announce(step.rows), executor.sessions, executor.kv_bytes)
        ids = [running[one.session].ids[one.start : one.start + one.count] for one in step.entries]
        self._embedding.rows([token for some in ids for token in some], executor.residual(batch))
        await runner.forward(step.number, batch)
        drawn = await self._draw_all(step.number, batch, drawing) if drawing else []
        self._account(running, marks)
        for one, token in zip(drawing, drawn, strict=True):
            self._take(one.session, token)
        took_s = time.perf_counter() - marks.wall
        self._longest.finished(step.rows, took_s)
        self._pace.measured(step.decoding, step.rows - step.decoding, took_s)
        self._beat.end(executor.sessions, executor.kv_bytes)

    async def _announce(
        self, step: Step, keeps: Sequence[Keep], begins: Sequence[Begin], drawing: Sequence[_Drawing]
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
        same = None if any(one.newer for one in drawing) else _announcement(told, step, drawing, None, self._vocab)
        for rank, lane in self._lanes.items():
            payload = same or _announcement(told, step, drawing, rank, self._vocab)
            await lane.send_message(Kind.STEP, step.number, payload)
        self._runner.meter.exchange_s += time.perf_counter() - before

    # Draws.

    async def _draw_all(self, step: int, batch: Batch, drawing: Sequence[_Drawing]) -> list[Drawn | GanglionError]:
        firsts = {placed.session: placed.first + placed.count - 1 for placed in batch.entries}
        asked = {rank: [one.draws[rank] for one in drawing] for rank in self._vocab}
        computed = self._runner.meter.compute_s
        before = time.perf_counter()
        own = self._runner.answers(batch, [firsts[one.entry.session] for one in drawing], asked.get(0, ()))
        self._sample_s += time.perf_counter() - before - (self._runner.meter.compute_s - computed)
        by_rank = {
            rank: own if rank == 0 else await self._replies(rank, step, 0, draws) for rank, draws in asked.items()
        }
        return [
            await self._draw_one(step, index, one, {rank: answers[index] for rank, answers in by_rank.items()})
            for index, one in enumerate(drawing)
        ]

    async def _replies(self, rank: int, step: int, exchange: int, draws: Sequence[Draw]) -> list[Answer]:
        before = time.perf_counter()
        payload = await self._lanes[rank].receive(Expectation(Kind.CANDIDATES, step, exchange))
        self._runner.meter.exchange_s += time.perf_counter() - before
        try:
            entries = lane_pb2.CandidatesReply.FromString(payload).entries
        except DecodeError:
            raise ProtocolViolation(f"{self._names[rank]} sent candidates that do not parse") from None
        if len(entries) != len(draws):
            raise ProtocolViolation(f"{self._names[rank]} answered {len(entries)} of {len(draws)} draws")
        share = self._vocab[rank]
        return [from_message(message, share, draw) for message, draw in zip(entries, draws, strict=True)]

    async def _draw_one(
        self, step: int, index: int, one: _Drawing, answers: dict[int, Answer]
    ) -> Drawn | GanglionError:
        """Draw a token, asking for more candidates as long as they do not decide."""
        sampling, draws, rounds = one.session.request.sampling, one.draws, 0
        while True:
            poor = next((rank for rank, reply in answers.items() if reply.numeric_error), None)
            if poor is not None:
                return Internal(
                    f"numeric_error: the logits of device {self._names[poor]} at token {one.asked.position} are not"
                    " finite; the weights or the numeric class overflow"
                )
            before = time.perf_counter()
            found = draw_token(list(answers.values()), sampling, one.asked.position)
            self._sample_s += time.perf_counter() - before
            if isinstance(found, Drawn):
                return found
            rounds += 1
            draws = {rank: replace(draw, candidates=found.candidates) for rank, draw in draws.items()}
            answers = await self._ask_again(step, rounds, index, draws)

    async def _ask_again(self, step: int, rounds: int, index: int, draws: Mapping[int, Draw]) -> dict[int, Answer]:
        candidates = next(iter(draws.values())).candidates
        more = lane_pb2.MoreCandidates(entry=index, candidates=candidates).SerializeToString()
        for rank in self._vocab:
            if rank != 0:
                await self._lanes[rank].send_message(Kind.MORE, step, more, rounds)
        found = {}
        for rank in self._vocab:
            if rank == 0:
                found[rank] = self._runner.again(index, draws[rank])
            else:
                found[rank] = (await self._replies(rank, step, rounds, [draws[rank]]))[0]
        return found

    def _take(self, session: Session, drawn: Drawn | GanglionError) -> None:
        if session.ended:
            return
        if isinstance(drawn, GanglionError):
            self._prefixes.distrust(session.number)
            session.fail(drawn)
            self._close(session)
            return
        before = time.perf_counter()
        try:
            reason = session.add(drawn)
            session.spent.sample_s += time.perf_counter() - before  # of a grammar's next mask
        except GanglionError as error:
            session.fail(error)
            self._close(session)
            return
        if reason is None:
            self._ran(session)
            self._scheduler.drawn(session.number)
        else:
            session.finish(reason)
            self._close(session)

    # Times.

    def _marks(self) -> _Marks:
        meter = self._runner.meter
        lanes = self._lanes.values()
        sealing_s = sum(lane.sealing_s for lane in lanes)
        sent, received = sum(lane.sent_bytes for lane in lanes), sum(lane.received_bytes for lane in lanes)
        wall = time.perf_counter()
        return _Marks(wall, meter.compute_s, meter.exchange_s, sealing_s, self._sample_s, sent, received)

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


def _announcement(
    told: lane_pb2.Step, step: Step, drawing: Sequence[_Drawing], rank: int | None, vocab: Mapping[int, VocabShare]
) -> bytes:
    """`told` with the entries, as the device of `rank` hears it; None: every device, when no draw adjusts anything."""
    asked = {one.entry.session: one for one in drawing}
    del told.entries[:]
    for entry in step.entries:
        announced = told.entries.add(session=entry.session, start=entry.start, count=entry.count)
        draws = asked.get(entry.session)
        if draws is not None:
            draws.write(rank, vocab, announced.draw)
    return told.SerializeToString()
