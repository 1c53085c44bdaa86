"""One expert's part in a blend: its session, and what it has told of the next token."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ganglion.gateway.experts.mixture import Row, learn, read_row
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, DeviceLost, ProtocolViolation, Unavailable


class ChoosingClient(Protocol):
    """A client's end of a session in which it chooses, as `ganglion.wire.session.Opened` is one."""

    @property
    def sent_bytes(self) -> int:
        """Of all requests."""
        ...

    @property
    def received_bytes(self) -> int:
        """Of all events."""
        ...

    def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """What the expert says; closing it ends the session."""
        ...

    async def choose(self, position: int, tokens: Sequence[int]) -> None:
        """Say what follows."""
        ...

    async def ask(self, position: int, ids: Sequence[int]) -> None:
        """Ask for logits."""
        ...

    async def close(self) -> None:
        """End the session."""
        ...


@dataclass(frozen=True)
class BlendExpert:
    """An expert that draws with others. weight: above 0, in proportion to the others'. open: begins a session with it.

    prompt: where its own template differs; None: as the others'.
    """

    name: str
    weight: float
    open: Callable[[lane_pb2.Open], Awaitable[ChoosingClient]]
    prompt: Sequence[int] | None = None


@dataclass(frozen=True)
class Patience:
    """Seconds that an expert has for its prompt, and for each token after it; then it is dropped."""

    prompt_s: float = 60.0
    token_s: float = 5.0


@dataclass(eq=False)
class Seat:
    """An expert in a blend. position: of the token that its row is of. Methods raise errors of the tree.

    opening_bytes: sent and received up to the first distribution.
    """

    expert: BlendExpert
    position: int
    candidates: int
    vocab: int = 0
    opening_bytes: int = 0
    _row: Row | None = None
    _client: ChoosingClient | None = None
    _events: AsyncGenerator[lane_pb2.SessionEvent, None] | None = field(default=None, repr=False)

    @property
    def row(self) -> Row:
        """What is known of its distribution at `position`."""
        if self._row is None:
            raise ProtocolViolation(f"{self.expert.name} has told no distribution")
        return self._row

    @property
    def client(self) -> ChoosingClient:
        """Its session."""
        if self._client is None:
            raise Unavailable(f"{self.expert.name} has no session")
        return self._client

    @property
    def spent_bytes(self) -> int:
        """Sent and received since the first distribution."""
        if self._client is None or not self.opening_bytes:
            return 0
        return self._client.sent_bytes + self._client.received_bytes - self.opening_bytes

    async def begin(self, request: lane_pb2.Open, patience_s: float) -> None:
        """Open its session and hear its first distribution."""
        async with _within(patience_s, "the prompt"):
            self._client = await self.expert.open(request)
            self._events = self._client.events()
            accepted = await self._event("accepted")
            self.vocab = accepted.accepted.vocab
            if not self.vocab:
                raise ProtocolViolation("a session that does not say how large its vocabulary is")
            await self._hear()
        self.opening_bytes = self._client.sent_bytes + self._client.received_bytes

    async def choose(self, token: int) -> None:
        """Say which token follows; `next_row` is to be called then."""
        if token >= self.vocab:
            raise ProtocolViolation(f"token {token} follows and its vocabulary has {self.vocab}")
        self.position, self._row = self.position + 1, None
        await self.client.choose(self.position - 1, (token,))

    async def next_row(self, patience_s: float) -> None:
        """Hear the distribution after the token that was chosen."""
        async with _within(patience_s, f"the token at {self.position}"):
            await self._hear()

    async def ask(self, ids: NDArray[np.int64] | None, patience_s: float) -> None:
        """Ask for the logits of ids, of the whole vocabulary for None; they are in `row` then."""
        async with _within(patience_s, f"a question about the token at {self.position}"):
            await self.client.ask(self.position, () if ids is None else ids.tolist())
            told = (await self._event("scored")).scored
        self._row = learn(self.row, told, position=self.position, asked=ids)

    async def close(self) -> None:
        """End its session."""
        if self._events is not None:
            await self._events.aclose()
        if self._client is not None:
            await self._client.close()

    async def _hear(self) -> None:
        told = (await self._event("scored")).scored
        self._row = read_row(told, position=self.position, vocab=self.vocab, candidates=self.candidates)

    async def _event(self, kind: str) -> lane_pb2.SessionEvent:
        if self._events is None:
            raise Unavailable(f"{self.expert.name} has no session")
        event = await anext(self._events, None)
        if event is None:
            raise DeviceLost("its session ended")
        if event.WhichOneof("body") == "finished" and event.finished.reason == lane_pb2.FINISH_REASON_LENGTH:
            raise ContextExceeded(f"its context is full with {self.position} tokens")
        if event.WhichOneof("body") != kind:
            raise ProtocolViolation(f"its session says {event.WhichOneof('body')} where {kind} is due")
        return event


@contextlib.asynccontextmanager
async def _within(seconds: float, what: str) -> AsyncGenerator[None, None]:
    """Raises Unavailable where what is inside takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(f"it took more than {seconds:g} s for {what}") from None
