"""One answer to a gateway, over verify sessions that may be lost and the device's own model: what it has so far."""

from __future__ import annotations

from ganglion.agent.speculation.drafting import Figures
from ganglion.agent.speculation.knowledge import Mode
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation


class Answer:
    """Begun at `now`, in seconds; `tokens`: ids that the gateway was told."""

    def __init__(self, request: lane_pb2.Open, now: float) -> None:
        self.request = request
        self.figures = Figures()
        self.mode: Mode | None = None  # how it was drafted last
        self.tokens: list[int] = []
        self.accepted = False  # the gateway was told so
        self._local = 0
        self._cached = 0
        self._began = now
        self._first: float | None = None

    @property
    def left(self) -> int:
        """Tokens that may still come."""
        return self.request.max_tokens - len(self.tokens)

    def open(self, contract: lane_pb2.Contract | None) -> lane_pb2.Open:
        """The request as it goes on from here; None: at the device's own model."""
        going = lane_pb2.Open()
        going.CopyFrom(self.request)
        for field in ("away", "contract", "target"):  # of this lead, not of the one that it goes on at
            going.ClearField(field)
        if contract is not None:
            going.contract.CopyFrom(contract)
        going.prompt.extend(self.tokens)
        going.answered += len(self.tokens)
        going.max_tokens = self.left
        return going

    def accept(self, numeric_class: str) -> list[lane_pb2.SessionEvent]:
        """Accepted, where the gateway was not told yet."""
        if self.accepted:
            return []
        self.accepted = True
        return [lane_pb2.SessionEvent(accepted=lane_pb2.Accepted(numeric_class=numeric_class))]

    def add(self, tokens: lane_pb2.Tokens, now: float, *, local: bool = False) -> list[lane_pb2.SessionEvent]:
        """Tokens as the gateway is told them; raises ProtocolViolation for more than were asked for."""
        if len(tokens.tokens) > self.left:
            raise ProtocolViolation(f"{len(tokens.tokens)} more tokens of an answer of which {self.left} are left")
        if not tokens.tokens:
            return []
        if not self.tokens:
            self._first, self._cached = now, tokens.cached_tokens
        self.tokens += [token.id for token in tokens.tokens]
        self._local += len(tokens.tokens) if local else 0
        told = lane_pb2.Tokens(tokens=tokens.tokens, cached_tokens=self._cached, local=local)
        return [lane_pb2.SessionEvent(tokens=told)]

    def finish(self, finished: lane_pb2.Finished, now: float) -> lane_pb2.SessionEvent:
        """Finished of the session that ended it, with the figures of the whole answer."""
        told = lane_pb2.Finished(
            reason=finished.reason,
            prompt_tokens=len(self.request.prompt) - self.request.answered,
            completion_tokens=self.request.answered + len(self.tokens),
            cached_tokens=self._cached if self.tokens else finished.cached_tokens,
            local_tokens=self._local,
            timings=finished.timings,
        )
        timings = told.timings
        timings.wall_s = now - self._began
        timings.ttft_s = (self._first or now) - self._began
        parts = (timings.queue_s, timings.compute_s, timings.exchange_s, timings.seal_s, timings.sample_s)
        timings.other_s = max(0.0, timings.wall_s - sum(parts))  # the link, and what was lost on the way
        if self.mode is not None:
            told.speculation.CopyFrom(self.figures.message(self.mode))
        return lane_pb2.SessionEvent(finished=told)
