"""Several answers to one request: their sessions run side by side, and their parts come out as they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ganglion.gateway.generation import Part

Numbered = tuple[int, Part]  # the choice's index, and a part of its answer


async def interleave(answers: Sequence[AsyncGenerator[Part, None]]) -> AsyncGenerator[Numbered, None]:
    """The parts of every answer, each answer's in its order; raises the first error of any.

    Closing it, and an error, cancel all sessions; both wait until they are over. A part waits until it is taken, so a
    slow reader holds the sessions up as it would hold up one.
    """
    if len(answers) == 1:
        async with aclosing(answers[0]) as parts:
            async for part in parts:
                yield 0, part
        return
    made: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue(len(answers))
    tasks = [asyncio.create_task(_drive(index, parts, made)) for index, parts in enumerate(answers)]
    try:
        running = len(tasks)
        while running:
            item = await made.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drive(
    index: int, answer: AsyncGenerator[Part, None], made: asyncio.Queue[Numbered | BaseException | None]
) -> None:
    last: BaseException | None = None
    try:
        async with aclosing(answer):
            async for part in answer:
                await made.put((index, part))
    except Exception as error:  # noqa: BLE001  (raised again by whoever reads)
        last = error
    await made.put(last)
