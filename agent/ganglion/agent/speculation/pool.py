"""The drafter of a device, shared by the answers that are being drafted: who guesses next, in which slots.

Answers take turns: a step takes guesses of all of them, each its part of STEP_NODES, beginning with another one each
time. Steps run on the event loop; between two steps it gets turns, so that outcomes are seen at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ganglion.agent.speculation.corrections import RANKS
from ganglion.agent.speculation.drafting import STEP_NODES, Drafting
from ganglion.agent.speculation.guesser import Guesser
from ganglion.agent.speculation.guessing import Ask
from ganglion.agent.speculation.slots import SlotTable
from ganglion.agent.speculation.tree import Node
from ganglion.wire.sampling.parameters import Sampling

log = logging.getLogger(__name__)

_TURNS: Final = 4  # of the event loop between two steps
_SEAT_SLOTS: Final = 4
_PROMPT_ROWS: Final = 64  # that a drafter runs at a time to catch up, beside the guesses of others
_CAUGHT_UP: Final = 16  # missing rows that a step runs at once


@dataclass(slots=True, eq=False)
class Seat:
    """One answer's place at the drafter. changed: called when there may be something to send."""

    drafting: Drafting
    slots: SlotTable
    sampling: Sampling
    prompt: int
    changed: Callable[[], None]


class DraftPool:
    """Drafts for several answers with one drafter, in a task of its own while there is any."""

    def __init__(self, guesser: Guesser) -> None:
        self._guesser = guesser
        self._free = list(range(guesser.slots))[::-1]
        self._seats: list[Seat] = []
        self._woken = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def join(self, drafting: Drafting, sampling: Sampling, prompt: int, changed: Callable[[], None]) -> Seat | None:
        """Take part, from the present tip on; None where every slot is another answer's only one."""
        if not self._free:
            most = max(self._seats, key=lambda seat: len(seat.slots.slots), default=None)
            given = most.slots.give_up() if most is not None else None
            if given is None:
                return None
            self._guesser.forget(given)
            self._free.append(given)
        seat = Seat(drafting, SlotTable([self._free.pop()], len(drafting.tree.tokens)), sampling, prompt, changed)
        self._seats.append(seat)
        self._share()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        self._woken.set()
        return seat

    def leave(self, seat: Seat) -> None:
        """The answer is over, or its verify session."""
        if seat not in self._seats:
            return
        self._seats.remove(seat)
        for slot in seat.slots.slots:
            self._guesser.forget(slot)
            self._free.append(slot)
        self._share()
        self._woken.set()

    def committed(self, seat: Seat, tokens: Sequence[int]) -> None:
        """An outcome moved its tip along `tokens`."""
        seat.slots.committed(tokens)
        self._woken.set()

    async def close(self) -> None:
        """End the task; answers go on without drafts."""
        for seat in list(self._seats):
            seat.drafting.stop_drafting()
            seat.changed()
            self.leave(seat)
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _share(self) -> None:
        """Give free slots to those with the fewest."""
        while self._free and self._seats:
            seat = min(self._seats, key=lambda seat: len(seat.slots.slots))
            if len(seat.slots.slots) >= _SEAT_SLOTS:
                return
            seat.slots.add(self._free.pop())

    async def _run(self) -> None:
        while self._seats:
            self._woken.clear()
            try:
                worked = self._step()
            except Exception:  # a drafter may fail in any way; answers must not
                log.exception("the drafter %s failed; answers go on without drafts", self._guesser.name)
                for seat in list(self._seats):
                    seat.drafting.stop_drafting()
                    seat.changed()
                    self.leave(seat)
                return
            if not worked:
                await self._woken.wait()
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    def _step(self) -> bool:
        """One step of the drafter; False: nobody wants a guess."""
        self._seats.append(self._seats.pop(0))
        asked: list[tuple[Seat, Node, Ask]] = []
        behind: list[tuple[Seat, Node, Ask]] = []
        each = max(1, STEP_NODES // len(self._seats))
        for seat in self._seats:
            for node, ask in self._asks(seat, each):
                missing = len(ask.tokens) - self._guesser.held(ask.slot, ask.tokens)
                (behind if missing > _CAUGHT_UP else asked).append((seat, node, ask))
        if behind:
            before = time.perf_counter()
            self._guesser.lead_in([behind[0][2]], _PROMPT_ROWS)
            log.debug("a prompt took %.3f s of the drafter", time.perf_counter() - before)
        if asked:
            self._guess(asked)
        return bool(asked or behind)

    def _asks(self, seat: Seat, each: int) -> list[tuple[Node, Ask]]:
        tree = seat.drafting.tree
        nodes = seat.drafting.wanted(min(each, len(seat.slots.slots)))
        paths = [tuple(tree.path_of(node)) for node in nodes]
        found = []
        for node, path, placed in zip(nodes, paths, seat.slots.place(paths), strict=True):
            if placed.source is not None:
                self._guesser.copy(placed.source, placed.slot, placed.tokens)
            ask = Ask(placed.slot, [*tree.tokens, *path], seat.sampling, RANKS, seat.prompt)
            found.append((node, ask))
        return found

    def _guess(self, asked: Sequence[tuple[Seat, Node, Ask]]) -> None:
        before = time.perf_counter()
        guesses = self._guesser.step([ask for _, _, ask in asked])
        took_s = time.perf_counter() - before
        for knowledge in {id(seat): seat.drafting.pilot.knowledge for seat, _, _ in asked}.values():
            if self._guesser.ran_rows:
                knowledge.drafts.measured(self._guesser.ran_rows, took_s)
        for (seat, node, _), guess in zip(asked, guesses, strict=True):
            seat.drafting.guessed(node, guess)
            seat.changed()
