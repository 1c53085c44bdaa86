"""Lanes over sockets: what may come on the wire, who waits for whom, and how they end."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
import os
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lane_pair import DEADLINE_S, Pair, lane_pair

from ganglion.wire import lane_socket
from ganglion.wire.errors import DeviceLost, DoesNotFit, GanglionError, ProtocolViolation
from ganglion.wire.frames import HEADER_BYTES, OVERHEAD_BYTES, Dtype, Ends, Expectation, Kind, message_header
from ganglion.wire.lane_socket import SocketLane
from ganglion.wire.sealing import Opener, Sealer

EXPECTED = Expectation(Kind.PARTIAL, 1, 0, Dtype.F64, 2, 8)
TENSOR = np.arange(16.0).reshape(2, 8)


class Carrier:
    """What a socket lane knows of the lane that carries it: that it ends."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait_closed(self) -> None:
        await self.ended.wait()

    def cut(self) -> None:
        self.ended.set()

    async def _shut(self) -> None:
        self.ended.set()


class Bare:
    """Socket lanes over TCP without the lanes that they were agreed on in: many can be made in a moment."""

    def __init__(self) -> None:
        self.lanes: list[SocketLane] = []

    def make(self, near_rank: int = 0, far_rank: int = 1) -> tuple[SocketLane, SocketLane]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            ends = [socket.create_connection(server.getsockname())]
            ends.append(server.accept()[0])
        there, back = os.urandom(32), os.urandom(32)
        made = []
        for end, keys, ranks in zip(
            ends, [(there, back), (back, there)], [(near_rank, far_rank), (far_rank, near_rank)], strict=True
        ):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conversation: Any = SimpleNamespace(
                peer=SimpleNamespace(node_id="peer"),
                opening=SimpleNamespace(deployment="demo", epoch=3),
                sealer=Sealer(keys[0]),
                opener=Opener(keys[1]),
            )
            carrier: Any = Carrier()
            made.append(SocketLane(end, conversation, *ranks, carrier))
        self.lanes += made
        return made[0], made[1]


@pytest.fixture
async def bare() -> AsyncIterator[Bare]:
    made = Bare()
    async with asyncio.timeout(60):
        yield made
        await asyncio.gather(*(lane.close() for lane in made.lanes))
    assert not lane_socket._UNSENT


@pytest.fixture
async def pair(world: Any) -> AsyncIterator[Pair]:
    async with lane_pair(world, "socket", "socket") as made:
        yield made


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_socket, "IN_PLACE_S", 0.001)  # both ends share a loop: waiting in place only holds it up


async def captured(lane: SocketLane, peer: SocketLane) -> bytes:
    """The bytes of one frame of TENSOR, taken off the wire."""
    await lane.send_tensor(Kind.PARTIAL, 1, 0, TENSOR)
    frame = await asyncio.get_running_loop().sock_recv(peer._socket, 1 << 16)
    assert len(frame) == TENSOR.nbytes + OVERHEAD_BYTES
    return frame


def offsets() -> Iterator[int]:
    yield from range(HEADER_BYTES + 3)
    yield from (HEADER_BYTES + TENSOR.nbytes - 1, HEADER_BYTES + TENSOR.nbytes, OVERHEAD_BYTES + TENSOR.nbytes - 1)


async def test_A2_a_frame_cut_anywhere_is_a_lost_peer(bare: Bare) -> None:
    for offset in offsets():
        near, far = bare.make()
        frame = await captured(near, far)
        near._socket.send(frame[:offset])
        near._socket.shutdown(socket.SHUT_WR)
        with pytest.raises(DeviceLost, match="closed its socket"):
            await asyncio.wait_for(far.receive(EXPECTED), DEADLINE_S)
        assert far.closed


async def test_A3_a_bit_flipped_anywhere_ends_the_lane(bare: Bare) -> None:
    for offset in (*offsets(), HEADER_BYTES + 40):
        near, far = bare.make()
        frame = bytearray(await captured(near, far))
        frame[offset] ^= 0x10
        near._socket.send(frame)
        into = np.zeros_like(TENSOR)
        with pytest.raises(ProtocolViolation):
            await asyncio.wait_for(far.receive(EXPECTED, into), DEADLINE_S)
        assert far.closed
        with pytest.raises(DeviceLost):
            await far.receive(EXPECTED, into)


async def test_B8_a_frame_that_comes_again_is_refused(bare: Bare) -> None:
    near, far = bare.make()
    frame = await captured(near, far)
    near._socket.send(frame + frame)
    np.testing.assert_array_equal(await far.receive(EXPECTED), TENSOR)
    with pytest.raises(ProtocolViolation, match="does not open"):
        await far.receive(EXPECTED)


@pytest.mark.parametrize(
    ("ends", "step", "names"),
    [
        (Ends(2, 0, 1), 1, "epoch 2"),
        (Ends(3, 2, 1), 1, "rank 2"),
        (Ends(3, 1, 0), 1, "rank 1 to 0"),
        (Ends(3, 0, 1), 2, "step is 2"),
    ],
)
async def test_D2_a_frame_of_another_epoch_rank_or_step(bare: Bare, ends: Ends, step: int, names: str) -> None:
    near, far = bare.make()
    await near._send(Expectation(*EXPECTED)._replace(step=step).pack(ends), TENSOR.tobytes())
    with pytest.raises(ProtocolViolation, match=names):
        await far.receive(EXPECTED)


async def test_a_byte_at_a_time(bare: Bare) -> None:
    near, far = bare.make()
    frame = await captured(near, far)
    waiting = asyncio.create_task(far.receive(EXPECTED))
    for byte in frame:
        near._socket.send(bytes([byte]))
        await asyncio.sleep(0)
    np.testing.assert_array_equal(await asyncio.wait_for(waiting, DEADLINE_S), TENSOR)


async def test_A8_four_gib_declared_is_refused_by_the_header(bare: Bare) -> None:
    near, far = bare.make()
    tracemalloc.start()
    header = bytearray(message_header(Kind.STEP, Ends(3, 0, 1), 1, 0, 4))
    header[-4:] = struct.pack("<I", 2**32 - 1)
    near._socket.send(header + bytes(1024))
    try:
        with pytest.raises(ProtocolViolation, match="declares 4294967295"):
            await far.receive_any()
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


async def test_A8_who_stops_within_a_frame_is_cut_in_time_and_gets_no_memory(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_socket, "FIRST_FRAME_S", 0.05)
    monkeypatch.setattr(lane_socket, "_SLOWEST_BYTES_PER_S", 1 << 30)
    for sent in (HEADER_BYTES + 1024, HEADER_BYTES, 5):
        near, far = bare.make()
        header = message_header(Kind.STEP, Ends(3, 0, 1), 1, 0, 4 << 20)
        near._socket.send((header + bytes(1024))[:sent])
        held = len(far._view)
        with pytest.raises(DeviceLost, match="stopped within a frame"):
            await asyncio.wait_for(far.receive_any(), DEADLINE_S)
        assert len(far._view) == held


async def test_a_large_frame_and_what_follows_it(bare: Bare) -> None:
    near, far = bare.make()
    large = np.random.default_rng(2).integers(0, 255, (3, 1 << 20), np.uint8)
    for step in range(3):
        sending = asyncio.create_task(near.send_tensor(Kind.HIDDEN, step, 0, large[: step + 1]))
        into = np.empty_like(large[: step + 1])
        await far.receive(Expectation(Kind.HIDDEN, step, 0, Dtype.U8, *into.shape), into)
        np.testing.assert_array_equal(into, large[: step + 1])
        await sending
        await near.send_message(Kind.STEP, step, b"next")
        await near.send_message(Kind.STEP, step, b"and next")
        assert [(await far.receive_any()).payload for _ in range(2)] == [b"next", b"and next"]


async def test_what_is_sent_may_be_changed_at_once(bare: Bare) -> None:
    near, far = bare.make()
    large = np.ones((8, 1 << 20), np.uint8)
    await near.send_tensor(Kind.HIDDEN, 1, 0, large)
    assert {near} == lane_socket._UNSENT  # more than the kernel holds
    large[...] = 7
    found = await far.receive(Expectation(Kind.HIDDEN, 1, 0, Dtype.U8, *large.shape))
    assert found.min() == found.max() == 1


async def test_three_ends_with_large_sums_at_once(bare: Bare) -> None:
    """Each sends to both others before it reads: nobody may sleep on one lane while another has not sent all."""
    lanes: dict[tuple[int, int], SocketLane] = {}
    for low, high in ((0, 1), (0, 2), (1, 2)):
        lanes[low, high], lanes[high, low] = bare.make(low, high)
    parts = [np.full((8, 1 << 20), rank, np.uint8) for rank in range(3)]

    async def end(rank: int) -> None:
        others = [other for other in range(3) if other != rank]
        for step in range(2):
            for other in others:
                await lanes[rank, other].send_tensor(Kind.PARTIAL, step, 0, parts[rank])
            for other in others:
                found = await lanes[rank, other].receive(Expectation(Kind.PARTIAL, step, 0, Dtype.U8, 8, 1 << 20))
                assert found[0, 0] == found[-1, -1] == other

    await asyncio.wait_for(asyncio.gather(*(end(rank) for rank in range(3))), DEADLINE_S)


async def test_who_waits_long_leaves_the_loop_to_others(bare: Bare) -> None:
    near, far = bare.make()
    waiting = asyncio.create_task(far.receive_any())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert far._readable is not None  # asleep in the event loop, which runs this
    await near.send_message(Kind.STEP, 1, b"step")
    assert (await asyncio.wait_for(waiting, DEADLINE_S)).payload == b"step"


async def test_what_is_there_is_taken_without_the_loop(bare: Bare) -> None:
    near, far = bare.make()
    await near.send_tensor(Kind.PARTIAL, 1, 0, TENSOR)
    receiving = far.receive(EXPECTED)
    with pytest.raises(StopIteration) as done:
        receiving.send(None)  # it never waits
    np.testing.assert_array_equal(done.value.value, TENSOR)


@pytest.mark.parametrize("reset", [False, True])
async def test_D1_a_killed_peer_is_noticed_while_waiting(bare: Bare, reset: bool) -> None:
    near, far = bare.make()
    waiting = asyncio.create_task(far.receive_any())
    while far._readable is None:  # noqa: ASYNC110 - until it sleeps in the event loop
        await asyncio.sleep(0)
    if reset:  # what the kernel does for a process that is killed with unread bytes
        near._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near._socket.close()
    near._fd = -1
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(waiting, DEADLINE_S)
    assert far._carrier.ended.is_set()  # type: ignore[attr-defined]
    with pytest.raises(DeviceLost):
        await far.send_message(Kind.STEP, 1, b"")


@pytest.mark.parametrize("side", ["near", "far"])
async def test_the_end_of_the_grpc_lane_ends_the_socket(pair: Pair, side: str) -> None:
    lane: Any = getattr(pair, side)
    lane._carrier.cut()
    for end in (pair.near, pair.far):
        await asyncio.wait_for(end.wait_closed(), DEADLINE_S)
        with pytest.raises(DeviceLost):
            await end.receive_any()


@pytest.mark.parametrize("side", ["near", "far"])
async def test_the_end_of_the_socket_ends_the_grpc_lane_and_the_other_end(pair: Pair, side: str) -> None:
    lane: Any = getattr(pair, side)
    lane._socket.shutdown(socket.SHUT_RDWR)
    with pytest.raises(DeviceLost):
        await lane.receive_any()
    for end in (pair.near, pair.far):  # nobody reads at the other one
        await asyncio.wait_for(end.wait_closed(), DEADLINE_S)
        assert end._carrier.closed


async def test_last_words_are_heard_although_the_grpc_lane_is_over(pair: Pair) -> None:
    far: Any = pair.far
    await pair.near.send_message(Kind.ERROR, 0, b'{"code":"does_not_fit","message":"4 GiB are missing","param":null}')
    near: Any = pair.near
    near._carrier._abandon()
    await asyncio.wait_for(far._carrier.wait_closed(), DEADLINE_S)
    with pytest.raises(GanglionError) as said:
        await far.receive_any()
    assert isinstance(said.value, DoesNotFit)


async def test_closing_on_unread_bytes_does_not_swallow_the_farewell(pair: Pair) -> None:
    await pair.far.send_tensor(Kind.PARTIAL, 1, 0, TENSOR)  # never read
    closing = asyncio.create_task(pair.near.close(DoesNotFit("4 GiB are missing")))
    with pytest.raises(DoesNotFit):
        await asyncio.wait_for(pair.far.receive_any(), DEADLINE_S)
    await closing
