"""Sums as they travel: sizes, how far rounding moves them, and that every device ends with the same numbers."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from ganglion.agent.exchange.allreduce import AllReduce
from ganglion.agent.exchange.payload import decode, encode
from ganglion.agent.exchange.plan import plan_exchange
from ganglion.wire.payload import BLOCK, dtype_of, width_of

RNG = np.random.default_rng(3)


def travelled(payload: str, sums: np.ndarray) -> np.ndarray:
    travels = np.empty((len(sums), width_of(payload, sums.shape[1])), dtype_of(payload, sums.dtype))
    encode(payload, sums.copy(), travels)
    found = np.empty_like(sums)
    decode(payload, travels, found)
    return found


@pytest.mark.parametrize("columns", [BLOCK, 4 * BLOCK, 100, 7])
def test_rounding_is_within_half_a_level_of_each_block(columns):
    sums = (RNG.standard_normal((5, columns)) * 10.0 ** RNG.integers(-4, 4, (5, 1))).astype(np.float32)
    sums[2] = 0
    found = travelled("int8", sums)
    for row in range(5):
        for at in range(0, columns, BLOCK):
            block = sums[row, at : at + BLOCK]
            level = np.abs(block).max() / 127
            assert np.abs(found[row, at : at + BLOCK] - block).max() <= 0.5001 * level
    assert np.array_equal(travelled("fp16", sums), sums.astype(np.float16).astype(np.float32))
    assert np.array_equal(travelled("int8", found), travelled("int8", travelled("int8", found)))  # it settles


def test_what_float16_does_not_hold_saturates_and_what_is_no_number_stays_none():
    sums = np.array([[1e30, -1e30, 1.0, np.nan]], np.float32)
    found = travelled("fp16", sums)
    assert found[0, :3].tolist() == [65504.0, -65504.0, 1.0]
    assert np.isnan(found[0, 3])
    assert np.isnan(travelled("int8", sums)).any()


class Wires:
    """Lanes between ranks in one process: what was sent is a copy, what is received must be what was announced."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], asyncio.Queue] = {}

    def lane(self, own: int, peer: int):
        wires = self

        class Lane:
            async def send_tensor(self, kind, step, exchange, array):
                wires.queue(own, peer).put_nowait((step, exchange, array.copy()))

            async def receive(self, expected, into=None):
                step, exchange, array = await wires.queue(peer, own).get()
                assert (step, exchange) == (expected.step, expected.exchange)
                assert array.shape == (expected.rows, expected.columns) == into.shape
                assert array.dtype == into.dtype
                into[...] = array

        return Lane()

    def queue(self, source: int, target: int) -> asyncio.Queue:
        return self.queues.setdefault((source, target), asyncio.Queue())


@pytest.mark.parametrize("payload", ["full", "fp16", "int8"])
@pytest.mark.parametrize("topology", ["mesh", "star"])
@pytest.mark.parametrize("giving", [(0, 1, 2), (1, 2), (0,)])
async def test_every_device_ends_with_the_same_sum(payload, topology, giving):
    wires, ranks = Wires(), (0, 1, 2)
    own = [RNG.standard_normal((3, 96)).astype(np.float32) for _ in ranks]
    for rank in ranks:
        if rank not in giving:
            own[rank][...] = 0
    exact = sum(own[rank] for rank in giving)
    reduces = [
        AllReduce(
            plan_exchange(ranks, giving, topology, rank),
            rank,
            {other: wires.lane(rank, other) for other in ranks if other != rank},
            payload,
        )
        for rank in ranks
    ]

    async def summed(one: AllReduce, sums: np.ndarray) -> None:
        await one.give(1, 0, sums)
        await one.take(1, 0, sums)

    await asyncio.gather(*(summed(one, sums) for one, sums in zip(reduces, own, strict=True)))
    assert np.array_equal(own[0], own[1])
    assert np.array_equal(own[0], own[2])
    assert np.abs(own[0] - exact).max() <= {"full": 1e-6, "fp16": 0.02, "int8": 0.15}[payload]
