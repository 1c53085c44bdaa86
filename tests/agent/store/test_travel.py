"""Pieces among several devices over real mutual TLS: losses, lies, parts, kills, limits, and peers that fetch too."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ganglion.agent.store import PieceStore
from ganglion.agent.store.bandwidth import Throttle
from ganglion.agent.store.fetch import Holder, PieceFetcher
from ganglion.agent.store.service import ALLOWED, PieceService
from ganglion.proto import pieces_pb2
from ganglion.wire import rpc
from ganglion.wire.errors import Conflict, Exhausted, NotFound
from ganglion.wire.nouns import PieceRef

PEER = Path(__file__).with_name("peer.py")
DEADLINE_S = 30.0


@contextlib.asynccontextmanager
async def serving(identity, service) -> AsyncIterator[Holder]:
    bound = rpc.server(
        identity, bind="127.0.0.1", port=0, what="the piece port", knob="--piece-port", allowed=ALLOWED, kind="tensor"
    )
    service.add_to(bound.server)
    await bound.start()
    try:
        yield Holder(identity.node_id, bound.address, identity.name)
    finally:
        await bound.stop()


@contextlib.asynccontextmanager
async def process(what: str, identity, folder: Path, store: PieceStore, *rest: str):
    """`peer.py` in a process of its own, which is killed in the end: (process, its first line)."""
    identity.save(folder)
    started = await asyncio.create_subprocess_exec(
        sys.executable, str(PEER), what, str(folder), str(store.path), *rest, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield started, (await started.stdout.readline()).decode().strip()
    finally:
        with contextlib.suppress(ProcessLookupError):
            started.kill()
        await started.wait()


@contextlib.asynccontextmanager
async def fetching(store, identity, holders, **options) -> AsyncIterator[PieceFetcher]:
    fetcher = PieceFetcher(store, identity, holders, **options)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield fetcher
    finally:
        await fetcher.close()


class Counting(PieceService):
    """Notes what is asked; `gate` holds every call from its byte `open_bytes` on until it is set."""

    def __init__(self, store, throttle=None, *, gate: asyncio.Event | None = None, open_bytes: int = 0) -> None:
        super().__init__(store, "", throttle)
        self.asked: list[tuple[str, int]] = []
        self.sent_bytes = 0
        self.gate, self.open_bytes = gate, open_bytes

    async def Fetch(self, request, context):  # noqa: N802
        self.asked.append((request.digest, request.offset))
        at = request.offset
        async for chunk in super().Fetch(request, context):
            if self.gate is not None and at >= self.open_bytes:
                await self.gate.wait()
            at += len(chunk.data)
            self.sent_bytes += len(chunk.data)
            yield chunk


def filled(path: Path, *sizes: int) -> tuple[PieceStore, list[PieceRef]]:
    store = PieceStore(path)
    return store, [store.put(os.urandom(size)) for size in sizes]


def same(store: PieceStore, other: PieceStore, refs: list[PieceRef]) -> bool:
    return all(store.open(ref.digest) == other.open(ref.digest) for ref in refs)


async def test_a_holder_killed_midway_is_replaced_from_the_byte_where_it_stopped(tmp_path, make_node):
    theirs, refs = filled(tmp_path / "theirs", *[4 << 20] * 3)
    mine, gate = PieceStore(tmp_path / "mine"), asyncio.Event()
    other = Counting(theirs, gate=gate)
    doomed = make_node(name="doomed")
    async with (
        process("serve", doomed, tmp_path / "id", theirs, str(16 << 20)) as (victim, address),
        serving(make_node(name="other"), other) as good,
        fetching(mine, make_node(), [Holder(doomed.node_id, address, "doomed"), good]) as fetcher,
    ):

        def progress(done_bytes: int, total_bytes: int) -> None:
            if done_bytes >= 1 << 20 and not gate.is_set():
                gate.set()
                victim.kill()

        await fetcher.fetch(refs, progress)
        assert await victim.wait() == -signal.SIGKILL
    assert same(mine, theirs, refs)
    assert fetcher.counts["doomed"].failed > 0
    assert fetcher.counts["doomed"].pieces < 3
    assert any(offset > 0 for _, offset in other.asked)


async def test_a_liar_is_set_aside_with_its_reason_and_the_others_go_on(tmp_path, make_node):
    theirs, refs = filled(tmp_path / "theirs", *[30_000] * 20)
    mine = PieceStore(tmp_path / "mine")

    class Liar(Counting):
        async def Fetch(self, request, context):  # noqa: N802
            async for chunk in super().Fetch(request, context):
                yield pieces_pb2.Chunk(data=bytes(len(chunk.data)))

    gate = asyncio.Event()
    liar, good = Liar(theirs), Counting(theirs, gate=gate)
    async with (
        serving(make_node(name="liar"), liar) as first,
        serving(make_node(name="good"), good) as second,
        fetching(mine, make_node(), [first, second], parallel=2) as fetcher,
    ):
        running = asyncio.create_task(fetcher.fetch(refs))
        while not fetcher.counts or not fetcher.counts["liar"].aside:  # noqa: ASYNC110 - counts have no event
            await asyncio.sleep(0.01)
        gate.set()
        await running
    assert same(mine, theirs, refs)
    assert fetcher.counts["liar"].lied == 1
    assert "expected 30000 bytes" in fetcher.counts["liar"].aside
    assert len(liar.asked) == 1
    assert fetcher.counts["good"].pieces == 20


async def test_holders_with_half_of_the_pieces_each_give_the_whole(tmp_path, make_node):
    theirs, refs = filled(tmp_path / "theirs", *[20_000] * 24)
    mine, left, right = (PieceStore(tmp_path / name) for name in ("mine", "left", "right"))
    for number, ref in enumerate(refs):
        (left if number % 2 else right).put(theirs.open(ref.digest))
    absent = PieceRef(hashlib.sha256(b"nowhere").hexdigest(), 7)
    async with (
        serving(make_node(name="left"), Counting(left)) as one,
        serving(make_node(name="right"), Counting(right)) as two,
    ):
        async with fetching(mine, make_node(), [one, two]) as fetcher:
            await fetcher.fetch(refs)
        assert same(mine, theirs, refs)
        assert [fetcher.counts[name].pieces for name in ("left", "right")] == [12, 12]
        async with fetching(mine, make_node(), [one, two]) as fetcher:
            with pytest.raises(NotFound, match=r"left: it does not hold .*; right: it does not hold"):
                await fetcher.fetch([absent])


async def test_a_fetch_goes_on_after_its_process_was_killed(tmp_path, make_node):
    theirs, (ref,) = filled(tmp_path / "theirs", 6 << 20)
    mine, gate = PieceStore(tmp_path / "mine"), asyncio.Event()
    service, me = Counting(theirs, gate=gate, open_bytes=3 << 20), make_node(name="me")
    async with serving(make_node(name="holder"), service) as holder:
        wanted = (holder.node_id, holder.address, f"{ref.digest}:{ref.size}")
        async with process("fetch", me, tmp_path / "id", mine, *wanted) as (victim, said):
            assert said == "fetching"
            while mine.received_bytes(ref.digest) < 3 << 20:  # noqa: ASYNC110 - another process writes
                await asyncio.sleep(0.01)
            victim.kill()
            assert await victim.wait() == -signal.SIGKILL
        assert not mine.has(ref.digest)
        assert mine.received_bytes(ref.digest) == 3 << 20
        gate.set()
        async with fetching(mine, me, [holder]) as fetcher:
            await fetcher.fetch([ref])
    assert [offset for _, offset in service.asked] == [0, 3 << 20]
    assert same(mine, theirs, [ref])
    assert mine.received_bytes(ref.digest) == 0


async def test_what_came_before_counts_once_against_the_budget(tmp_path, make_node):
    theirs, (ref, small) = filled(tmp_path / "theirs", 1000, 11)
    mine = PieceStore(tmp_path / "mine", budget_bytes=1010)
    with mine.partial(ref) as part:
        part.write(bytes(theirs.open(ref.digest)[:900]))
    async with serving(make_node(), Counting(theirs)) as holder, fetching(mine, make_node(), [holder]) as fetcher:
        with pytest.raises(Exhausted, match="holds 900 bytes and 111 more"):
            await fetcher.fetch([ref, small])
        await fetcher.fetch([ref])
        with pytest.raises(Exhausted, match=r"free: free some space, or put the home on another disk with --home"):
            await fetcher.fetch([PieceRef("0" * 64, 1 << 60)])
    assert mine.used_bytes() == 1000


class VirtualTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, wait_s: float) -> None:
        until_s = self.now_s + wait_s
        await asyncio.sleep(0)
        self.now_s = max(self.now_s, until_s)


@pytest.mark.parametrize("side", ["serving", "fetching"])
async def test_bytes_stay_within_the_limit_of_each_side(tmp_path, make_node, side):
    theirs, refs = filled(tmp_path / "theirs", *[300_000] * 6)
    time, rate = VirtualTime(), 1 << 20
    throttle = Throttle(rate, clock=time.clock, sleep=time.sleep)
    service = Counting(theirs, throttle if side == "serving" else None)
    async with serving(make_node(), service) as holder:
        stores = [PieceStore(tmp_path / name) for name in ("mine", "yours")]
        async with asyncio.TaskGroup() as group, contextlib.AsyncExitStack() as stack:
            for store in stores:
                options = {"throttle": throttle} if side == "fetching" else {}
                fetcher = await stack.enter_async_context(fetching(store, make_node(), [holder], **options))
                group.create_task(fetcher.fetch(refs)).add_done_callback(lambda _: None)
            while not all(store.has(ref.digest) for store in stores for ref in refs):
                moved = service.sent_bytes if side == "serving" else sum(store.used_bytes() for store in stores)
                assert moved <= throttle.chunk_bytes + rate * time.now_s + (side == "fetching") * (1 << 20)
                await asyncio.sleep(0.01)
    # A fetcher is limited after the chunk that it asked for is here, so its last chunk of 1 MiB may be ahead.
    assert time.now_s >= (2 * 6 * 300_000 - throttle.chunk_bytes - 300_000) / rate


async def test_devices_that_fetch_at_once_serve_each_other(tmp_path, make_node):
    theirs, refs = filled(tmp_path / "theirs", *[50_000] * 16)

    class Once(Counting):
        """Gives every piece to the first who asks only."""

        async def Fetch(self, request, context):  # noqa: N802
            if any(digest == request.digest for digest, _ in self.asked):
                raise NotFound("given away")
            async for chunk in super().Fetch(request, context):
                yield chunk

    root = Once(theirs)
    nodes = [make_node(name="root"), make_node(name="left"), make_node(name="right")]
    stores = [PieceStore(tmp_path / name) for name in ("left", "right")]
    services = [Counting(store) for store in stores]
    async with (
        serving(nodes[0], root) as first,
        serving(nodes[1], services[0]) as second,
        serving(nodes[2], services[1]) as third,
        fetching(stores[0], nodes[1], [first, second, third]) as left,
        fetching(stores[1], nodes[2], [first, second, third]) as right,
    ):
        await asyncio.gather(left.fetch(refs), right.fetch(refs))
    assert Counter(digest for digest, _ in root.asked) == Counter(ref.digest for ref in refs)
    assert all(same(store, theirs, refs) for store in stores)
    assert left.counts["right"].pieces + right.counts["left"].pieces == 16
    assert "left" not in left.counts


async def test_two_fetches_of_one_device_share_what_comes(tmp_path, make_node):
    theirs, refs = filled(tmp_path / "theirs", *[2 << 20] * 3)
    mine, service, me = PieceStore(tmp_path / "mine"), Counting(theirs), make_node()
    async with (
        serving(make_node(), service) as holder,
        fetching(mine, me, [holder]) as first,
        fetching(mine, me, [holder]) as second,
    ):
        await asyncio.gather(first.fetch(refs), second.fetch(refs))
    assert sorted(service.asked) == sorted((ref.digest, 0) for ref in refs)
    assert same(mine, theirs, refs)


def test_a_transfer_that_was_closed_changes_nothing_any_more(tmp_path):
    store, body = PieceStore(tmp_path), b"x" * 100
    ref = PieceRef(hashlib.sha256(body).hexdigest(), 100)
    late = store.partial(ref)
    late.write(body[:40])
    with pytest.raises(Conflict, match="being fetched"):
        store.partial(ref)
    late.close()
    with store.partial(ref) as part:
        for act in (lambda: late.write(body[40:]), late.finish):
            with pytest.raises(ValueError, match="closed"):
                act()
        assert part.received_bytes == 40
        part.write(body[40:])
        part.finish()
    assert bytes(store.open(ref.digest)) == body


def test_what_a_killed_process_half_wrote_is_swept(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from ganglion.agent.store import PieceStore\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "PieceStore(Path(sys.argv[1])).put(b'x' * 100)\n"
    )
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    store, writing = PieceStore(tmp_path), tmp_path / "pieces" / "ab" / f".put-{os.getpid()}-0"
    writing.parent.mkdir(exist_ok=True)
    writing.write_bytes(b"y")
    assert store.used_bytes() == 101
    store.sweep()
    assert store.used_bytes() == 1
    assert writing.exists()
