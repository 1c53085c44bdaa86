"""What a server may do wrong, and what it becomes: one error of the tree each, and the verifier goes on afterwards."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from typing import Any

import pytest

from ganglion.agent.speculation.http.client import HttpClient, Timeouts
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.wire.errors import (
    DeviceLost,
    Exhausted,
    GanglionError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unavailable,
    Unreachable,
    Unsupported,
)

PROMPT = "def main(argv=None):\n    parser = argparse"


def said(status: int, body: Any = None, **headers: str) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, data


def completions(found: Any) -> Any:
    """A fault that begins when a session verifies: not in the probes, whose prompts are others."""

    def fault(path: str, document: Any) -> Any:
        if path.endswith("/completions") and document and len(document["prompt"]) > 30:
            return found(document) if callable(found) else found
        return None

    return fault


def cut_short(document: Any) -> Any:
    rows = [None] + [{"5": {"logprob": -1.0}}] * 3
    drawn = {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -1.0}]}
    return said(200, {"choices": [{"text": "", "logprobs": drawn, "prompt_logprobs": rows}]})


FAULTS: dict[str, tuple[Any, type[GanglionError], str]] = {
    "closed": ("drop", DeviceLost, "closed the connection"),
    "no JSON": (said(200, b"<html>"), ProtocolViolation, "no JSON.*<html>"),
    "a number": (said(200, b"7"), ProtocolViolation, "choices"),
    "no choices": (said(200, {"choices": []}), ProtocolViolation, "no choices"),
    "fewer rows": (cut_short, ProtocolViolation, "4 prompt_logprobs for a prompt of"),
    "refused": (said(400, {"error": {"message": "no such parameter"}}), InvalidRequest, "no such parameter"),
    "key": (said(401, {"error": "who?"}), Unauthenticated, "the key for it is wrong or missing"),
    "forbidden": (said(403), PermissionDenied, "403"),
    "busy": (said(429, {"message": "slow down"}, Retry_After="3600"), Exhausted, "asks for 3600 s, patience is 0.2 s"),
    "broken": (said(500, {"detail": "boom"}), Unavailable, "answered 500: boom"),
    "starting": (said(503, {"error": {"message": "Loading model"}}), Unavailable, "Loading model"),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_faults_in_a_session(serve, tokenizer, verifier, drafted, name) -> None:
    fault, kind, words = FAULTS[name]
    server = serve("vllm")
    made = verifier(server.url, timeouts=Timeouts(answer_s=20.0, patience_s=0.2))
    ids = tokenizer.encode(PROMPT * 4).ids
    assert len(ids) > 30
    server.fault = completions(fault)
    with pytest.raises(kind, match=words) as raised:
        await drafted(made, ids, 4, lambda ids, most: [5])
    assert type(raised.value) is kind
    server.fault = lambda path, document: None
    answer = await drafted(made, ids, 4, lambda ids, most: [5])
    assert answer.tokens == server.greedy(ids, 4)


async def test_a_server_that_asks_to_come_back(serve, tokenizer, verifier, drafted) -> None:
    server = serve("vllm")
    ids = tokenizer.encode(PROMPT * 4).ids
    told = iter([said(429, Retry_After="0"), said(503, Retry_After="0")])
    server.fault = completions(lambda document: next(told, None))
    answer = await drafted(verifier(server.url), ids, 3, lambda ids, most: [5])
    assert answer.tokens == server.greedy(ids, 3)
    assert next(told, None) is None


async def test_a_server_that_is_slow(serve, tokenizer, verifier, drafted) -> None:
    server = serve("vllm")
    made = verifier(server.url, timeouts=Timeouts(answer_s=0.3))
    ids = tokenizer.encode(PROMPT).ids
    await asyncio.to_thread(server.lock.acquire)
    try:
        with pytest.raises(Unreachable, match=r"no answer in 0\.3 s; a longer answer_s"):
            await drafted(made, ids, 4, lambda ids, most: [5])
    finally:
        server.lock.release()


async def test_a_server_that_is_down(tokenizer, verifier, drafted) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unreachable, match=f"http://127.0.0.1:{port}/v1 cannot be reached"):
        await drafted(verifier(f"http://127.0.0.1:{port}/v1"), [5, 6], 4, lambda ids, most: [5])


async def test_a_connection_that_ended_while_it_was_kept(serve, tokenizer, verifier, drafted) -> None:
    server = serve("vllm")
    client = HttpClient(server.url)
    for _ in range(2):
        await client.get("/models")
        ((_, writer),) = client._idle
        writer.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
    await client.close()
    assert [path for path, _ in server.seen] == ["/v1/models"] * 2


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_keys(serve, verifier, drafted, tokenizer, key) -> None:
    server = serve("vllm", key="right")
    with pytest.raises(Unauthenticated, match="the key for it is wrong or missing"):
        await drafted(verifier(server.url, key=key), [5, 6], 4, lambda ids, most: [5])
    ids = tokenizer.encode(PROMPT).ids
    answer = await drafted(verifier(server.url, key="right"), ids, 2, lambda ids, most: [5])
    assert answer.tokens == server.greedy(ids, 2)


@pytest.mark.parametrize("speaks", ["vllm", "llama-server"])
async def test_another_vocabulary(serve, verifier, drafted, tokenizer, speaks) -> None:
    model = json.loads(tokenizer.to_str())
    ids = model["model"]["vocab"]
    ids["return"], ids["self"] = ids["self"], ids["return"]  # a tokenizer of the same size with the words elsewhere
    plain = sorted((number, name) for name, number in ids.items() if name.isascii() and name.isalpha())
    for (one, first), (other, second) in zip(plain[::2], plain[1::2], strict=False):
        ids[first], ids[second] = other, one
    model["model"]["merges"] = []
    mixed = TokenTexts(json.dumps(model).encode(), 2048, eos_ids=(0,), name="mixed")
    with pytest.raises(Unsupported, match="has another tokenizer: token"):
        await drafted(verifier(serve(speaks).url, texts=mixed), [5, 6], 4, lambda ids, most: [5])


@pytest.mark.parametrize("speaks", ["vllm", "llama-cpp-python"])
async def test_a_smaller_vocabulary(serve, verifier, drafted, tokenizer, speaks) -> None:
    model = json.loads(tokenizer.to_str())
    model["model"]["vocab"] = {name: number for name, number in model["model"]["vocab"].items() if number < 500}
    model["model"]["merges"] = []
    small = TokenTexts(json.dumps(model).encode(), 500, eos_ids=(0,), name="small")
    with pytest.raises((Unsupported, ProtocolViolation), match=r"vocabulary has 500|is no token of small"):
        await drafted(verifier(serve(speaks).url, texts=small), [5, 6, 7], 4, lambda ids, most: [5], vocab=500)


async def test_a_server_without_log_probabilities_of_the_prompt(serve, verifier, drafted) -> None:
    server = serve("llama-server", slots=1)
    with pytest.raises(Unsupported, match=r"has 1 slot.*--parallel"):
        await drafted(verifier(server.url), [5, 6], 4, lambda ids, most: [5])
    server = serve("llama-cpp-python")
    message = {"error": {"message": "logprobs is not supported for models created with logits_all=False"}}
    server.fault = lambda path, document: said(500, message) if document and document.get("echo") else None
    with pytest.raises(Unsupported, match="--logits_all true"):
        await drafted(verifier(server.url), [5, 6], 4, lambda ids, most: [5])
    server.fault = lambda path, document: said(404) if document else None
    with pytest.raises(Unsupported, match="gives no log-probabilities of a prompt"):
        await drafted(verifier(server.url), [5, 6], 4, lambda ids, most: [5])
    server.fault = lambda path, document: said(500) if "models" not in path else None
    with pytest.raises(Unavailable, match="fails at every request"):
        await drafted(verifier(server.url), [5, 6], 4, lambda ids, most: [5])


async def test_models_by_name(serve, verifier, drafted) -> None:
    server = serve("vllm")
    with pytest.raises(NotFound, match="serves demo; 'other' is not among them"):
        await drafted(verifier(server.url, model="other"), [5, 6], 4, lambda ids, most: [5])


REFUSED = {
    "temperature": ({"temperature": 0.7}, "does not draw with our noise"),
    "repetition_penalty": ({"repetition_penalty": 1.2}, "plain distribution"),
    "presence_penalty": ({"presence_penalty": 0.5}, "plain distribution"),
    "frequency_penalty": ({"frequency_penalty": -0.5}, "plain distribution"),
    "top_logprobs": ({"top_logprobs": 21}, "20 likeliest tokens at most"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_is_not_greedy_is_refused(serve, verifier, drafted, name) -> None:
    sampling, words = REFUSED[name]
    with pytest.raises(Unsupported, match=words) as raised:
        await drafted(verifier(serve("vllm").url), [5, 6], 4, lambda ids, most: [5], **sampling)
    assert raised.value.param == f"sampling.{name}"


async def test_drafts_that_the_protocol_forbids(serve, verifier, drafted) -> None:
    with pytest.raises(ProtocolViolation, match="vocabulary"):
        await drafted(verifier(serve("vllm").url), [5, 6], 4, lambda ids, most: [2048])


@pytest.mark.parametrize("url", ["", "host:80", "ftp://host", "http://", "http://a b/", "http://u:p@h", "http://h:x"])
def test_urls(url: str) -> None:
    with pytest.raises(InvalidRequest, match=r"URL|form"):
        HttpClient(url)


# Replies as bytes, from a server that says one thing and closes.
HEAD = b"HTTP/1.1 200 OK\r\n"
ANSWERS: dict[str, tuple[bytes, Any]] = {
    "length": (HEAD + b"Content-Length: 2\r\n\r\n{}", {}),
    "chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=y\r\n{\r\n1\r\n}\r\n0\r\nA: b\r\n\r\n", {}),
    "to the end": (b"HTTP/1.0 200 OK\r\n\r\n[1]", [1]),
    "after interim ones": (b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + b"Content-Length: 1\r\n\r\n3", 3),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n", ProtocolViolation),
    "endless header": (HEAD + b"A: " + b"b" * (1 << 17), ProtocolViolation),
    "a line without a colon": (HEAD + b"oops\r\n\r\n", ProtocolViolation),
    "too long": (HEAD + b"Content-Length: 99999999\r\n\r\n", ProtocolViolation),
    "too long in chunks": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n", ProtocolViolation),
    "too long to the end": (b"HTTP/1.0 200 OK\r\n\r\n" + b"1" * 5000, ProtocolViolation),
    "a length that is none": (HEAD + b"Content-Length: -1\r\n\r\n", ProtocolViolation),
    "a chunk that is none": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", ProtocolViolation),
    "compressed": (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\n1", ProtocolViolation),
    "cut": (HEAD + b"Content-Length: 20\r\n\r\n{}", DeviceLost),
    "cut in the header": (HEAD, DeviceLost),
    "nothing": (b"", DeviceLost),
    "only interim ones": (b"HTTP/1.1 102 Processing\r\n\r\n" * 9, ProtocolViolation),
    "deep": (b"HTTP/1.0 200 OK\r\n\r\n" + b"[" * 4000, ProtocolViolation),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_answers_byte_by_byte(name: str) -> None:
    answer, expected = ANSWERS[name]

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server, asyncio.timeout(20):
        port = server.sockets[0].getsockname()[1]
        client = HttpClient(f"http://127.0.0.1:{port}", reply_bytes=4096)
        try:
            if isinstance(expected, type):
                with pytest.raises(expected):
                    await client.get("/x")
            else:
                assert await client.get("/x") == expected
        finally:
            await client.close()


async def test_tls(tmp_path) -> None:
    """A certificate of an authority that nobody knows is refused; with the authority it is served."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "both.pem").write_bytes(private + pem)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(tmp_path / "both.pem")

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HEAD + b"Content-Length: 2\r\n\r\n{}")
        writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0, ssl=ours) as server, asyncio.timeout(20):
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        strange, known = HttpClient(url), HttpClient(url, tls=ssl.create_default_context(cadata=pem.decode()))
        with pytest.raises(Unauthenticated, match="certificate is not accepted"):
            await strange.get("/x")
        assert await known.get("/x") == {}
        await known.close()
