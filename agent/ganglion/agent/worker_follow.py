"""What a worker that does not lead does: wait for a step, run it, answer draws."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError

from ganglion.agent.executor.kv import Take
from ganglion.agent.executor.port import StepBatch, StepExecutor
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.lead.candidates import to_message
from ganglion.agent.lead.draw import Draw, read_draw
from ganglion.agent.roles import read_role
from ganglion.agent.worker_beat import Beat, LongestRun
from ganglion.agent.worker_stage import StageRunner
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.frames import Kind
from ganglion.wire.lane import Lane, Message
from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjustments


class Follower:
    """Follows the lead's steps over `lane`."""

    def __init__(self, runner: StageRunner, lane: Lane, beat: Beat) -> None:
        self._runner = runner
        self._lane = lane
        self._beat = beat
        self._longest = LongestRun(runner.executor.weights_bytes)
        self._step = 0
        self._draws: list[Draw] = []
        self._adjustments: dict[int, Adjustments] = {}  # by session, of this device's share of the vocabulary

    async def run(self) -> None:
        """Follow until a lane ends; raises what lanes raise, and ProtocolViolation for a step that cannot be."""
        while True:
            message = await self._lane.receive_any((Kind.STEP, Kind.MORE))
            if message.kind is Kind.STEP:
                await self._run_step(message)
            else:
                await self._answer_more(message)
            await asyncio.sleep(0)  # a lane that is quick never waits by the loop: let it see to everything else

    async def _run_step(self, message: Message) -> None:
        step = read_step(message, self._step + 1)
        self._step = step.step
        executor = self._runner.executor
        batch = begin_step(executor, step)
        for session in step.closed:
            self._adjustments.pop(session, None)
        self._runner.drop(step.closed)
        if any(len(entry.draws) > entry.count for entry in step.entries):
            raise ProtocolViolation(f"step {step.step}: an entry draws from more rows than it has")
        self._draws = [self._draw(entry.session, draw) for entry in step.entries for draw in entry.draws]
        if batch is None:
            self._beat.end(executor.sessions, executor.kv_bytes)
            return
        rows = batch.rows
        self._beat.begin(self._longest.announce(rows), executor.sessions, executor.kv_bytes)
        began = time.perf_counter()
        await self._runner.forward(step.step, batch)
        if self._runner.vocab is not None and self._draws:
            drawing = [
                placed.first + placed.count - draws + row
                for placed, draws in zip(batch.entries, (len(entry.draws) for entry in step.entries), strict=True)
                for row in range(draws)
            ]
            self._runner.head(batch, drawing)
            asking = [entry.session for entry in step.entries for _ in entry.draws]
            for number, (session, draw) in enumerate(zip(asking, self._draws, strict=True)):
                if draw.keep:
                    self._runner.keep(number, session)
            answers = [to_message(self._runner.answer(*pair), pair[1]) for pair in enumerate(self._draws)]
            reply = lane_pb2.CandidatesReply(entries=answers)
            await self._lane.send_message(Kind.CANDIDATES, step.step, reply.SerializeToString())
        self._longest.finished(rows, time.perf_counter() - began)
        self._beat.end(executor.sessions, executor.kv_bytes)

    async def _answer_more(self, message: Message) -> None:
        more = _parse(lane_pb2.MoreCandidates, message.payload)
        if more.session:
            ids = np.array(more.ids, np.uint32) if more.ids else None
            kept = lane_pb2.Candidates(logits=self._runner.kept(more.session, ids).tolist())
            payload = lane_pb2.CandidatesReply(entries=[kept]).SerializeToString()
            await self._lane.send_message(Kind.CANDIDATES, message.step, payload)
            return
        if message.step != self._step or more.entry >= len(self._draws):
            raise ProtocolViolation(f"more candidates for draw {more.entry} of step {message.step} were asked for")
        draw = replace(self._draws[more.entry], candidates=more.candidates)
        reply = lane_pb2.CandidatesReply(entries=[to_message(self._runner.answer(more.entry, draw), draw)])
        await self._lane.send_message(Kind.CANDIDATES, message.step, reply.SerializeToString(), message.exchange)

    def _draw(self, session: int, message: lane_pb2.Draw) -> Draw:
        """What a row asks, with the adjustments that its session was told before."""
        held = self._adjustments.get(session, NO_ADJUSTMENTS)
        draw = read_draw(message, self._runner.vocab, held)
        if draw.adjusting is not None:
            self._adjustments[session] = draw.adjusting.adjustments
        return draw


def read_step(message: Message, expected: int) -> lane_pb2.Step:
    """The step of a message; raises ProtocolViolation unless it is the expected one."""
    step = _parse(lane_pb2.Step, message.payload)
    if not step.step == message.step == expected:
        raise ProtocolViolation(f"step {step.step} in a frame of step {message.step}, expected {expected}")
    return step


def begin_step(executor: StepExecutor, step: lane_pb2.Step) -> StepBatch | None:
    """Do to sessions what a step says, and begin its rows; None where it has none.

    Raises what `prepare` and `begin` of an executor raise.
    """
    keeps = [Keep(one.session, one.first, tuple(one.blocks)) for one in step.keeps]
    begins = [Begin(one.session, tuple(one.blocks), one.prompt_tokens) for one in step.begins]
    executor.prepare(keeps, (*step.closed, *step.put_back), begins)
    if not any(entry.count for entry in step.entries):
        return None
    takes = {one.session: Take(one.take_from, one.take_first) for one in step.entries if one.take_from}
    entries = [(entry.session, entry.start, entry.count) for entry in step.entries]
    return executor.begin(entries, read_role(step.role), takes)


M = TypeVar("M", lane_pb2.Step, lane_pb2.MoreCandidates)


def _parse(kind: type[M], payload: bytes) -> M:
    try:
        return kind.FromString(payload)
    except DecodeError:
        raise ProtocolViolation(f"a {kind.__name__} that does not parse") from None
