"""Lanes of both kinds over real mutual TLS on loopback: both ends in one process."""

# ruff: noqa: N802 - test names carry the case ids of shared/notes/faults.md

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lane_pair import DEADLINE_S, Pair, dial

from ganglion.wire.errors import (
    Conflict,
    DeviceLost,
    DoesNotFit,
    Exhausted,
    PermissionDenied,
    ProtocolViolation,
    Unauthenticated,
    Unreachable,
)
from ganglion.wire.frames import Dtype, Expectation, Kind
from ganglion.wire.identity import NodeKeys, Role
from ganglion.wire.lane import Lane


async def test_tensors_and_messages_both_ways(pair: Pair) -> None:
    partial = np.random.default_rng(1).standard_normal((3, 64))
    hidden = partial.astype(np.float32)
    for step in range(20):
        await asyncio.gather(
            pair.near.send_tensor(Kind.PARTIAL, step, 1, partial),
            pair.far.send_tensor(Kind.PARTIAL, step, 1, partial + 1),
        )
        expected = Expectation(Kind.PARTIAL, step, 1, Dtype.F64, 3, 64)
        np.testing.assert_array_equal(await pair.far.receive(expected), partial)
        into = np.empty_like(partial)
        assert await pair.near.receive(expected, into) is into
        np.testing.assert_array_equal(into, partial + 1)
    await pair.far.send_tensor(Kind.HIDDEN, 20, 0, hidden)
    np.testing.assert_array_equal(await pair.near.receive(Expectation(Kind.HIDDEN, 20, 0, Dtype.F32, 3, 64)), hidden)
    await pair.near.send_message(Kind.STEP, 21, b"step")
    found = await pair.far.receive_any()
    assert (found.kind, found.step, found.payload) == (Kind.STEP, 21, b"step")
    await pair.far.send_message(Kind.CANDIDATES, 21, b"candidates")
    assert await pair.near.receive(Expectation(Kind.CANDIDATES, 21)) == b"candidates"
    assert pair.near.sealing_s > 0
    assert pair.far.sealing_s > 0


async def test_two_large_writes_at_once_do_not_wait_for_each_other(pair: Pair) -> None:
    large = np.arange(8 << 20, dtype=np.uint8).reshape(8, -1)
    expected = Expectation(Kind.PARTIAL, 1, 0, Dtype.U8, *large.shape)

    async def end(lane: Lane) -> None:
        await lane.send_tensor(Kind.PARTIAL, 1, 0, large)
        np.testing.assert_array_equal(await lane.receive(expected), large)
        await lane.send_tensor(Kind.PARTIAL, 2, 0, large[:1])
        await lane.receive(Expectation(Kind.PARTIAL, 2, 0, Dtype.U8, 1, large.shape[1]))

    await asyncio.wait_for(asyncio.gather(end(pair.near), end(pair.far)), DEADLINE_S)


async def test_a_tensor_beyond_one_frame_is_refused_here(pair: Pair) -> None:
    with pytest.raises(Exhausted, match="fewer rows"):
        await pair.near.send_tensor(Kind.PARTIAL, 1, 0, np.zeros((17, 1 << 20), np.uint8))


@pytest.mark.parametrize("side", ["near", "far"])
async def test_A7_a_larger_tensor_than_the_step_says(pair: Pair, side: str) -> None:
    lane, other = (pair.near, pair.far) if side == "near" else (pair.far, pair.near)
    await other.send_tensor(Kind.PARTIAL, 1, 0, np.zeros((5, 4)))
    with pytest.raises(ProtocolViolation, match=r"\[5, 4\].*\[4, 4\]"):
        await lane.receive(Expectation(Kind.PARTIAL, 1, 0, Dtype.F64, 4, 4))
    assert lane.closed
    with pytest.raises(DeviceLost):
        await lane.send_message(Kind.STEP, 2, b"")


class Flipping:
    """Stands before a stream or socket and flips the last bit of what is sent."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.flipped = 0

    def _flip(self, message: bytes) -> bytes:
        self.flipped += 1
        return bytes(message[:-1]) + bytes([message[-1] ^ 1])

    async def write(self, message: bytes) -> None:
        await self._inner.write(self._flip(message))

    def send(self, message: bytes) -> int:
        return self._inner.send(self._flip(message))


async def test_A3_one_flipped_bit_on_the_way_ends_the_lane(pair: Pair) -> None:
    way = "_stream" if pair.near.medium == "grpc" else "_socket"
    inner = getattr(pair.near, way)
    flipping = Flipping(inner)
    setattr(pair.near, way, flipping)
    await pair.near.send_message(Kind.STEP, 1, b"step")
    setattr(pair.near, way, inner)
    with pytest.raises(ProtocolViolation, match="does not open"):
        await pair.far.receive_any()
    assert flipping.flipped == 1
    assert pair.far.closed


@pytest.mark.parametrize("side", ["near", "far"])
async def test_closing_one_end_surfaces_at_the_other_while_it_waits(pair: Pair, side: str) -> None:
    lane, other = (pair.near, pair.far) if side == "near" else (pair.far, pair.near)
    waiting = asyncio.create_task(lane.receive(Expectation(Kind.STEP, 1)))
    await asyncio.sleep(0)
    await other.close()
    with pytest.raises(DeviceLost, match="closed the lane"):
        await asyncio.wait_for(waiting, DEADLINE_S)


@pytest.mark.parametrize("side", ["near", "far"])
async def test_an_error_travels_to_the_other_end(pair: Pair, side: str) -> None:
    lane, other = (pair.near, pair.far) if side == "near" else (pair.far, pair.near)
    closing = asyncio.create_task(other.close(DoesNotFit("4 GiB are missing")))
    with pytest.raises(DoesNotFit, match="4 GiB are missing"):
        await asyncio.wait_for(lane.receive_any(), DEADLINE_S)
    await closing


async def test_close_is_returned_where_it_is_wanted(pair: Pair) -> None:
    closing = asyncio.create_task(pair.near.close())
    found = await asyncio.wait_for(pair.far.receive_any((Kind.STEP, Kind.CLOSE)), DEADLINE_S)
    assert found.kind is Kind.CLOSE
    assert pair.far.closed
    await closing


def call_of(lane: Any) -> Any:
    """The gRPC call of the dialling end: a socket ends with the call that it was agreed on in."""
    return lane._stream if lane.medium == "grpc" else lane._carrier._stream


async def test_D1_a_broken_stream_surfaces_at_once_at_the_accepting_end(pair: Pair) -> None:
    waiting = asyncio.create_task(pair.far.receive(Expectation(Kind.STEP, 1)))
    await asyncio.sleep(0)
    call_of(pair.near).cancel()
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(waiting, DEADLINE_S)
    await asyncio.wait_for(pair.far.wait_closed(), DEADLINE_S)


async def test_D1_a_broken_stream_surfaces_at_once_at_the_dialling_end(pair: Pair) -> None:
    waiting = asyncio.create_task(pair.near.receive(Expectation(Kind.STEP, 1)))
    await asyncio.sleep(0)
    await pair.bound.server.stop(0)
    with pytest.raises(DeviceLost):
        await asyncio.wait_for(waiting, DEADLINE_S)
    await asyncio.wait_for(pair.far.wait_closed(), DEADLINE_S)
    with pytest.raises(DeviceLost):
        await pair.far.send_message(Kind.STEP, 1, b"")


async def test_cancelling_a_wait_ends_the_lane(pair: Pair) -> None:
    waiting = asyncio.create_task(pair.near.receive(Expectation(Kind.STEP, 1)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert pair.near.closed  # gRPC ends the call with its reader
    await asyncio.wait_for(pair.far.wait_closed(), DEADLINE_S)


async def test_D2_a_stale_epoch_is_refused(pair: Pair, world: Any) -> None:
    with pytest.raises(Conflict, match="epoch 3; epoch 2 is refused"):
        await dial(pair.bound, pair.dialler, pair.worker.identity.verified, epoch=2)


async def test_a_stranger_to_the_plan_is_refused(pair: Pair, world: Any) -> None:
    with pytest.raises(PermissionDenied):
        await dial(pair.bound, world.node(), pair.worker.identity.verified)


async def test_B1_a_gateway_may_not_open_a_lane(pair: Pair, world: Any) -> None:
    with pytest.raises(PermissionDenied, match="not allowed"):
        await dial(pair.bound, world.node(Role.GATEWAY), pair.worker.identity.verified)


async def test_a_node_of_another_authority_is_refused(pair: Pair, make_world: Any) -> None:
    with pytest.raises(Unreachable, match=pair.bound.address):
        await dial(pair.bound, make_world().node(), pair.worker.identity.verified)


async def test_a_certificate_for_a_swapped_sealing_key_does_not_help(pair: Pair, world: Any) -> None:
    """What a dishonest coordinator can do: the right TLS identity in front of a sealing key of its own."""
    real = pair.dialler.keys
    forged = NodeKeys(real.tls_private_key, NodeKeys.generate().sealing_private_key)
    impostor = world.node(keys=forged)
    assert impostor.node_id == pair.dialler.node_id
    with pytest.raises(Unauthenticated, match="another key"):
        await dial(pair.bound, impostor, pair.worker.identity.verified)


async def test_an_address_without_anyone(world: Any) -> None:
    node = world.node()
    with pytest.raises(Unreachable, match=r"127.0.0.1:1 .*check"):
        await dial(SimpleNamespace(address="127.0.0.1:1"), node, world.node().verified)
