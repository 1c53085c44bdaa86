"""The client of the API against a small real server: streamed text, named errors, a server that is not there."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest

from ganglion.cli.api import Chunk, chunk_of, error_of, stream
from ganglion.wire.errors import ContextExceeded, DeviceLost, NotFound, ProtocolViolation, Unavailable, Unreachable


@contextlib.asynccontextmanager
async def server(status: str, body: bytes, content_type: str) -> AsyncIterator[tuple[str, list[bytes]]]:
    seen: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        seen.append(await reader.readexactly(length))
        headers = (
            f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
        )
        writer.write(headers.encode() + b"\r\n" + body)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", seen


def events(*documents: object) -> bytes:
    return b"".join(f"data: {json.dumps(each)}\n\n".encode() for each in documents) + b"data: [DONE]\n\n"


async def test_text_of_both_endpoints_arrives_in_order() -> None:
    body = events(
        {"choices": [{"text": "a"}]},
        {"choices": [{"delta": {"content": "b"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"completion_tokens": 2}},
    )
    async with server("200 OK", body, "text/event-stream") as (base, seen):
        chunks = [chunk async for chunk in stream(base, "completions", {"model": "m", "prompt": "p"})]
    assert chunks == [Chunk("a"), Chunk("b", "length"), Chunk(usage={"completion_tokens": 2})]
    assert json.loads(seen[0]) == {
        "model": "m", "prompt": "p", "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def test_an_error_of_the_api_is_the_error_of_the_tree() -> None:
    error = {"error": {"message": "no model x", "type": "invalid_request_error", "code": "not_found", "param": "model"}}
    async with server("404 Not Found", json.dumps(error).encode(), "application/json") as (base, _):
        with pytest.raises(NotFound, match="no model x"):
            [_ async for _ in stream(base, "completions", {})]


async def test_an_error_inside_a_stream_is_raised_after_the_text() -> None:
    body = events({"choices": [{"text": "a"}]}, {"error": {"message": "desk was lost", "code": "device_lost"}})
    async with server("200 OK", body, "text/event-stream") as (base, _):
        answer = stream(base, "completions", {})
        assert (await anext(answer)).text == "a"
        with pytest.raises(DeviceLost, match="desk was lost"):
            await anext(answer)


async def test_nobody_there_is_unreachable() -> None:
    closed = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = closed.sockets[0].getsockname()[1]
    closed.close()
    await closed.wait_closed()
    with pytest.raises(Unreachable, match=str(port)):
        [_ async for _ in stream(f"http://127.0.0.1:{port}", "completions", {})]


async def test_a_stream_that_breaks_off_is_unavailable() -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 999\r\n\r\ndata: ")
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(half, "127.0.0.1", 0)
    async with listening:
        with pytest.raises(Unavailable, match="broke off"):
            [_ async for _ in stream(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", "completions", {})]


@pytest.mark.parametrize("data", ["", "[]", "{}", '{"choices": 3}', '{"choices": [3]}', "nul"])
def test_what_is_no_event_is_a_violation(data: str) -> None:
    with pytest.raises(ProtocolViolation):
        chunk_of(data)


def test_bodies_that_are_no_error_are_a_violation() -> None:
    assert isinstance(error_of(502, b"<html>bad gateway"), ProtocolViolation)
    assert isinstance(error_of(400, b'{"error": {"code": "context_length_exceeded", "message": "m"}}'), ContextExceeded)
