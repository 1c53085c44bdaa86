"""A drafter's guesses from its logits: the one sampler's code, so that drafter and target share their noise (D7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ganglion.agent.lead.candidates import answer
from ganglion.agent.lead.draw import Draw
from ganglion.agent.lead.sampler import More, rank_tokens
from ganglion.wire.sampling.adjusting import Adjusting, VocabShare
from ganglion.wire.sampling.parameters import Sampling
from ganglion.wire.sampling.penalties import Penalties

_RANKED: Final = 256  # the likeliest tokens, from which guesses after the first are taken


@dataclass(frozen=True, slots=True)
class Ask:
    """A guess is wanted of what follows `tokens`, everything before it, in a slot of the engine.

    top: how many candidates are wanted. prompt: how many of `tokens` are the prompt; presence and frequency penalties
    count the others (None: it is not known, and they are left out).
    """

    slot: int
    tokens: Sequence[int]
    sampling: Sampling
    top: int = 1
    prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens by falling perturbed score, at most `top`: the first is the drafter's draw.

    Fewer where fewer pass the filters; none where the drafter cannot tell: at the end of its context, after a token
    that it does not know, or where its logits are not finite.
    """

    tokens: tuple[int, ...]
    scores: tuple[float, ...]


NO_GUESS: Final = Guess((), ())


def guess(logits: NDArray[np.float32], share: VocabShare, ask: Ask) -> Guess:
    """The drafter's guess from its raw logits [share.count] float32, with the noise of position len(ask.tokens)."""
    sampling, position = ask.sampling, len(ask.tokens)
    listed = 0 if ask.top == 1 else ask.top if sampling.temperature == 0.0 else max(_RANKED, ask.top)
    draw = Draw(
        candidates=max(sampling.candidates, listed),
        temperature=sampling.temperature,
        seed=sampling.seed,
        position=position,
        mass=sampling.mass,
        adjusting=_adjusting(ask, share) if sampling.penalized else None,
    )
    while True:
        found = answer(logits, share, draw)
        if found.numeric_error:
            return NO_GUESS
        ranked = rank_tokens([found], sampling, position, ask.top)
        if not isinstance(ranked, More):
            tokens, scores = zip(*ranked, strict=True)
            return Guess(tokens, scores)
        draw = replace(draw, candidates=ranked.candidates)


def _adjusting(ask: Ask, share: VocabShare) -> Adjusting:
    """What a lead does to the logits of this token; biases of ids that the drafter does not have are left out."""
    known = len(ask.tokens) if ask.prompt is None else ask.prompt
    penalties = Penalties(ask.sampling, ask.tokens[:known])
    for token in ask.tokens[known:]:
        penalties.drawn(token)
    return Adjusting(ask.sampling.repetition_penalty, penalties.take().within(share), None)
