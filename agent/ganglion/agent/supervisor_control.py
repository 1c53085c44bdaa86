"""The control stream to the coordinator: dialled, greeted, kept, and dialled again with jittered backoff."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from ganglion.proto import fleet_pb2, fleet_pb2_grpc
from ganglion.wire.errors import GanglionError, PermissionDenied, ProtocolViolation, Unauthenticated, Unavailable
from ganglion.wire.hello import check_hello, hello
from ganglion.wire.identity import Identity
from ganglion.wire.limits import CONNECT_S, HANDSHAKE_S
from ganglion.wire.rpc import channel, to_error

log = logging.getLogger(__name__)

BACKOFF_S: Final = 0.25
BACKOFF_LONGEST_S: Final = 8.0
QUEUED: Final = 1024

_Call = grpc.aio.StreamStreamCall[fleet_pb2.AgentMessage, fleet_pb2.CoordinatorMessage]
OnMessage = Callable[[fleet_pb2.CoordinatorMessage], Awaitable[None]]


class Outbox:
    """What waits to be sent. Last words on an assignment survive a broken stream; everything else is said anew."""

    def __init__(self) -> None:
        self._waiting: deque[fleet_pb2.AgentMessage] = deque()
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()

    def put(self, message: fleet_pb2.AgentMessage) -> None:
        """Add a message; beyond QUEUED the oldest that is no last word goes."""
        self._waiting.append(message)
        self._some.set()
        self._none.clear()
        if len(self._waiting) > QUEUED:
            spare = next((one for one in self._waiting if not _is_last_word(one)), self._waiting[0])
            self._waiting.remove(spare)

    def has_heartbeat(self) -> bool:
        """Whether a heartbeat waits: another one would only be late too."""
        return any(message.HasField("heartbeat") for message in self._waiting)

    def restart(self) -> None:
        """A new stream begins: keep last words only."""
        self._waiting = deque(message for message in self._waiting if _is_last_word(message))

    async def send_to(self, write: Callable[[fleet_pb2.AgentMessage], Awaitable[None]]) -> None:
        """Write messages as they come, for ever; one is forgotten once it is written."""
        while True:
            while self._waiting:
                message = self._waiting[0]
                await write(message)
                if self._waiting and self._waiting[0] is message:
                    self._waiting.popleft()
            self._some.clear()
            self._none.set()
            await self._some.wait()

    async def written(self) -> None:
        """Return when nothing waits."""
        await self._none.wait()


def _is_last_word(message: fleet_pb2.AgentMessage) -> bool:
    ends = (fleet_pb2.ASSIGNMENT_PHASE_FAILED, fleet_pb2.ASSIGNMENT_PHASE_RELEASED)
    return message.HasField("status") and message.status.phase in ends


def backoff_s(failures: int, jitter: float) -> float:
    """Pause before try number `failures` + 1; `jitter` in 0..1 spreads a fleet that lost its coordinator at once."""
    return float(min(BACKOFF_LONGEST_S, BACKOFF_S * 2 ** min(failures, 16)) * (0.5 + 0.5 * jitter))


class ControlStream:
    """Keeps one stream: `on_up` when greeted (fill the outbox), `on_message` for every order, `on_down` with why."""

    def __init__(
        self,
        identity: Identity,
        outbox: Outbox,
        *,
        kernel_family: str,
        on_up: Callable[[], None],
        on_message: OnMessage,
        on_down: Callable[[GanglionError, float], None],
    ) -> None:
        self._identity = identity
        self._outbox = outbox
        self._kernel_family = kernel_family
        self._on_up = on_up
        self._on_message = on_message
        self._on_down = on_down
        self.up = False
        self.features: frozenset[str] = frozenset()  # of the coordinator, since it greeted

    async def run(self) -> None:
        """Keep the stream until cancelled; raises PermissionDenied or Unauthenticated when this device is shut out."""
        failures = 0
        while True:
            error, greeted = await self._converse()
            if isinstance(error, PermissionDenied | Unauthenticated):
                raise type(error)(
                    f"the coordinator at {self._identity.coordinator} refuses this device ({error.message}): it may"
                    " have been revoked; see `ganglion device ls` there, or join again"
                )
            failures = 0 if greeted else failures + 1
            pause_s = backoff_s(failures, random.random())  # noqa: S311 - jitter
            self._on_down(error, pause_s)
            await asyncio.sleep(pause_s)

    async def _converse(self) -> tuple[GanglionError, bool]:  # noqa: PLR0911 - one return for each way to end
        """One stream from dialling to its end: why it ended, and whether it was greeted."""
        address = self._identity.coordinator
        greeted = False
        made = channel(address, self._identity, peer="coordinator", kind="control")
        try:
            async with asyncio.timeout(CONNECT_S + HANDSHAKE_S):
                call = fleet_pb2_grpc.FleetStub(made).Control(wait_for_ready=False)  # type: ignore[no-untyped-call]
                await call.write(fleet_pb2.AgentMessage(hello=hello(kernel_family=self._kernel_family)))
                first = await call.read()
            if not isinstance(first, fleet_pb2.CoordinatorMessage):
                return Unavailable(f"{address} ended the stream before it said hello"), False
            if not first.HasField("hello"):
                return ProtocolViolation(f"{address} did not begin with hello"), False
            check_hello(first.hello)
            self._outbox.restart()
            self.features = frozenset(first.hello.features)
            greeted = self.up = True
            self._on_up()
            await self._exchange(call)
            return Unavailable(f"{address} ended the stream"), True
        except TimeoutError:
            return Unavailable(f"{address} did not greet within {CONNECT_S + HANDSHAKE_S:.0f} s"), greeted
        except grpc.aio.AioRpcError as error:
            return to_error(error, address), greeted
        except asyncio.InvalidStateError:  # written to a call that had just ended
            return Unavailable(f"{address} ended the stream"), greeted
        except GanglionError as error:
            return error, greeted
        finally:
            self.up = False
            await made.close()

    async def _exchange(self, call: _Call) -> None:
        sender = asyncio.create_task(self._outbox.send_to(call.write))
        try:
            while isinstance(message := await call.read(), fleet_pb2.CoordinatorMessage):
                await self._on_message(message)
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await sender
            call.cancel()
