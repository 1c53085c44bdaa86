"""Pieces between devices over real mutual TLS: whole, continued, verified, and refused where they should be."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator

import grpc
import pytest

from ganglion.agent.store import PieceStore
from ganglion.agent.store.fetch import Holder, PieceFetcher
from ganglion.agent.store.service import ALLOWED, PieceService
from ganglion.proto import pieces_pb2, pieces_pb2_grpc
from ganglion.wire import rpc
from ganglion.wire.certificates import Role
from ganglion.wire.errors import Corrupt, Exhausted, InvalidRequest, NotFound, PermissionDenied, Unavailable
from ganglion.wire.nouns import PieceRef


@contextlib.asynccontextmanager
async def serving(identity, service) -> AsyncIterator[Holder]:
    bound = rpc.server(
        identity, bind="127.0.0.1", port=0, what="the piece port", knob="--piece-port", allowed=ALLOWED, kind="tensor"
    )
    pieces_pb2_grpc.add_PiecesServicer_to_server(service, bound.server)
    await bound.start()
    try:
        yield Holder(identity.node_id, bound.address, identity.name)
    finally:
        await bound.stop()


class Faulty(PieceService):
    """Sends what `spoil(chunk number, data)` returns; ends the call where it returns None."""

    def __init__(self, store, spoil):
        super().__init__(store)
        self.spoil = spoil
        self.offsets: list[int] = []
        self.fired = 0

    async def Fetch(self, request, context):  # noqa: N802
        self.offsets.append(request.offset)
        number = 0
        async for chunk in super().Fetch(request, context):
            data = self.spoil(number, chunk.data)
            self.fired += data != chunk.data
            if data is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable was cut")
            yield pieces_pb2.Chunk(data=data)
            number += 1


async def fetch(store, identity, holders, pieces, **options):
    seen: list[tuple[int, int]] = []
    fetcher = PieceFetcher(store, identity, holders, **options)
    try:
        await fetcher.fetch(pieces, lambda done, total: seen.append((done, total)))
    finally:
        await fetcher.close()
    return seen


async def test_pieces_come_whole_from_two_holders_with_progress(tmp_path, make_node):
    first, second, mine = (PieceStore(tmp_path / name) for name in ("first", "second", "mine"))
    bodies = [os.urandom(size) for size in (0, 1, 3_000_000, 40_000, 5, 1 << 20)]
    refs = [(first if index % 2 else second).put(body) for index, body in enumerate(bodies)]
    mine.put(bodies[3])
    async with (
        serving(make_node(name="one"), PieceService(first)) as one,
        serving(make_node(name="two"), PieceService(second)) as two,
    ):
        seen = await fetch(mine, make_node(), [one, two], refs)
        assert await fetch(mine, make_node(), [], refs) == [(sum(map(len, bodies)),) * 2]
    for ref, body in zip(refs, bodies, strict=True):
        assert bytes(mine.open(ref.digest)) == body
    total = sum(map(len, bodies))
    assert seen[0] == (40_000, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


async def test_a_broken_transfer_is_continued_where_it_stopped(tmp_path, make_node):
    theirs, mine, body = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine"), os.urandom(5 << 20)
    ref = theirs.put(body)
    cuts = [2]  # the third chunk of the first call

    def cut(number: int, data: bytes) -> bytes | None:
        if cuts and number == cuts[0]:
            cuts.pop()
            return None
        return data

    service = Faulty(theirs, cut)
    async with serving(make_node(), service) as holder:
        await fetch(mine, make_node(), [holder], [ref])
    assert service.fired == 1
    assert service.offsets == [0, 2 << 20]
    assert bytes(mine.open(ref.digest)) == body


async def test_a_holder_that_sends_wrong_bytes_is_passed_over(tmp_path, make_node):
    theirs, mine, body = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine"), os.urandom(2 << 20)
    ref = theirs.put(body)
    liar = Faulty(theirs, lambda number, data: bytes([data[0] ^ 1]) + data[1:])
    async with (
        serving(make_node(name="liar"), liar) as bad,
        serving(make_node(name="honest"), PieceService(theirs)) as good,
    ):
        with pytest.raises(Corrupt, match="came from no holder: liar"):
            await fetch(mine, make_node(), [bad], [ref])
        assert liar.fired > 0
        assert not mine.has(ref.digest)
        assert not list(mine.path.rglob("*.part"))
        await fetch(mine, make_node(), [bad, good], [ref])
    assert bytes(mine.open(ref.digest)) == body


async def test_wrong_bytes_of_an_earlier_transfer_do_not_blame_an_honest_holder(tmp_path, make_node):
    theirs, mine, body = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine"), os.urandom(2 << 20)
    ref = theirs.put(body)
    with mine.partial(ref) as part:
        part.write(b"\0" * 1000)
    service = Faulty(theirs, lambda number, data: data)
    async with serving(make_node(), service) as holder:
        await fetch(mine, make_node(), [holder], [ref])
    assert service.offsets == [1000, 0]
    assert bytes(mine.open(ref.digest)) == body


async def test_a_holder_without_the_piece_and_nobody_at_all(tmp_path, make_node):
    theirs, mine = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine")
    ref = PieceRef(hashlib.sha256(b"?").hexdigest(), 1)
    async with serving(make_node(name="empty"), PieceService(theirs)) as holder:
        with pytest.raises(NotFound, match="empty"):
            await fetch(mine, make_node(), [holder], [ref])
    with pytest.raises(Unavailable, match="no other device"):
        await fetch(mine, make_node(), [], [ref])


async def test_a_holder_that_falls_silent_is_passed_over(tmp_path, make_node):
    theirs, mine = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine")
    ref = theirs.put(b"slow")
    asked = asyncio.Event()

    class Silent(PieceService):
        async def Fetch(self, request, context):  # noqa: N802
            asked.set()
            await asyncio.Event().wait()
            yield

    async with (
        serving(make_node(name="silent"), Silent(theirs)) as silent,
        serving(make_node(), PieceService(theirs)) as good,
    ):
        await fetch(mine, make_node(), [silent, good], [ref], silence_s=0.3)
        assert asked.is_set()
    assert mine.has(ref.digest, 4)


async def test_the_budget_is_checked_before_anything_is_fetched(tmp_path, make_node):
    theirs, mine = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine", budget_bytes=10)
    ref = theirs.put(b"x" * 11)
    service = Faulty(theirs, lambda number, data: data)
    async with serving(make_node(), service) as holder:
        with pytest.raises(Exhausted, match="budget"):
            await fetch(mine, make_node(), [holder], [ref])
    assert service.offsets == []


async def test_who_is_another_node_or_has_another_role_gets_nothing(tmp_path, make_node):
    theirs, mine = PieceStore(tmp_path / "theirs"), PieceStore(tmp_path / "mine")
    ref = theirs.put(b"secret weights")
    async with serving(make_node(), PieceService(theirs)) as holder:
        with pytest.raises(PermissionDenied):
            await fetch(mine, make_node(Role.COORDINATOR), [holder], [ref])
        impostor = Holder(make_node().node_id, holder.address, "impostor")
        with pytest.raises(Unavailable, match="does not answer"):
            await fetch(mine, make_node(), [impostor], [ref])
        await fetch(mine, make_node(Role.GATEWAY), [holder], [ref])


async def test_bad_requests_are_refused_by_name(tmp_path, make_node):
    theirs = PieceStore(tmp_path)
    ref = theirs.put(b"abc")
    me, node = make_node(), make_node()
    async with (
        serving(node, PieceService(theirs)) as holder,
        rpc.channel(holder.address, me, peer=(node.node_id, Role.AGENT), kind="tensor") as made,
    ):
        stub = pieces_pb2_grpc.PiecesStub(made)

        async def failing(request) -> Exception:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Fetch(request).read()
            return rpc.to_error(caught.value, holder.address)

        assert isinstance(await failing(pieces_pb2.FetchRequest(digest="../../x")), InvalidRequest)
        too_far = await failing(pieces_pb2.FetchRequest(digest=ref.digest, offset=4))
        assert "offset 4" in str(too_far)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Echo(pieces_pb2.EchoRequest(reply_bytes=(1 << 20) + 1))
        assert "reply_bytes" in str(rpc.to_error(caught.value, holder.address))
        assert (await stub.Greet(rpc.hello())).protocol == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Greet(type(rpc.hello())(protocol=99))
