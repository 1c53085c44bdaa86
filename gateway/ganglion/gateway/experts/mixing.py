"""Blend: experts that share a tokenizer draw each token together, from the mixture of their distributions.

The engine is given sessions and weights and gives token ids; here they become text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, Protocol

from ganglion.gateway.deployments import Route
from ganglion.gateway.experts.call import Call
from ganglion.gateway.generation import Began, Part
from ganglion.gateway.preparing import Prepared
from ganglion.gateway.tokenizing import TOKENIZER_FILE
from ganglion.gateway.transcript import Delta, Drawn
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError, Unsupported


@dataclass(frozen=True)
class Drawing:
    """One of those that draw together. weight: its share, over all of them 1.

    request: a session of its own with its own prompt (templates differ); sampling, `max_tokens` and `stop_ids` are the
    same in all.
    """

    name: str
    weight: float
    route: Route
    request: lane_pb2.Open


Lost = Callable[[str, GanglionError], None]
Ready = Callable[[Call, str, int], Awaitable[Prepared]]


class Engine(Protocol):
    """What draws."""

    def run(self, experts: Sequence[Drawing], lost: Lost) -> AsyncGenerator[int | Literal["stop", "length"], None]:
        """Token ids without a stop id, then why there are no more; closing it ends the sessions.

        lost: told of every expert that fails, and why; its weight goes to the others. Raises errors of the tree when
        nobody is left.
        """
        ...


async def prepare_all(call: Call, ready: Ready) -> tuple[dict[str, Prepared], dict[str, str]]:
    """The sessions of those that can draw together, and why others cannot; `ready` makes one expert's.

    Those with the tokenizer of the heaviest can: its digest, as its manifest has it, says which that is. Raises what
    kept the first from it where none is left, Unsupported where only servers were chosen.
    """
    own = [name for name, one in call.admitted.items() if one.server is None]
    dropped = {name: "a server gives no whole distributions" for name in call.admitted if name not in own}
    found = await asyncio.gather(*(ready(call, name, call.seed) for name in own), return_exceptions=True)
    prepared: dict[str, Prepared] = {}
    errors: list[GanglionError] = []
    for name, one in zip(own, found, strict=True):
        if isinstance(one, Prepared):
            prepared[name] = one
        elif isinstance(one, GanglionError):
            errors.append(one)
            dropped[name] = one.message
        else:
            raise one
    if not prepared:
        raise errors[0] if errors else Unsupported("only deployments can be blended", param="experts.combine")
    first = max(prepared, key=lambda name: call.weights[name])
    for name in [name for name in prepared if _tokenizer(prepared[name]) != _tokenizer(prepared[first])]:
        dropped[name] = f"its tokenizer is another than that of {first}"
        del prepared[name]
    return prepared, dropped


async def blend(
    call: Call, engine: Engine, prepared: Mapping[str, Prepared], weights: Mapping[str, float], dropped: dict[str, str]
) -> AsyncGenerator[Part, None]:
    """The answer; `weights` of the prepared ones add up to 1. Raises errors of the tree."""
    experts = [
        Drawing(name, weights[name], one.route, one.named(f"{call.identifier}-{at}").requests[0])
        for at, (name, one) in enumerate(prepared.items())
    ]
    first = next(iter(prepared.values()))
    transcript, reason = first.transcripts[0], "stop"

    def lost(name: str, error: GanglionError) -> None:
        dropped.setdefault(name, error.message)

    began = False
    async with aclosing(engine.run(experts, lost)) as drawn:
        async for token in drawn:
            if not began:
                began = True
                yield Began("")
            if isinstance(token, str):
                reason = token
                break
            delta = transcript.push(Drawn(token))
            yield Delta(delta.text, (), (token,))
            if transcript.stopped:
                break
    rest = transcript.finish()
    if rest.text:
        yield Delta(rest.text, ())
    usage = {
        name: {"prompt_tokens": len(one.requests[0].prompt), "completion_tokens": transcript.tokens}
        for name, one in prepared.items()
    }
    reason = "stop" if transcript.stopped else reason
    yield call.ended(reason, asked=list(prepared), answered_by=None, dropped=dropped, usage=usage, count=1)


def _tokenizer(one: Prepared) -> str:
    facts = one.route.facts
    return "" if facts is None else facts.tokenizer[TOKENIZER_FILE].digest
