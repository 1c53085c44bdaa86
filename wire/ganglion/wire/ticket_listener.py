"""A port that is open only while somebody is expected, and lets in whoever presents the ticket that they were given.

A stranger gets no byte, a few seconds and a place among few: a newcomer beyond them takes the place of who has waited
longest.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ganglion.wire.errors import DeviceLost
from ganglion.wire.limits import HANDSHAKE_S

log = logging.getLogger(__name__)

TICKET_BYTES: Final = 32
PENDING: Final = 16


@dataclass(slots=True)
class Ticket:
    """Good for one connection to `port`, which `arrival` gives. It is closed with the ticket, unless it was `kept`."""

    port: int
    token: bytes
    arrival: asyncio.Future[socket.socket]
    kept: bool = False


class TicketListener:
    """The port of one worker on `bind`: any free one, open while a ticket is out."""

    def __init__(self, bind: str) -> None:
        self._bind = bind
        self._socket: socket.socket | None = None
        self._tickets: dict[bytes, Ticket] = {}
        self._pending: dict[asyncio.Task[None], None] = {}  # in order of arrival

    @property
    def open(self) -> bool:
        """Whether the port is open."""
        return self._socket is not None

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """A ticket that is good for the time of the block; raises OSError when no port can be opened."""
        listening = self._open()
        arrival: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        ticket = Ticket(listening.getsockname()[1], secrets.token_bytes(TICKET_BYTES), arrival)
        self._tickets[ticket.token] = ticket
        try:
            yield ticket
        finally:
            self._withdraw(ticket)
            if arrival.done() and not arrival.cancelled() and not ticket.kept:
                arrival.result().close()

    def _withdraw(self, ticket: Ticket) -> None:
        self._tickets.pop(ticket.token, None)
        if not self._tickets:
            self.close()

    def _open(self) -> socket.socket:
        if self._socket is None:
            family = socket.AF_INET6 if ":" in self._bind else socket.AF_INET
            both = family == socket.AF_INET6 and self._bind == "::" and socket.has_dualstack_ipv6()
            self._socket = socket.create_server((self._bind, 0), family=family, backlog=PENDING, dualstack_ipv6=both)
            self._socket.setblocking(False)
            asyncio.get_running_loop().add_reader(self._socket.fileno(), self._accept)
        return self._socket

    def close(self) -> None:
        """Close the port and whoever has not shown a ticket."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
        for pending in self._pending:
            pending.cancel()

    def _accept(self) -> None:
        if self._socket is None:
            return
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # out of descriptors: who is expected stays without a socket
            log.warning("the port for sockets is closed: %s", error)
            self.close()
            return
        connection.setblocking(False)
        if len(self._pending) >= PENDING:
            next(iter(self._pending)).cancel()
        admitting = asyncio.get_running_loop().create_task(self._admit(connection))
        self._pending[admitting] = None
        admitting.add_done_callback(lambda done: self._pending.pop(done, None))

    async def _admit(self, connection: socket.socket) -> None:
        ticket = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                shown = await read_exactly(connection, TICKET_BYTES)
            ticket = next((one for one in self._tickets.values() if hmac.compare_digest(one.token, shown)), None)
        except (DeviceLost, OSError, TimeoutError):
            pass
        finally:
            if ticket is None or ticket.arrival.done():
                connection.close()
            else:
                ticket.arrival.set_result(connection)
                self._pending.pop(asyncio.current_task(), None)  # type: ignore[arg-type]
                self._withdraw(ticket)  # good once


async def read_exactly(connection: socket.socket, size: int) -> bytes:
    """`size` bytes of a non-blocking socket, none beyond them; raises DeviceLost when it ends before, and OSError."""
    found = b""
    while len(found) < size:
        part = await asyncio.get_running_loop().sock_recv(connection, size - len(found))
        if not part:
            raise DeviceLost(f"the socket ended after {len(found)} of {size} bytes")
        found += part
    return found
