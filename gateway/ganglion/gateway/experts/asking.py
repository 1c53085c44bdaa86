"""The driver of a panel: its attempts run side by side, what they say goes in, and what it decides is done."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from ganglion.gateway.experts.panel import NONSENSE, Ask, Cancel, Command, Emit, Fail, Fault, Finish, Panel
from ganglion.gateway.experts.parts import Over, Part, Said, Taken
from ganglion.gateway.experts.replies import NonsenseError
from ganglion.gateway.failures import known
from ganglion.wire.errors import (
    ContextExceeded,
    ErrorBody,
    GanglionError,
    InvalidDocument,
    InvalidRequest,
    ProtocolViolation,
    Unavailable,
    Unsupported,
    from_body,
)

WAITING: Final = 64  # parts of all answers, until the panel takes them
REQUESTS_OWN: Final = frozenset({one.code for one in (InvalidRequest, InvalidDocument, ContextExceeded, Unsupported)})

Source = Callable[[Ask], AsyncGenerator[Part, None]]
_Item = tuple[int, Part | Fault]


@dataclass
class Counted:
    """Of one attempt. numeric_class: what its tokens depend on."""

    numeric_class: str = ""
    prompt_tokens: int = 0


class Asking:
    """One request to several experts. source: an expert's answer; closing it cancels."""

    def __init__(self, panel: Panel, source: Source, clock: Callable[[], float] = time.monotonic) -> None:
        self._panel = panel
        self._source = source
        self._clock = clock
        self._made: asyncio.Queue[_Item] = asyncio.Queue(WAITING)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.counted: dict[int, Counted] = {}

    async def run(self) -> AsyncGenerator[Emit | Finish, None]:
        """Text, then the end; raises what `failure` makes of a panel without an answer. Closing it cancels everyone."""
        panel = self._panel
        commands: deque[Command] = deque(panel.start(self._clock()))
        try:
            while True:
                while commands:
                    match commands.popleft():
                        case Ask() as ask:
                            self.counted[ask.attempt] = Counted()
                            self._tasks[ask.attempt] = asyncio.create_task(self._follow(ask))
                        case Cancel(attempt):
                            self._tasks[attempt].cancel()
                        case Emit() | Finish() as said:
                            yield said
                        case Fail(faults):
                            raise failure(panel, faults)
                if panel.over:
                    return
                commands.extend(await self._next())
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _next(self) -> list[Command]:
        wake_s = self._panel.wake_s
        now_s = self._clock()
        if now_s >= wake_s:
            return self._panel.clock(now_s)
        try:
            async with asyncio.timeout(None if math.isinf(wake_s) else wake_s - now_s):
                attempt, item = await self._made.get()
        except TimeoutError:
            return self._panel.clock(self._clock())
        now_s = self._clock()
        match item:
            case Taken(numeric_class, prompt_tokens):
                self.counted[attempt] = Counted(numeric_class, prompt_tokens)
                return []
            case Said(text, tokens, logprobs):
                return self._panel.said(attempt, text, tokens, logprobs, now_s)
            case Over(reason, prompt_tokens, completion_tokens):
                self.counted[attempt].prompt_tokens = prompt_tokens
                return self._panel.ended(attempt, reason, completion_tokens, now_s)
            case Fault():
                return self._panel.failed(attempt, item, now_s)

    async def _follow(self, ask: Ask) -> None:
        fault = Fault(Unavailable.code, "it ended its answer in the middle")
        try:
            async with aclosing(self._source(ask)) as parts:
                async for part in parts:
                    await self._made.put((ask.attempt, part))
                    if isinstance(part, Over):
                        return
        except NonsenseError as error:
            fault = Fault(NONSENSE, str(error))
        except Exception as error:  # noqa: BLE001  (of the tree or made Internal by `known`)
            found = known(error)
            fault = Fault(found.code, found.message)
        await self._made.put((ask.attempt, fault))


def failure(panel: Panel, faults: tuple[Fault, ...]) -> GanglionError:
    """Of a request that nobody answers: its own fault where all say so, else the experts', with reasons."""
    codes = {fault.code for fault in faults}
    if faults and codes <= REQUESTS_OWN:
        return from_body(ErrorBody(faults[0].code, faults[0].why))
    told = "; ".join(f"{name}: {fault.why}" for name, fault in panel.dropped.items())
    message = f"no expert answered ({told})"
    return ProtocolViolation(message) if codes == {NONSENSE} else Unavailable(message)
