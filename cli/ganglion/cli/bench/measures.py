"""What is measured of one deployment, a round at a time; everything goes over HTTP as a user's request does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ganglion.cli.bench.asking import Asker, Prompts, Timed, ended
from ganglion.cli.bench.energy import Meter
from ganglion.cli.bench.figures import gaps
from ganglion.wire.errors import InvalidRequest

MEASURES: Final = ("decode", "prefill", "concurrent", "arrivals", "second-turn", "memory")
SHARED: Final = ("decode", "prefill")  # what competitors are measured by too
# By the lead.
PARTS: Final = ("queue_s", "compute_s", "exchange_s", "seal_s", "sample_s", "draft_s", "other_s", "wall_s")
SHORT: Final = 8  # tokens of the prompt before tokens are counted
ADDED: Final = 16  # tokens that a second turn adds
QUIET: Final = 16  # tokens of a running stream before prompts arrive


@dataclass(frozen=True)
class Sizes:
    """How much is asked for. `notes`: what was left out, and why.

    arriving: tokens of each of the `arrivals` prompts that come while streams of at most `running` tokens run; these
    are ended when the prompts have been answered. turn: tokens of a chat's first turn.
    """

    tokens: int
    prompts: tuple[int, ...]
    sessions: tuple[int, ...]
    arriving: int
    arrivals: int
    running: int
    turn: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, context: int, *, tokens: int, quick: bool) -> Sizes:
        """What fits in `context`. Raises InvalidRequest where nothing does."""
        if max(SHORT + tokens, 4 * ADDED) > context:
            raise InvalidRequest(
                f"{tokens} tokens after a prompt of {SHORT} do not fit in the deployment's context of {context}, or"
                f" it holds no {4 * ADDED}: ask for fewer with --tokens, or deploy with a larger --context",
                param="tokens",
            )
        prompts = (128,) if quick else (128, 512, 2048)
        fitting = tuple(size for size in prompts if size < context)
        notes = [f"prefill {size}: the context of {context} does not hold it" for size in prompts if size >= context]
        wanted, turn = (512, 256) if quick else (2048, 1000)
        arriving, first = min(wanted, context - 1), min(turn, context - 2 * ADDED - 1)
        if arriving < wanted:
            notes.append(f"arrivals: of {arriving} tokens, the context of {context} holds no {wanted}")
        if first < turn:
            notes.append(f"second-turn: after {first} tokens, the context of {context} holds no {turn}")
        sessions = (1, 2) if quick else (1, 2, 4, 8, 16)
        running = min(wanted, context - SHORT)
        return cls(tokens, fitting, sessions, arriving, 1 if quick else 2, running, first, tuple(notes))


@dataclass(frozen=True)
class Drawn:
    """The prompts of one round, the same for everything that is compared in it."""

    short: list[int]
    first: list[int]  # of the request for one token
    prefill: dict[int, list[int]]
    together: dict[int, list[list[int]]]  # the first of each is `short`
    running: list[list[int]]
    arriving: list[list[int]]
    turn: list[int]
    added: list[int]

    @classmethod
    def of(cls, prompts: Prompts, sizes: Sizes, streams: int) -> Drawn:
        """Fresh ones."""
        short = prompts.fresh(SHORT)
        return cls(
            short=short,
            first=prompts.fresh(SHORT),
            prefill={size: prompts.fresh(size) for size in sizes.prompts},
            together={count: [short, *(prompts.fresh(SHORT) for _ in range(count - 1))] for count in sizes.sessions},
            running=[prompts.fresh(SHORT) for _ in range(streams)],
            arriving=[prompts.fresh(sizes.arriving) for _ in range(sizes.arrivals)],
            turn=prompts.fresh(sizes.turn),
            added=prompts.fresh(ADDED),
        )


@dataclass(frozen=True)
class Decoded:
    """One round of decoding. `account_s` and `wire_bytes` are of a token, by the lead's own account.

    account_s: the prompt's part included; `api_s` is what the lead does not see: gateway, HTTP, this program. ids: None
    where what was measured does not say them. joules: of the whole answer, None where not readable.
    """

    tpot_s: float
    ids: list[int] | None
    ttft_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    account_s: dict[str, float] = field(default_factory=dict)
    wire_bytes: float | None = None
    joules: float | None = None


async def decode(asker: Asker, drawn: Drawn, tokens: int, meter: Meter) -> Decoded:
    """One token of one prompt, for the time to it, then `tokens` of another.

    A token costs what of the second request is left without the lead's own time to its first token, HTTP both ways
    included. The moments at which a stream's tokens come would not do: a first one that is held up until more have been
    drawn makes the rest look quick.
    """
    one = await asker.ask(drawn.first, 1)
    meter.start()
    try:
        whole = await asker.ask(drawn.short, tokens)
    finally:
        joules = meter.stop()
    spent = {part: float(whole.timings[part]) / tokens for part in PARTS}
    wire = sum(int(whole.timings[name]) - int(one.timings[name]) for name in ("sent_bytes", "received_bytes"))
    return Decoded(
        tpot_s=(whole.at_s[-1] - float(whole.timings["ttft_s"])) / (tokens - 1),
        ids=whole.ids,
        ttft_s=one.ttft_s,
        gaps_s=tuple(whole.gaps_s),
        account_s=spent | {"api_s": whole.at_s[-1] / tokens - spent["wall_s"]},
        wire_bytes=wire / (tokens - 1),
        joules=joules,
    )


async def prefill(asker: Asker, prompt: Sequence[int]) -> float:
    """Seconds to the first token of a prompt that was never seen before."""
    return (await asker.ask(prompt, 1)).ttft_s


async def concurrent(asker: Asker, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[int]]:
    """Tokens per second of all sessions together, prompts included, and the ids of the first one."""
    answers, took_s = await asker.together(prompts, tokens)
    return len(prompts) * tokens / took_s, answers[0].ids


async def arrivals(asker: Asker, drawn: Drawn, tokens: int) -> tuple[list[float], list[float]]:
    """Seconds between tokens of running streams: before prompts arrive, and while they do, one after the other."""
    streams = [Timed() for _ in drawn.running]
    pairs = zip(drawn.running, streams, strict=True)
    running = [asyncio.create_task(asker.collect(prompt, tokens, into)) for prompt, into in pairs]
    try:
        for task, stream in zip(running, streams, strict=True):
            await _grown(task, stream, QUIET)
        begun = [len(stream.ids) for stream in streams]
        for prompt in drawn.arriving:
            await asker.ask(prompt, 1)
        over = [len(stream.ids) + 1 for stream in streams]  # with the token that the last prompt held up
        for task, stream, count in zip(running, streams, over, strict=True):
            await _grown(task, stream, count)
    finally:
        await ended(running)
    quiet: list[float] = []
    busy: list[float] = []
    for stream, first, last in zip(streams, begun, over, strict=True):
        quiet += gaps(stream.at_s[:first])
        busy += gaps(stream.at_s[first - 1 : last])
    return quiet, busy


async def _grown(task: asyncio.Task[Timed], stream: Timed, tokens: int) -> None:
    """Until a stream has so many tokens, or is over; raises what ended it."""
    while not task.done() and len(stream.ids) < tokens:
        stream.grown.clear()
        waiting = asyncio.ensure_future(stream.grown.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
    if task.done():
        task.result()


async def second_turn(asker: Asker, drawn: Drawn) -> tuple[float, float]:
    """Seconds to the first token of a chat's first turn, and of its second, which begins with all of the first."""
    first = await asker.ask(drawn.turn, ADDED)
    second = await asker.ask([*drawn.turn, *first.ids, *drawn.added], 1)
    return first.ttft_s, second.ttft_s


def chosen(only: str) -> tuple[str, ...]:
    """The measures of `--only`; raises InvalidRequest naming those there are."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = next((name for name in names if name not in MEASURES), None)
    if unknown is not None:
        raise InvalidRequest(f"--only {unknown!r}: the measures are {', '.join(MEASURES)}", param="only")
    return tuple(name for name in MEASURES if not names or name in names)
