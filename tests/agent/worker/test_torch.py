"""Workers that compute with torch, on real lanes: the tokens of ONNX Runtime's, alone, in shares and mixed."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from verify_session import Device, opening

from ganglion.proto import lane_pb2
from ganglion.wire.prefixes import Prefix

TORCH = "torch:cpu:fp32"


@pytest.mark.parametrize(
    ("layout", "executors"),
    [([[1]], [TORCH]), ([[1, 1]], [TORCH, TORCH]), ([[1, 1]], ["ort", TORCH]), ([[1], [1]], [TORCH, "ort"])],
)
async def test_tokens(model, cluster, layout, executors):
    made = model("llama")
    ort, ours = await cluster(made, [[1]]), await cluster(made, layout, executors=executors)
    prompts = [list(range(3, 40)), [250, 9, 31, 77]]
    for sampling in ({}, {"temperature": 0.8, "seed": 11}):
        true = [await ort.tokens(prompt, 16, **sampling) for prompt in prompts]
        assert await asyncio.gather(*(ours.tokens(prompt, 16, **sampling) for prompt in prompts)) == true


async def test_branches_beside_windows(model, cluster, wide_windows):
    """An oracle that puts the right token into a branch: a chain is left where it is wrong, and gone on from there."""
    made = model("llama")
    running = await cluster(made, [[1]], chunk=24, executors=[TORCH])
    running.workers[0]._lead._speculating.tree_rows = 8
    prompt = list(range(3, 40))
    expected = await running.tokens(prompt, 30)

    def draft(device: Device, prefix: Prefix) -> lane_pb2.Drafts:
        told = expected[len(device.tokens) : len(device.tokens) + 5] or [1]
        wrong = lane_pb2.Branch(parent=prefix.name, tokens=[told[0], *((one + 1) % 97 for one in told[1:])])
        right = lane_pb2.Branch(parent=prefix.then(told[0]).name, tokens=told[1:] or [1])
        return lane_pb2.Drafts(round=len(device.outcomes), branches=[wrong, right])

    device = Device()
    await device.run(running.client, opening(made.manifest, prompt, 30), draft)
    assert device.tokens == expected
    assert sum(one.branched for one in device.outcomes) > 2


async def test_a_session_is_told_whose_kernels_draw(model, cluster):
    running = await cluster(model("llama"), [[1]], executors=[TORCH])
    sampling = lane_pb2.Sampling(top_p=1.0, top_logprobs=-1)
    wanted = lane_pb2.Open(request_id="r", prompt=[1, 2], max_tokens=2, sampling=sampling)
    async with asyncio.timeout(20), contextlib.aclosing(running.client.run(wanted)) as events:
        said = [event.accepted.numeric_class async for event in events if event.WhichOneof("body") == "accepted"]
    assert said == ["fp32-fast@torch-cpu-fp32"]
