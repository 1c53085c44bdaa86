"""Workers whose lanes are sockets: the same tokens, and the same end as over gRPC."""

from __future__ import annotations

import contextlib

import pytest

from ganglion.agent import control
from ganglion.proto import lane_pb2
from ganglion.wire import lane_socket
from ganglion.wire.errors import DeviceLost

PROMPT = list(range(65, 85))


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    monkeypatch.setattr(lane_socket, "SPIN_S", 0.0)  # the workers share a loop: waiting in place only holds it up
    monkeypatch.setattr(lane_socket, "IN_PLACE_S", 0.0)


def media(running) -> set[str]:
    return {lane.medium for rank in range(len(running.workers)) for lane in running.lanes(rank).values()}


@pytest.mark.parametrize(
    ("layout", "topology"), [([[2, 1]], "mesh"), ([[1, 1, 1]], "star"), ([[1, 2], [3, 1]], "mesh")], ids=str
)
async def test_tokens_are_those_of_one_device_and_of_grpc(cluster, model, layout, topology):
    cut = model("llama", "int4")
    sockets = await cluster(cut, layout, topology, lanes="auto")
    grpc = await cluster(cut, layout, topology, lanes="grpc")
    assert (media(sockets), media(grpc)) == ({"socket"}, {"grpc"})
    expected = cut.runner.greedy(PROMPT, 8)
    for running in (sockets, grpc):
        assert await running.tokens(PROMPT, 8) == expected
    options = {"temperature": 1.0, "seed": 5, "top_logprobs": 3}
    assert (await sockets.answer(PROMPT, 6, **options))[0] == (await grpc.answer(PROMPT, 6, **options))[0]


@pytest.mark.parametrize("victim", [1, 2])
async def test_a_device_lost_while_it_answers(cluster, model, victim):
    running = await cluster(model("llama"), [[1, 1, 1]], context=4096, lanes="socket")
    sampling = lane_pb2.Sampling(top_p=1, top_logprobs=-1)
    asked = lane_pb2.Open(prompt=PROMPT, max_tokens=4000, sampling=sampling)
    async with contextlib.aclosing(running.client.run(asked)) as events:
        tokens = 0
        while tokens < 3:
            tokens += len((await anext(events)).tokens.tokens)
        for lane in running.lanes(victim).values():  # as the kernel does for a process that is killed
            lane._socket.close()
            lane._fd = -1
            lane._carrier.cut()
        with pytest.raises(DeviceLost, match=f"device-{victim}"):
            async for _ in events:
                pass
    assert (await running.heard(0, control.PeerLost)).node_id == running.plan.devices[victim]


async def test_a_device_lost_while_nobody_asks(cluster, model):
    running = await cluster(model("llama"), [[1, 1]], lanes="socket")
    await running.tokens(PROMPT, 2)
    for lane in running.lanes(1).values():
        lane._end()
    assert (await running.heard(0, control.PeerLost)).node_id == running.plan.devices[1]
    with pytest.raises(DeviceLost, match="device-1"):
        await running.tokens(PROMPT, 2)


async def test_a_device_without_sockets_is_served_over_grpc(cluster, model):
    cut = model("llama", "int4")
    running = await cluster(cut, [[1, 1]], lanes=["auto", "grpc"])
    assert media(running) == {"grpc"}
    assert await running.tokens(PROMPT, 4) == cut.runner.greedy(PROMPT, 4)
