"""The token loop: announces steps, runs the lead's own part, draws tokens, tells the sessions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Batch
from ganglion.agent.lead.candidates import Answer, Draw, VocabShare, from_message
from ganglion.agent.lead.sampler import Drawn, draw_token
from ganglion.agent.lead.scheduler import Entry, Scheduler, Step
from ganglion.agent.lead.session import Session, parse_open
from ganglion.agent.worker_beat import Beat, LongestRun
from ganglion.agent.worker_stage import StageRunner
from ganglion.proto import lane_pb2
from ganglion.wire.errors import Exhausted, GanglionError, Internal, ProtocolViolation
from ganglion.wire.frames import Expectation, Kind
from ganglion.wire.lane import Lane
from ganglion.wire.nouns import Manifest, Plan


@dataclass(slots=True)
class _Marks:
    """Readings of the meters at the beginning of a step."""

    wall: float
    compute_s: float
    exchange_s: float
    seal_s: float
    sample_s: float


class _Drawing:
    """An entry that draws, with what its shares are asked."""

    __slots__ = ("draw", "entry", "session")

    def __init__(self, session: Session, entry: Entry) -> None:
        sampling = session.request.sampling
        self.session = session
        self.entry = entry
        self.draw = Draw(sampling.candidates, sampling.temperature, sampling.seed, entry.start + entry.count)


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
        self._longest = LongestRun(runner.executor.weights_bytes)
        self._scheduler = Scheduler(chunk=plan.chunk, sessions=plan.sessions)
        self._sessions: dict[int, Session] = {}
        self._admitted: set[int] = set()
        self._numbers = 0
        self._sample_s = 0.0
        self._work = asyncio.Event()
        self._over: GanglionError | None = None

    # Sessions.

    async def serve(self, message: lane_pb2.Open) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """Events of one session; closing the generator cancels it on every device.

        Raises InvalidRequest, ContextExceeded, Exhausted (the queue is full), and what ended the session.
        """
        if self._over is not None:
            raise self._over
        request = parse_open(message, self._manifest, self._plan)
        self._numbers += 1
        session = Session(self._numbers, request)
        self._scheduler.open(session.number, len(request.prompt))
        self._sessions[session.number] = session
        self._work.set()
        try:
            accepted = lane_pb2.Accepted(numeric_class=self._manifest.numeric_class.name)
            yield lane_pb2.SessionEvent(accepted=accepted)
            async with contextlib.aclosing(session.events()) as events:
                async for event in events:
                    yield event
        finally:
            self._close(session)

    def _close(self, session: Session) -> None:
        """Free a session wherever it is; its key-value state goes with the next step."""
        session.ended = True
        self._admitted.discard(session.number)
        if self._sessions.pop(session.number, None) is not None:
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
            step = self._scheduler.next_step()
            if step is None:
                self._work.clear()
                await self._work.wait()
                continue
            await self._run_step(step)
            await asyncio.sleep(0)  # a device alone never waits: let sessions come, go and be told

    async def _run_step(self, step: Step) -> None:
        marks = self._marks()
        runner, executor = self._runner, self._runner.executor
        # A client may leave while a lane is waited for; its rows are run all the same, and its tokens dropped.
        running = {entry.session: self._sessions[entry.session] for entry in step.entries}
        self._admit(running, marks.wall)
        drawing = [_Drawing(running[entry.session], entry) for entry in step.entries if entry.draws]
        await self._announce(step, drawing)
        for number in step.closed:
            executor.close(number)
        if not step.entries:
            self._beat.end(executor.sessions, executor.kv_bytes)
            return
        batch = executor.begin([(entry.session, entry.start, entry.count) for entry in step.entries])
        self._beat.begin(self._longest.announce(step.rows), executor.sessions, executor.kv_bytes)
        ids = [running[one.session].ids[one.start : one.start + one.count] for one in step.entries]
        self._embedding.rows([token for some in ids for token in some], executor.residual(batch))
        await runner.forward(step.number, batch)
        drawn = await self._draw_all(step.number, batch, drawing) if drawing else []
        self._account(running, marks)
        for one, token in zip(drawing, drawn, strict=True):
            self._take(one.session, token)
        self._longest.finished(step.rows, time.perf_counter() - marks.wall)
        self._beat.end(executor.sessions, executor.kv_bytes)

    async def _announce(self, step: Step, drawing: Sequence[_Drawing]) -> None:
        if not self._lanes:
            return
        asked = {one.entry.session: one.draw for one in drawing}
        message = lane_pb2.Step(step=step.number, closed=step.closed)
        for entry in step.entries:
            announced = message.entries.add(session=entry.session, start=entry.start, count=entry.count)
            draw = asked.get(entry.session)
            if draw is not None:
                announced.draw.candidates = draw.candidates
                announced.draw.temperature = draw.temperature
                announced.draw.seed = draw.seed
                announced.draw.position = draw.position
        before = time.perf_counter()
        payload = message.SerializeToString()
        for lane in self._lanes.values():
            await lane.send_message(Kind.STEP, step.number, payload)
        self._runner.meter.exchange_s += time.perf_counter() - before

    # Draws.

    async def _draw_all(self, step: int, batch: Batch, drawing: Sequence[_Drawing]) -> list[Drawn | GanglionError]:
        firsts = {placed.session: placed.first + placed.count - 1 for placed in batch.entries}
        draws = [one.draw for one in drawing]
        computed = self._runner.meter.compute_s
        before = time.perf_counter()
        own = self._runner.answers(batch, [firsts[one.entry.session] for one in drawing], draws)
        self._sample_s += time.perf_counter() - before - (self._runner.meter.compute_s - computed)
        by_rank = {rank: own if rank == 0 else await self._replies(rank, step, 0, draws) for rank in self._vocab}
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
        session, draw, rounds = one.session, one.draw, 0
        while True:
            poor = next((rank for rank, reply in answers.items() if reply.numeric_error), None)
            if poor is not None:
                return Internal(
                    f"numeric_error: the logits of device {self._names[poor]} at token {draw.position} are not finite;"
                    " the weights or the numeric class overflow"
                )
            before = time.perf_counter()
            found = draw_token(
                list(answers.values()), list(self._vocab.values()), session.request.sampling, draw.position
            )
            self._sample_s += time.perf_counter() - before
            if isinstance(found, Drawn):
                return found
            rounds += 1
            draw = Draw(found.candidates, draw.temperature, draw.seed, draw.position)
            answers = await self._ask_again(step, rounds, index, draw)

    async def _ask_again(self, step: int, rounds: int, index: int, draw: Draw) -> dict[int, Answer]:
        more = lane_pb2.MoreCandidates(entry=index, candidates=draw.candidates).SerializeToString()
        for rank in self._vocab:
            if rank != 0:
                await self._lanes[rank].send_message(Kind.MORE, step, more, rounds)
        found = {}
        for rank in self._vocab:
            if rank == 0:
                found[rank] = self._runner.again(index, draw)
            else:
                found[rank] = (await self._replies(rank, step, rounds, [draw]))[0]
        return found

    def _take(self, session: Session, drawn: Drawn | GanglionError) -> None:
        if session.ended:
            return
        if isinstance(drawn, GanglionError):
            session.fail(drawn)
            self._close(session)
            return
        try:
            reason = session.add(drawn)
        except Exhausted as error:
            session.fail(error)
            self._close(session)
            return
        if reason is None:
            self._scheduler.drawn(session.number)
        else:
            session.finish(reason)
            self._close(session)

    # Times.

    def _marks(self) -> _Marks:
        meter = self._runner.meter
        sealing_s = sum(lane.sealing_s for lane in self._lanes.values())
        return _Marks(time.perf_counter(), meter.compute_s, meter.exchange_s, sealing_s, self._sample_s)

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
            else:
                spent.queue_s += now.wall - before.wall
