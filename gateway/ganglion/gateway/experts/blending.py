"""Several experts draw each token together: a session with each, in which this client chooses, and the mixture's draw.

An expert that is lost, slow or talks nonsense is dropped; the weights of the others are renormalized, and the stream
goes on from the same position.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ganglion.gateway.experts.blend import Chosen, next_token
from ganglion.gateway.experts.mixture import Mixture
from ganglion.gateway.experts.seat import BlendExpert, Patience, Seat
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, GanglionError, InvalidRequest, Unavailable
from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjustments
from ganglion.wire.sampling.parameters import Sampling, parse_sampling
from ganglion.wire.sampling.penalties import Penalties

GREEDY_CANDIDATES: Final = 64  # that each expert tells unasked: bench/blend.py has what fewer and more cost
DRAWN_CANDIDATES: Final = 256
MOST_CANDIDATES: Final = 1024

OnDrop = Callable[[str, GanglionError], None]


@dataclass(frozen=True)
class Blended:
    """A token of the answer. logprob: in the mixture. weights: of the experts that drew it, by name; they add up to 1.

    top: the likeliest tokens and their log-probabilities, when `sampling.top_logprobs` asks for them.
    """

    id: int
    logprob: float
    weights: dict[str, float]
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class BlendStatistics:
    """What a blend took, filled in while it runs. Bytes are those of messages before sealing, of all experts.

    reason: why it ended. asked_tokens: for which more was asked; asked_whole: of them, the whole vocabulary;
    questions: round trips for it; asks: questions to single experts. near_ties: tokens that another one missed by less
    than `blend.NEAR_NATS`.
    token_bytes: without those up to the first distribution. dropped: the reason, by name.
    """

    reason: lane_pb2.FinishReason = lane_pb2.FINISH_REASON_UNSPECIFIED
    tokens: int = 0
    asked_tokens: int = 0
    asked_whole: int = 0
    questions: int = 0
    asks: int = 0
    near_ties: int = 0
    opening_bytes: int = 0
    token_bytes: int = 0
    dropped: dict[str, str] = field(default_factory=dict)


async def blend(
    experts: Sequence[BlendExpert],
    prompt: Sequence[int],
    sampling: lane_pb2.Sampling,
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    on_drop: OnDrop,
    candidates: int | None = None,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    request_id: str = "",
    tenant: str = "",
    statistics: BlendStatistics | None = None,
) -> AsyncGenerator[Blended, None]:
    """The tokens of an answer; a stop id ends it and is no part of it. Closing the generator ends every session.

    prompt: its length is the first token's position for the noise, and its tokens are those that a repetition penalty
    counts. candidates: that each expert tells unasked; 0: its whole vocabulary; None: as many as suit. on_drop: told of
    each expert that is dropped, and why. Raises InvalidRequest for bad weights or parameters; when no expert is left
    the error of the only one, otherwise Unavailable naming each one's reason. An answer that fills the last expert's
    context ends there.
    """
    listed = _suitable(sampling) if candidates is None else candidates
    blending = _Blending(
        experts,
        prompt,
        candidates=listed,
        patience=patience,
        on_drop=on_drop,
        statistics=statistics or BlendStatistics(),
    )
    request = lane_pb2.Open(
        request_id=request_id,
        max_tokens=max_tokens,
        tenant=tenant,
        choosing=lane_pb2.Choosing(candidates=listed),
    )
    try:
        await blending.open(request)
        drawing = _Drawing.of(sampling, blending.vocab, prompt)
        async for token in blending.tokens(drawing, frozenset(stop_ids), max_tokens):
            yield token
    finally:
        await blending.close()


@dataclass
class _Drawing:
    """How tokens are drawn, and what adjusts logits by now."""

    sampling: Sampling
    penalties: Penalties | None
    adjustments: Adjustments = NO_ADJUSTMENTS

    @staticmethod
    def of(message: lane_pb2.Sampling, vocab: int, prompt: Sequence[int]) -> _Drawing:
        sampling = parse_sampling(message, vocab)
        return _Drawing(sampling, Penalties(sampling, prompt) if sampling.penalized else None)

    def update(self) -> None:
        """Take in what has changed since the last token."""
        if self.penalties is not None:
            self.adjustments = self.adjustments.updated(self.penalties.take())

    def drawn(self, token: int) -> None:
        if self.penalties is not None:
            self.penalties.drawn(token)


class _Blending:
    """The experts of one answer that are left."""

    def __init__(
        self,
        experts: Sequence[BlendExpert],
        prompt: Sequence[int],
        *,
        candidates: int,
        patience: Patience,
        on_drop: OnDrop,
        statistics: BlendStatistics,
    ) -> None:
        _check(experts)
        self._prompt = prompt
        self._patience = patience
        self._on_drop = on_drop
        self._statistics = statistics
        self._seats = [
            Seat(expert, len(prompt if expert.prompt is None else expert.prompt), candidates) for expert in experts
        ]
        self._errors: dict[str, GanglionError] = {}
        self._last_errors: list[GanglionError] = []
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def vocab(self) -> int:
        """Of the mixture: an id that only some experts have is drawn by those."""
        return max(seat.vocab for seat in self._seats)

    async def open(self, request: lane_pb2.Open) -> None:
        """Open every session; who cannot is dropped."""
        await self._all(
            (seat, seat.begin(self._opening(seat, request), self._patience.prompt_s)) for seat in self._seats
        )
        self._statistics.opening_bytes += sum(seat.opening_bytes for seat in self._seats)
        self._check_left()

    def _opening(self, seat: Seat, request: lane_pb2.Open) -> lane_pb2.Open:
        found = lane_pb2.Open()
        found.CopyFrom(request)
        found.prompt.extend(self._prompt if seat.expert.prompt is None else seat.expert.prompt)
        return found

    async def tokens(
        self, drawing: _Drawing, stop_ids: frozenset[int], max_tokens: int
    ) -> AsyncGenerator[Blended, None]:
        statistics = self._statistics
        statistics.reason = lane_pb2.FINISH_REASON_LENGTH
        for number in range(max_tokens):
            drawing.update()
            found, weights = await self._draw(drawing, len(self._prompt) + number)
            if found.token in stop_ids:
                statistics.reason = lane_pb2.FINISH_REASON_STOP
                return
            drawing.drawn(found.token)
            statistics.tokens += 1
            statistics.near_ties += found.near
            last = number == max_tokens - 1
            if not last:
                await self._all((seat, seat.choose(found.token)) for seat in self._seats)
            yield Blended(found.token, found.logprob, weights, found.top)
            if last:
                return
            await self._all((seat, seat.next_row(self._patience.token_s)) for seat in self._seats)
            if not self._seats and all(isinstance(error, ContextExceeded) for error in self._last_errors):
                return
            self._check_left()

    async def _draw(self, drawing: _Drawing, position: int) -> tuple[Chosen, dict[str, float]]:
        """The next token and who drew it; asks as long as what was told does not decide."""
        asked = whole = False
        while True:
            self._check_left()
            weights = self._weights()
            mixture = Mixture([seat.row for seat in self._seats], list(weights.values()))
            found = next_token(mixture, drawing.sampling, drawing.adjustments, position)
            if isinstance(found, Chosen):
                self._statistics.asked_tokens += asked
                self._statistics.asked_whole += whole
                return found, weights
            asking = [pair for pair in zip(self._seats, found.ids, strict=True) if pair[1] is None or pair[1].size]
            asked, whole = True, whole or any(ids is None for _, ids in asking)
            self._statistics.questions += 1
            self._statistics.asks += len(asking)
            await self._all((seat, seat.ask(ids, self._patience.token_s)) for seat, ids in asking)

    def _weights(self) -> dict[str, float]:
        total = math.fsum(seat.expert.weight for seat in self._seats)
        return {seat.expert.name: seat.expert.weight / total for seat in self._seats}

    async def _all(self, parts: Iterable[tuple[Seat, Awaitable[None]]]) -> None:
        """Wait for something of several experts at a time; those that fail are dropped."""
        pairs = list(parts)
        found = await asyncio.gather(*(part for _, part in pairs), return_exceptions=True)
        self._last_errors = [error for error in found if isinstance(error, GanglionError)] or self._last_errors
        for (seat, _), error in zip(pairs, found, strict=True):
            if isinstance(error, GanglionError):
                self._drop(seat, error)
            elif error is not None:
                raise error

    def _drop(self, seat: Seat, error: GanglionError) -> None:
        name = seat.expert.name
        self._seats.remove(seat)
        self._errors[name] = error
        self._statistics.dropped[name] = error.message
        self._end(seat)
        self._on_drop(name, error)

    def _check_left(self) -> None:
        if self._seats:
            return
        errors = list(self._errors.values())
        if len(errors) == 1 or all(isinstance(error, InvalidRequest) for error in errors):
            raise errors[0]
        reasons = "; ".join(f"{name}: {error.message}" for name, error in self._errors.items())
        raise Unavailable(f"no expert is left: {reasons}")

    def _end(self, seat: Seat) -> None:
        task = asyncio.create_task(seat.close())
        self._closing.add(task)
        self._statistics.token_bytes += seat.spent_bytes

    async def close(self) -> None:
        """End every session."""
        for seat in self._seats:
            self._end(seat)
        self._seats = []
        await asyncio.gather(*self._closing, return_exceptions=True)


def _suitable(sampling: lane_pb2.Sampling) -> int:
    """So many candidates that mostly nothing else is asked; always enough for a top-k, up to MOST_CANDIDATES."""
    if sampling.temperature == 0.0:
        return GREEDY_CANDIDATES
    return max(DRAWN_CANDIDATES, min(sampling.top_k + GREEDY_CANDIDATES, MOST_CANDIDATES))


def _check(experts: Sequence[BlendExpert]) -> None:
    names = [expert.name for expert in experts]
    if not names or len(set(names)) != len(names):
        raise InvalidRequest(f"experts are to be one or more, each named once; they are {names}", param="experts")
    for expert in experts:
        if not (math.isfinite(expert.weight) and expert.weight > 0.0):
            raise InvalidRequest(
                f"the weight of expert {expert.name} is {expert.weight}; use a number above 0, or leave it out",
                param="experts",
            )
