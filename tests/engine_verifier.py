"""A verifier in this process: the real queue of drafts over a real model, one task a session, and faults on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from ganglion.agent.speculation.engine import Ask, DraftEngine
from ganglion.agent.speculation.queue import DraftQueue
from ganglion.proto import lane_pb2
from ganglion.wire.errors import DeviceLost, GanglionError, Internal, Unreachable
from ganglion.wire.prefixes import Prefix
from ganglion.wire.sampling.parameters import parse_sampling

NUMERIC_CLASS = "fp32-exact"


@dataclass(eq=False)
class EngineVerifier:
    """`lose_after`: passes of a session after which it is lost, once; `refuse`: what opening raises."""

    target: DraftEngine
    name: str = "tower"
    window: int = 4
    credits: int = 48
    turns: int = 3  # of the event loop that a pass takes: messages may come meanwhile
    own: DraftEngine | None = None
    lose_after: int | None = None
    refuse: GanglionError | None = None
    spoil: Callable[[lane_pb2.SessionEvent], None] = lambda event: None
    opened: list[lane_pb2.Open] = field(default_factory=list)
    streams: list[EngineStream] = field(default_factory=list)

    async def open(self, request: lane_pb2.Open) -> EngineStream:
        await asyncio.sleep(0)
        self.opened.append(request)
        if self.refuse is not None:
            raise self.refuse
        slot = next(slot for slot in range(self.target.slots) if slot not in {one.slot for one in self.running})
        stream = EngineStream(self, request, slot)
        self.streams.append(stream)
        return stream

    @property
    def running(self) -> list[EngineStream]:
        return [stream for stream in self.streams if not stream.task.done()]


class EngineStream:
    def __init__(self, verifier: EngineVerifier, request: lane_pb2.Open, slot: int) -> None:
        self.verifier, self.request, self.slot = verifier, request, slot
        tip = Prefix.of(request.prompt)
        own = verifier.own.name if verifier.own else ""
        terms = lane_pb2.Terms(window_tokens=verifier.window, credits=verifier.credits, drafter=own, prefix=tip.name)
        self.accepted = lane_pb2.Accepted(numeric_class=NUMERIC_CLASS, terms=terms)
        self.vocab = verifier.target.vocab
        self.queue = DraftQueue(tip, credits=verifier.credits, vocab=self.vocab)
        self.miss = request.contract.miss
        self.came = asyncio.Event()
        self.out: asyncio.Queue[lane_pb2.SessionEvent | GanglionError] = asyncio.Queue()
        self.messages: list[lane_pb2.Drafts] = []
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.out.put_nowait(Internal(repr(error)))

    async def send(self, drafts: lane_pb2.Drafts) -> None:
        await asyncio.sleep(0)
        self.messages.append(drafts)
        if self.task.done():
            return
        try:
            self.queue.add(drafts)
        except GanglionError as error:
            self.out.put_nowait(error)
            self.task.cancel()
        self.miss = drafts.miss or self.miss
        self.came.set()

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        while True:
            event = await self.out.get()
            if isinstance(event, GanglionError):
                raise event
            self.verifier.spoil(event)
            yield event
            if event.HasField("finished"):
                return

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _run(self) -> None:
        verifier, request = self.verifier, self.request
        ids, left, passes = list(request.prompt), request.max_tokens, 0
        sampling = parse_sampling(request.sampling, self.vocab)
        prompt = len(request.prompt) - request.answered

        def draw(engine: DraftEngine, text: list[int]) -> int:
            (guess,) = engine.step([Ask(self.slot, text, sampling, prompt=prompt)])
            return guess.tokens[0]

        while True:
            for _ in range(verifier.turns):
                await asyncio.sleep(0)
            window, own = self.queue.window(verifier.window) if passes else [], 0
            if passes and not window and self.miss == lane_pb2.MISS_WAIT:
                self.came.clear()
                await self.came.wait()
                continue
            if passes and self.miss == lane_pb2.MISS_DRAFT and verifier.own is not None:
                own = verifier.window - len(window)
                for _ in range(own):
                    window.append(draw(verifier.own, ids + window))
            tokens: list[int] = []
            reason = lane_pb2.FINISH_REASON_UNSPECIFIED
            for drafted in [*window, None]:
                token = draw(verifier.target, ids + tokens)
                if token in request.stop_ids:
                    reason = lane_pb2.FINISH_REASON_STOP
                    break
                tokens.append(token)
                left -= 1
                if left == 0:
                    reason = lane_pb2.FINISH_REASON_LENGTH
                if left == 0 or token != drafted:
                    break
            accepted = sum(one == other for one, other in zip(window, tokens, strict=False))
            ids += tokens
            passes += 1
            said = self.queue.commit(tokens)
            told = lane_pb2.Outcome(
                round=said.round,
                prefix=said.prefix,
                drafted=len(window),
                accepted=accepted,
                credits=said.credits,
                own=own,
                queued=said.queued,
                verify_s=0.002,
            )
            made = [lane_pb2.Token(id=token) for token in tokens]
            self.out.put_nowait(lane_pb2.SessionEvent(tokens=lane_pb2.Tokens(tokens=made, outcome=told)))
            if verifier.lose_after is not None and passes >= verifier.lose_after:
                verifier.lose_after = None
                self.out.put_nowait(DeviceLost("the tower fell"))
                return
            if reason:
                finished = lane_pb2.Finished(reason=reason, completion_tokens=request.max_tokens - left)
                self.out.put_nowait(lane_pb2.SessionEvent(finished=finished))
                return


def unreachable() -> Unreachable:
    return Unreachable("127.0.0.1:1 did not answer")
