"""A class that mixes formats: tokens of real workers against the dumb runner, which goes by roles too."""

from __future__ import annotations

import asyncio

import pytest

from ganglion.agent import control
from ganglion.agent.roles import to_number
from ganglion.proto import lane_pb2
from ganglion.wire.frames import Kind

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
DEADLINE_S = 20.0


async def test_tokens_are_those_of_the_dumb_runner(cluster, model):
    cut = model("llama", "mixed")
    expected = cut.runner.greedy(PROMPT, 10)
    assert expected != model("llama", "int4").runner.greedy(PROMPT, 10)  # the roles matter here
    for layout, chunk in (([[1]], 64), ([[3, 1]], 5), ([[1], [2, 1]], 1), ([[1], [1]], 16)):
        running = await cluster(cut, layout, chunk=chunk)
        assert await running.tokens(PROMPT, 10) == expected


@pytest.mark.parametrize("shape", ["cohere-kv3-biases", "olmo2-kv2", "qwen3-kv3-tied"])
async def test_segments_that_keep_carry_and_normalize(cluster, model, shape):
    cut = model(shape, "mixed")
    running = await cluster(cut, [[2, 1]], chunk=7)
    assert await running.tokens(PROMPT, 8) == cut.runner.greedy(PROMPT, 8)


@pytest.mark.parametrize("layout", [[[1]], [[3, 1]], [[1], [1]]], ids=str)
async def test_prompts_that_arrive_while_others_are_answered(cluster, model, layout):
    """Steps take turns by role; whoever comes when, each session gets what it gets alone."""
    cut = model("llama", "mixed")
    running = await cluster(cut, layout, sessions=3, chunk=6)
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:], PROMPT[:1], PROMPT[7:19]]
    alone = [await running.tokens(prompt, 14, temperature=0.8, seed=3) for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    steps = _count_roles(running)
    assert await asyncio.gather(*(running.tokens(prompt, 14, temperature=0.8, seed=3) for prompt in prompts)) == alone
    between = [one for at, one in enumerate(steps[1:]) if one != steps[at]]
    assert len(between) >= 4  # they did arrive in the middle


def _count_roles(running):
    """The role of every step that the lead's executor begins from now on."""
    executor, seen = running.workers[0]._loaded.executor, []
    begin = executor.begin

    def count(entries, role, takes):
        seen.append(role)
        return begin(entries, role, takes)

    executor.begin = count
    return seen


@pytest.mark.parametrize(("weights", "role"), [("mixed", 0), ("mixed", 9), ("fp32", 1), ("fp32", 2)])
async def test_a_role_that_the_class_does_not_have_ends_the_deployment(cluster, model, weights, role):
    running = await cluster(model("llama", weights), [[1, 1]])
    step = lane_pb2.Step(step=1, entries=[lane_pb2.StepEntry(session=1, start=0, count=1)], role=role)
    async with asyncio.timeout(DEADLINE_S):
        await running.lanes(0)[1].send_message(Kind.STEP, 1, step.SerializeToString())
        lost = await running.heard(1, control.PeerLost)
    assert "a step of role" in lost.reason


def test_roles_have_numbers_of_their_own():
    assert {to_number(role) for role in ("any", "prompt", "generated")} == {0, 1, 2}
