"""Channels and servers: roles, errors across the wire, ports, the recorder, Hello."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from ganglion.proto import identity_pb2, pieces_pb2, pieces_pb2_grpc
from ganglion.wire import errors, rpc
from ganglion.wire.environment import tuned_environment
from ganglion.wire.identity import Identity, Role, peer_of

METHODS = ("Greet", "Fetch", "Echo")
ALL = {f"/ganglion.v1.Pieces/{name}": frozenset({Role.AGENT, Role.GATEWAY}) for name in METHODS}


class Pieces(pieces_pb2_grpc.PiecesServicer):  # type: ignore[misc]
    """Answers, or fails as the digest says."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cancelled = asyncio.Event()

    async def Greet(self, request: identity_pb2.Hello, context: Any) -> identity_pb2.Hello:
        self.calls.append(peer_of(context).node_id)
        rpc.check_hello(request)
        return rpc.hello(features=["x"])

    async def Fetch(self, request: pieces_pb2.FetchRequest, context: Any) -> AsyncIterator[pieces_pb2.Chunk]:
        self.calls.append(request.digest)
        yield pieces_pb2.Chunk(data=b"first")
        if request.digest == "wait":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request.digest == "defect":
            raise ZeroDivisionError("secret text")
        raise errors.from_body(errors.ErrorBody(request.digest, "what; figure; knob " + "é" * 3, "field"))

    async def Echo(self, request: pieces_pb2.EchoRequest, context: Any) -> pieces_pb2.Chunk:
        self.calls.append("echo")
        return pieces_pb2.Chunk(data=bytes(request.reply_bytes))


@contextlib.asynccontextmanager
async def serving(identity: Identity, pieces: Pieces, **options: Any) -> AsyncIterator[rpc.BoundServer]:
    options = {"allowed": ALL, **options}
    bound = rpc.server(identity, bind="127.0.0.1", port=0, what="the piece port", knob="--piece-port", **options)
    pieces_pb2_grpc.add_PiecesServicer_to_server(pieces, bound.server)
    await bound.start()
    try:
        async with asyncio.timeout(60):
            yield bound
    finally:
        await bound.stop()


@contextlib.asynccontextmanager
async def calling(bound: rpc.BoundServer, identity: Identity, server: Identity, **options: Any) -> AsyncIterator[Any]:
    peer = options.pop("peer", (server.node_id, Role.AGENT))
    async with rpc.channel(bound.address, identity, peer=peer, **options) as channel:
        yield pieces_pb2_grpc.PiecesStub(channel)


async def failure(call: Any) -> errors.GanglionError:
    async def finish() -> None:
        if hasattr(call, "__aiter__"):
            [chunk async for chunk in call]
        else:
            await call

    with pytest.raises(grpc.RpcError) as caught:
        await finish()
    return rpc.to_error(caught.value, "there:1")


async def test_the_callers_identity_is_its_certificates(world: Any) -> None:
    server, client, pieces = world.node(), world.node(Role.GATEWAY), Pieces()
    async with serving(server, pieces) as bound, calling(bound, client, server) as stub:
        assert (await stub.Greet(rpc.hello())).features == ["x"]
    assert pieces.calls == [client.node_id]


CODES = sorted(errors._BY_CODE)


@pytest.mark.parametrize("code", CODES)
async def test_every_error_of_the_tree_arrives_as_itself(world: Any, code: str) -> None:
    server, pieces = world.node(), Pieces()
    async with serving(server, pieces) as bound, calling(bound, world.node(), server) as stub:
        found = await failure(stub.Fetch(pieces_pb2.FetchRequest(digest=code)))
    assert type(found) is errors._BY_CODE[code]
    assert (found.message, found.param) == ("what; figure; knob ééé", "field")


async def test_a_defect_arrives_without_its_text_and_is_logged(world: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = world.node()
    async with serving(server, Pieces()) as bound, calling(bound, world.node(), server) as stub:
        found = await failure(stub.Fetch(pieces_pb2.FetchRequest(digest="defect")))
    assert type(found) is errors.Internal
    assert "secret" not in found.message
    assert "ZeroDivisionError" in caplog.text


async def test_B1_every_method_is_refused_before_its_handler(world: Any) -> None:
    server, pieces = world.node(), Pieces()
    listed = {method: frozenset({Role.OWNER}) for method in list(ALL)[:2]}  # the third is not listed at all
    requests = [rpc.hello(), pieces_pb2.FetchRequest(digest="x"), pieces_pb2.EchoRequest()]
    async with serving(server, pieces, allowed=listed) as bound, calling(bound, world.node(), server) as stub:
        found = [await failure(getattr(stub, name)(request)) for name, request in zip(METHODS, requests, strict=True)]
    assert {(type(error), error.message) for error in found} == {(errors.PermissionDenied, "not allowed")}
    assert pieces.calls == []


async def test_B4_a_revoked_node_is_refused_at_once(world: Any) -> None:
    server, client, pieces, revoked = world.node(), world.node(), Pieces(), set[str]()
    async with (
        serving(server, pieces, is_revoked=lambda node_id: node_id in revoked) as bound,
        calling(bound, client, server) as stub,
    ):
        await stub.Greet(rpc.hello())
        revoked.add(client.node_id)
        assert type(await failure(stub.Greet(rpc.hello()))) is errors.PermissionDenied
    assert len(pieces.calls) == 1


async def test_B1_B9_without_a_certificate_or_tls_there_is_no_call(world: Any) -> None:
    server, pieces = world.node(), Pieces()
    async with serving(server, pieces) as bound:
        async with grpc.aio.insecure_channel(bound.address) as channel:
            stub = pieces_pb2_grpc.PiecesStub(channel)
            assert type(await failure(stub.Greet(rpc.hello(), timeout=5))) is errors.Unreachable
        credentials = grpc.ssl_channel_credentials(server.authority_pem)
        options = rpc.client_options("control", f"{server.node_id}.agent.ganglion")
        async with grpc.aio.secure_channel(bound.address, credentials, options=options) as channel:
            stub = pieces_pb2_grpc.PiecesStub(channel)
            assert type(await failure(stub.Greet(rpc.hello(), timeout=5))) is errors.Unreachable
    assert pieces.calls == []


@pytest.mark.parametrize(("version", "accepted"), [(ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_1, False)])
async def test_B9_an_older_tls_is_refused(world: Any, version: ssl.TLSVersion, *, accepted: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("DEFAULT@SECLEVEL=0")  # our own OpenSSL would refuse the old version by itself
    context.set_alpn_protocols(["h2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = version
    async with serving(world.node(Role.COORDINATOR), Pieces(), allowed=None) as bound:
        if accepted:
            _, writer = await asyncio.open_connection("127.0.0.1", bound.port, ssl=context)
            writer.transport.abort()
        else:
            with pytest.raises(OSError):  # noqa: PT011 - a reset or an alert, by timing
                await asyncio.open_connection("127.0.0.1", bound.port, ssl=context)


@pytest.mark.parametrize("other", ["node", "role", "coordinator"])
async def test_the_server_must_be_who_is_expected(world: Any, other: str) -> None:
    server, pieces = world.node(), Pieces()
    expected: dict[str, Any] = {
        "node": (world.node().node_id, Role.AGENT),
        "role": (server.node_id, Role.GATEWAY),
        "coordinator": "coordinator",
    }
    async with serving(server, pieces) as bound, calling(bound, world.node(), server, peer=expected[other]) as stub:
        assert type(await failure(stub.Greet(rpc.hello(), timeout=5))) is errors.Unreachable
    assert pieces.calls == []


async def test_A9_a_compressed_message_is_refused(world: Any) -> None:
    server, pieces = world.node(), Pieces()
    bomb = pieces_pb2.EchoRequest(payload=bytes(3 << 20))
    assert len(gzip.compress(bomb.SerializeToString())) < 10_000
    async with serving(server, pieces) as bound:
        options = rpc.client_options("tensor", f"{server.node_id}.agent.ganglion")
        options = [option for option in options if "compression" not in option[0]]
        async with grpc.aio.secure_channel(
            bound.address, world.node().channel_credentials(), options=options, compression=grpc.Compression.Gzip
        ) as channel:
            found = await failure(pieces_pb2_grpc.PiecesStub(channel).Echo(bomb))
    assert type(found) is errors.Unsupported
    assert pieces.calls == []


async def test_A8_a_message_beyond_its_kind_is_refused(world: Any) -> None:
    server, pieces = world.node(), Pieces()
    async with serving(server, pieces) as bound, calling(bound, world.node(), server, kind="tensor") as stub:
        found = await failure(stub.Echo(pieces_pb2.EchoRequest(payload=bytes(5 << 20))))
    assert type(found) is errors.Exhausted
    assert pieces.calls == []


async def test_a_client_that_leaves_cancels_the_handler(world: Any) -> None:
    server, pieces = world.node(), Pieces()
    async with serving(server, pieces) as bound, calling(bound, world.node(), server) as stub:
        call = stub.Fetch(pieces_pb2.FetchRequest(digest="wait"))
        assert (await call.read()).data == b"first"
        call.cancel()
        await asyncio.wait_for(pieces.cancelled.wait(), 10)


async def test_a_port_in_use_is_named_with_its_knob(world: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(errors.Conflict, match=f"the fleet port {port} on 127.0.0.1 .*--fleet-port"):
            rpc.server(
                world.node(), bind="127.0.0.1", port=port, what="the fleet port", knob="--fleet-port", allowed={}
            )
    async with serving(world.node(), Pieces()) as bound:
        with pytest.raises(errors.Conflict):
            rpc.server(world.node(), bind="127.0.0.1", port=bound.port, what="x", knob="y", allowed={})


async def test_an_unreachable_address_says_what_to_check(world: Any) -> None:
    async with rpc.channel("127.0.0.1:1", world.node(), peer="coordinator") as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await pieces_pb2_grpc.PiecesStub(channel).Greet(rpc.hello())
    found = rpc.to_error(caught.value, "127.0.0.1:1")
    assert type(found) is errors.Unreachable
    assert found.message.startswith("127.0.0.1:1 does not answer")
    assert "check that" in found.message


async def test_the_recorder_holds_every_message_and_error(world: Any, tmp_path: Path) -> None:
    server, path = world.node(), tmp_path / "recording"
    path.write_bytes(b"")
    async with (
        serving(server, Pieces(), record_to=path) as bound,
        calling(bound, world.node(), server) as stub,
    ):
        await stub.Greet(rpc.hello(kernel_family="canary"))
        await failure(stub.Fetch(pieces_pb2.FetchRequest(digest="not_found")))
    entries = rpc.read_recording(path)
    assert [(way, method.rsplit("/")[-1]) for way, method, _ in entries] == [
        ("in", "Greet"),
        ("out", "Greet"),
        ("in", "Fetch"),
        ("out", "Fetch"),
        ("out", "Fetch"),
    ]
    assert identity_pb2.Hello.FromString(entries[0][2]).kernel_family == "canary"
    assert pieces_pb2.Chunk.FromString(entries[3][2]).data == b"first"
    assert b"what; figure; knob" in entries[4][2]
    path.write_bytes(path.read_bytes()[:-1])
    assert len(rpc.read_recording(path)) == 4


@pytest.mark.parametrize("protocol", [0, 2, 2**31])
def test_A4_another_protocol_is_named_with_the_supported_range(protocol: int) -> None:
    with pytest.raises(errors.Unsupported, match=f"protocol {protocol} .*1 to 1"):
        rpc.check_hello(identity_pb2.Hello(protocol=protocol, version="9"))


def test_a_persons_own_environment_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    assert "GRPC_VERBOSITY" in tuned_environment()
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    assert tuned_environment() == {}
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"


async def test_a_far_server_is_reached(world: Any) -> None:
    """The handshakes of a connection take several round trips: longer than the first pause before another attempt."""
    delay_s = 0.15
    async with contextlib.AsyncExitStack() as stack:
        server, agent = world.node(), world.node()
        bound = await stack.enter_async_context(serving(server, Pieces()))
        flights = await stack.enter_async_context(asyncio.TaskGroup())

        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            loop = asyncio.get_running_loop()
            while data := await reader.read(1 << 16):
                loop.call_later(delay_s, writer.write, data)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner, outer = await asyncio.open_connection(bound.host, bound.port)
            stack.callback(writer.close)
            stack.callback(outer.close)
            flights.create_task(carry(reader, outer))
            flights.create_task(carry(inner, writer))

        between = await stack.enter_async_context(await asyncio.start_server(accept, "127.0.0.1", 0))
        address = f"127.0.0.1:{between.sockets[0].getsockname()[1]}"
        async with rpc.channel(address, agent, peer=(server.node_id, Role.AGENT)) as channel:
            answer = await pieces_pb2_grpc.PiecesStub(channel).Greet(rpc.hello())
        assert list(answer.features) == ["x"]
