"""Somebody else's servers: what they may send, what becomes of it, and where text and keys go."""

from __future__ import annotations

import asyncio
import itertools
import stat
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gateway.expert_server import Answers, ExpertServer, chunk, event, saying, writing
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.gateway.experts.external import Question, ServerClient
from ganglion.gateway.experts.parts import Over, Said, Taken
from ganglion.gateway.experts.replies import LINE_BYTES, Events, NonsenseError, Piece, read_piece
from ganglion.gateway.experts.servers import Server, Servers, allow_server, canonical_url, forget_server, list_servers
from ganglion.wire.errors import (
    ContextExceeded,
    DeviceLost,
    Exhausted,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unavailable,
    Unreachable,
)
from ganglion.wire.home import Home

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64}
DONE = b"data: [DONE]\n\n"


@pytest_asyncio.fixture(loop_scope="session")
async def client() -> AsyncIterator[ServerClient]:
    made = ServerClient()
    yield made
    await made.close()


async def answer_of(client: ServerClient, server: ExpertServer, question: Question, **more: Any) -> tuple[str, Any]:
    parts = [part async for part in client.ask(Server("s", server.url, **more), question)]
    assert isinstance(parts[0], Taken)
    assert isinstance(parts[-1], Over)
    return "".join(part.text for part in parts if isinstance(part, Said)), parts


async def test_an_answer_comes_as_it_is_made(client: ServerClient) -> None:
    with ExpertServer(saying("héllo", logprob=-0.5)) as server:
        question = Question("/chat/completions", CHAT | {"logprobs": True}, most=64)
        text, parts = await answer_of(client, server, question, key="sk-1")
        assert text == "héllo"
        assert [part.logprobs for part in parts if isinstance(part, Said)] == [(-0.5,)] * 5
        assert parts[-1] == Over("stop", 7, 5)
        path, headers, document = server.seen[0]
        assert path == "/v1/chat/completions"
        assert headers["authorization"] == "Bearer sk-1"
        assert headers["accept-encoding"] == "identity"
        assert document["stream"] is True
        cut, parts = await answer_of(client, server, Question("/chat/completions", CHAT, stops=("ll",), most=64))
        assert (cut, parts[-1].reason) == ("hé", "stop")
        text, parts = await answer_of(client, server, Question("/completions", {"prompt": "x", "max_tokens": 3}))
        assert text == "hél"


async def test_a_whole_answer_in_place_of_a_stream(client: ServerClient) -> None:
    body = b'{"choices": [{"index": 0, "message": {"content": "all"}, "finish_reason": "length"}]}'
    with ExpertServer(writing(body), headers={"Content-Type": "application/json"}) as server:
        text, parts = await answer_of(client, server, Question("/chat/completions", CHAT))
        assert (text, parts[-1].reason) == ("all", "length")


async def test_a_lying_count_of_tokens_is_bounded_by_bytes_and_by_what_was_asked(client: ServerClient) -> None:
    with ExpertServer(saying("abcd", claims=1_000_000)) as server:
        _, parts = await answer_of(client, server, Question("/chat/completions", CHAT, most=64))
        assert parts[-1].completion_tokens == 5
        _, parts = await answer_of(client, server, Question("/chat/completions", CHAT, most=3))
        assert parts[-1].completion_tokens == 3


@pytest.mark.parametrize(
    ("answers", "error", "words"),
    [
        (writing(b"data: {not json\n\n"), NonsenseError, "not JSON"),
        (writing(b'data: {"choices": [{"delta": {"content": 7}}]}\n\n'), NonsenseError, "not JSON of the shape"),
        (writing(b'data: {"choices": "x"}\n\n'), NonsenseError, "shape"),
        (writing(b"data: \xff\xfe\n\n"), NonsenseError, "UTF-8"),
        (writing(b'data: {"choices": [{"delta": {"content": "\\ud800"}}]}\n\n'), NonsenseError, "JSON"),
        (writing(b'data: {"choices": [{"logprobs": {"content": [{"logprob": NaN}]}}]}\n\n'), NonsenseError, "JSON"),
        (writing(event({"choices": [{"index": 3, "delta": {"content": "x"}}]})), NonsenseError, "another choice"),
        (writing(event({"error": {"message": "no"}})), NonsenseError, "an error"),
        (writing(chunk("a\0b")), NonsenseError, "NUL"),
        (writing(event({"choices": [], "usage": {"completion_tokens": -1}})), NonsenseError, "tokens"),
        (writing(b"data: " + b"x" * (LINE_BYTES + 10)), NonsenseError, "longer than"),
        (writing(b"data: " + b"[" * 100_000 + b"\n\n"), NonsenseError, "JSON"),
        (writing(chunk("hal")), DeviceLost, "in the middle"),
        (writing(), DeviceLost, "in the middle"),
    ],
)
async def test_what_cannot_be_read(client: ServerClient, answers: Answers, error: Any, words: str) -> None:
    with ExpertServer(answers) as server, pytest.raises(error, match=words):
        await answer_of(client, server, Question("/chat/completions", CHAT))


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"error": {"message": "bad temperature"}}', InvalidRequest),
        (400, b"This model's maximum context length is 8 tokens", ContextExceeded),
        (401, b"", Unauthenticated),
        (403, b"", PermissionDenied),
        (404, b"", NotFound),
        (429, b"", Exhausted),
        (500, b"\xff\x00" * 200_000, Unavailable),
        (302, b"", ProtocolViolation),
    ],
)
async def test_refusals(client: ServerClient, status: int, body: bytes, error: Any) -> None:
    with ExpertServer(saying("elsewhere")) as other:
        headers = {"Location": other.url + "/chat/completions"} if status == 302 else {}
        with ExpertServer(writing(body), status=status, headers=headers) as server:
            with pytest.raises(error) as raised:
                await answer_of(client, server, Question("/chat/completions", CHAT), key="sk-1")
            assert type(raised.value) is error
            assert len(raised.value.message) < 500
        assert other.seen == []


async def test_compression_is_refused_and_cookies_are_not_kept(client: ServerClient) -> None:
    kind = {"Content-Type": "text/event-stream"}
    packed = ExpertServer(saying("x"), headers=kind | {"Content-Encoding": "gzip"})
    with packed as server, pytest.raises(NonsenseError, match="compressed"):
        await answer_of(client, server, Question("/chat/completions", CHAT))
    with ExpertServer(saying("x"), headers=kind | {"Set-Cookie": "who=you; Path=/"}) as server:
        for _ in range(2):
            await answer_of(client, server, Question("/chat/completions", CHAT))
        assert all("cookie" not in headers for _, headers, _ in server.seen)


async def test_nobody_is_there(client: ServerClient) -> None:
    with ExpertServer(saying("x")) as server:
        url = server.url
    with pytest.raises(Unreachable, match="cannot be reached"):
        [part async for part in client.ask(Server("s", url), Question("/chat/completions", CHAT))]
    with pytest.raises(Unreachable):
        await client.link_s(Server("s", url))


async def test_closing_ends_the_request(client: ServerClient) -> None:
    server = ExpertServer(writing())
    server.answers = server.stalling("be")
    with server:
        async with aclosing(client.ask(Server("s", server.url), Question("/chat/completions", CHAT))) as parts:
            async for part in parts:
                if isinstance(part, Said):
                    break
        assert await asyncio.to_thread(server.gone.wait, 10), "the server hears of it"


async def test_the_connection_is_kept_for_the_next_request(client: ServerClient) -> None:
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with suppress(asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0])
                await reader.readexactly(length)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                )
                for part in (chunk("yes", None, "stop"), DONE):
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
                await asyncio.sleep(0)  # the end of the reply is a segment of its own
                writer.write(b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
        for _ in range(3):
            parts = [one async for one in client.ask(Server("s", url), Question("/chat/completions", CHAT))]
            assert isinstance(parts[-1], Over)
        assert connections == 1
        await client.close()


async def test_the_round_trip_is_measured(client: ServerClient) -> None:
    with ExpertServer(saying("x")) as server:
        assert 0 < await client.link_s(Server("s", server.url)) < 10


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
def test_any_bytes_are_an_answer_or_nonsense(content: bytes, cuts: list[int]) -> None:
    content = b'data: {"choices": [{"delta": {"content": "' + content + b'"}}]}\n\n' + content
    events, found = Events(), []
    places = [0, *sorted(cuts), len(content)]
    for begin, end in itertools.pairwise(places):
        found += events.push(content[begin:end])
    found += events.finish()
    whole = Events()
    assert found == whole.push(content) + whole.finish()
    for data in found:
        with suppress(NonsenseError):
            assert isinstance(read_piece(data), Piece)


def test_a_logprob_is_a_finite_number() -> None:
    for said in (b"-Infinity", b"NaN", b"-1e999", b'"-1"'):
        with pytest.raises(NonsenseError):
            read_piece(b'{"choices": [{"text": "a", "logprobs": {"token_logprobs": [%s]}}]}' % said)
    assert read_piece(b'{"choices": [{"text": "a", "logprobs": {"token_logprobs": [null, -2]}}]}').logprobs == (-2.0,)


# --- the home's list


def test_where_text_may_go(tmp_path: Path) -> None:
    home = Home(tmp_path / "gateway")
    servers = Servers(home)
    assert servers.get("ollama") is None
    with pytest.raises(InvalidRequest, match="--url"):
        allow_server(home, "ollama", key="sk-1")
    made = allow_server(home, "ollama", url="http://LOCALHOST:11434/v1/", key="sk-1", own=True)
    assert made == Server("ollama", "http://localhost:11434/v1", "sk-1", own=True)
    assert servers.get("ollama") == made
    path = home.path / "experts" / "servers.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert allow_server(home, "ollama", key="sk-2").own is True
    moved = allow_server(home, "ollama", url="http://example.com/v1")
    assert moved == Server("ollama", "http://example.com/v1"), "a key goes to the server that it was given for"
    assert servers.get("ollama") == moved
    assert list_servers(home) == (moved,)
    forget_server(home, "ollama")
    assert servers.get("ollama") is None
    with pytest.raises(NotFound):
        forget_server(home, "ollama")
    path.chmod(0o644)
    with pytest.raises(PermissionDenied, match="chmod"):
        list_servers(home)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x/v1",
        "http://",
        "http://u:p@x/v1",
        "http://x/v1?a=b",
        "http://x/v1#a",
        "http://x:99999/",
        "x",
        "http://é/",
    ],
)
def test_no_url(url: str) -> None:
    with pytest.raises(InvalidRequest, match="form"):
        canonical_url(url)


@pytest.mark.parametrize("key", ["", "a b", "a\nb", "é", "x" * 5000])
def test_no_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidRequest, match="key"):
        allow_server(Home(tmp_path / "gateway"), "one", url="http://x/v1", key=key)
