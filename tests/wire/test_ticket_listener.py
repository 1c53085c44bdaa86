"""The port for sockets: whom it lets in, and that a stranger gets nothing."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
import socket

import pytest

from ganglion.wire import ticket_listener
from ganglion.wire.ticket_listener import PENDING, TICKET_BYTES, TicketListener

DEADLINE_S = 10.0


async def connect(port: int, shown: bytes = b"") -> socket.socket:
    connection = socket.socket()
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, shown)
    return connection


async def shut_out(connection: socket.socket) -> bool:
    """The other end closes without having said a byte."""
    with connection:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await asyncio.get_running_loop().sock_recv(connection, 1) == b""
        except ConnectionResetError:
            return True


async def test_a_ticket_lets_one_in_and_the_port_is_open_for_as_long() -> None:
    listener = TicketListener("127.0.0.1")
    assert not listener.open
    with listener.ticket() as ticket:
        assert len(ticket.token) == TICKET_BYTES
        near = await connect(ticket.port, ticket.token)
        far = await asyncio.wait_for(ticket.arrival, DEADLINE_S)
        assert far.getpeername() == near.getsockname()
        assert not listener.open  # nobody else is expected
        with pytest.raises(ConnectionRefusedError):
            await connect(ticket.port, ticket.token)
    assert await shut_out(near)  # nobody kept it


async def test_what_is_kept_stays_open() -> None:
    with TicketListener("127.0.0.1").ticket() as ticket:
        near = await connect(ticket.port, ticket.token)
        far = await ticket.arrival
        ticket.kept = True
    with near, far:
        near.send(b"x")
        assert await asyncio.get_running_loop().sock_recv(far, 1) == b"x"


async def test_two_tickets_share_a_port_and_each_is_good_once() -> None:
    listener = TicketListener("127.0.0.1")
    with listener.ticket() as one, listener.ticket() as other:
        assert one.port == other.port
        assert one.token != other.token
        first = await connect(one.port, one.token)
        await asyncio.wait_for(one.arrival, DEADLINE_S)
        assert listener.open
        assert await shut_out(await connect(one.port, one.token))  # used
        assert not other.arrival.done()
        second = await connect(one.port, other.token)
        await asyncio.wait_for(other.arrival, DEADLINE_S)
    first.close()
    second.close()


async def test_a_ticket_that_is_late_finds_nobody() -> None:
    listener = TicketListener("127.0.0.1")
    with listener.ticket() as late:
        pass
    with pytest.raises(ConnectionRefusedError):
        await connect(late.port, late.token)
    with listener.ticket() as another:
        assert await shut_out(await connect(another.port, late.token))


@pytest.mark.parametrize("content", [bytes(TICKET_BYTES), b"GET / HTTP/1.1\r\n" * 9, bytes(1 << 16)], ids=len)
async def test_A1_a_stranger_gets_no_byte(content: bytes) -> None:
    listener = TicketListener("127.0.0.1")
    with listener.ticket() as ticket:
        assert await shut_out(await connect(ticket.port, content))
        near = await connect(ticket.port, ticket.token)
        await asyncio.wait_for(ticket.arrival, DEADLINE_S)
        near.close()


@pytest.mark.parametrize("shown", [0, 1, TICKET_BYTES - 1])
async def test_A2_a_truncated_ticket_is_none(shown: int) -> None:
    with TicketListener("127.0.0.1").ticket() as ticket:
        connection = await connect(ticket.port, ticket.token[:shown])
        connection.shutdown(socket.SHUT_WR)
        assert await shut_out(connection)
        assert not ticket.arrival.done()


async def test_C4_who_says_too_little_is_shut_out_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ticket_listener, "HANDSHAKE_S", 0.05)
    with TicketListener("127.0.0.1").ticket() as ticket:
        assert await shut_out(await connect(ticket.port, ticket.token[:8]))


async def test_C4_many_strangers_do_not_keep_the_expected_one_out() -> None:
    with TicketListener("127.0.0.1").ticket() as ticket:
        strangers = [await connect(ticket.port) for _ in range(PENDING + 2)]
        near = await connect(ticket.port, ticket.token)
        await asyncio.wait_for(ticket.arrival, DEADLINE_S)
        for stranger in strangers:
            assert await shut_out(stranger)
        near.close()


async def test_closing_shuts_everybody_out() -> None:
    listener = TicketListener("127.0.0.1")
    with listener.ticket() as ticket:
        stranger = await connect(ticket.port, b"half")
        while not listener._pending:  # noqa: ASYNC110 - the listener tells nobody of strangers
            await asyncio.sleep(0)
        listener.close()
        assert await shut_out(stranger)
        with pytest.raises(ConnectionRefusedError):
            await connect(ticket.port, ticket.token)
