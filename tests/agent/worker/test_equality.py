"""Tokens of real workers on real lanes against the dumb runner on one device, and against one another."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from ganglion.agent.executor.executor import Executor
from ganglion.agent.lead.scheduler import Scheduler

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
LAYOUTS = [
    ([[1]], "mesh"),
    ([[1, 1]], "mesh"),
    ([[3, 1]], "star"),
    ([[1, 1, 1]], "mesh"),
    ([[2, 5, 1]], "star"),
    ([[1, 1, 1, 1]], "star"),
    ([[1, 0, 2]], "mesh"),
    ([[1], [1]], "mesh"),
    ([[1, 2], [3, 1]], "mesh"),
    ([[1, 1], [1, 1, 1]], "star"),
]


@pytest.mark.parametrize(("layout", "topology"), LAYOUTS, ids=str)
async def test_greedy_tokens_are_those_of_one_device(cluster, model, layout, topology):
    cut = model("llama")
    running = await cluster(cut, layout, topology)
    expected = cut.runner.greedy(PROMPT, 8)
    assert len(set(expected)) > 3
    assert await running.tokens(PROMPT, 8) == expected


@pytest.mark.parametrize("weights", ["int4", "fp32"])
@pytest.mark.parametrize("shape", ["llama", "qwen3"])
async def test_a_prompt_in_any_chunks(cluster, model, shape, weights):
    cut = model(shape, weights)
    expected = cut.runner.greedy(PROMPT, 6)
    for layout, chunk in (([[1]], 1), ([[2, 1]], 5), ([[1, 1]], 64)):
        running = await cluster(cut, layout, chunk=chunk)
        assert await running.tokens(PROMPT, 6) == expected


SAMPLINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 5.0, "top_p": 0.999},
    {"temperature": 0.0, "top_logprobs": 4},
]


async def test_sampling_with_a_seed_is_the_same_on_one_and_three(cluster, model):
    cut = model("llama")
    one, three = await cluster(cut, [[1]]), await cluster(cut, [[2, 1, 1]], "star")
    seen = set()
    for sampling in SAMPLINGS:
        options = {"seed": 11, "top_logprobs": 3} | sampling
        found, other = await one.answer(PROMPT, 8, **options), await three.answer(PROMPT, 8, **options)
        assert found[0] == other[0]  # log-probabilities too
        seen.add(tuple(token.id for token in found[0]))
        again = await three.tokens(PROMPT, 8, **(sampling | {"seed": 11}))
        assert again == [token.id for token in found[0]]
    assert len(seen) > 3
    assert await one.tokens(PROMPT, 8, temperature=1.0, seed=12) != await one.tokens(
        PROMPT, 8, temperature=1.0, seed=11
    )


async def test_sessions_at_the_same_time_give_what_they_give_alone(cluster, model):
    cut = model("llama", "int4")
    alone, together = await cluster(cut, [[1]]), await cluster(cut, [[1, 2]], sessions=2, chunk=7)
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:], PROMPT[7:19], PROMPT[:1]]
    expected = [await alone.tokens(prompt, 10) for prompt in prompts]
    assert await asyncio.gather(*(together.tokens(prompt, 10) for prompt in prompts)) == expected


async def test_sessions_that_are_put_back_go_on_as_if_nothing_had_been(cluster, model, monkeypatch):
    """Two grow beyond what the memory holds: one gives its state up, waits, and is run anew with its penalties."""
    cut = model("llama", "int4")
    put_back: list[int] = []
    next_step = Scheduler.next_step

    def watched(self, prompt_rows=None):
        step = next_step(self, prompt_rows)
        put_back.extend(step.put_back if step else ())
        return step

    monkeypatch.setattr(Scheduler, "next_step", watched)
    prompts = [(PROMPT * 30)[shift : shift + 505] for shift in range(2)]
    options = {"temperature": 0.8, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    roomy = await cluster(cut, [[1, 2]], context=640, chunk=256)
    expected = [await roomy.tokens(prompt, 16, **options) for prompt in prompts]
    assert not put_back
    tight = await cluster(
        cut, [[1, 2]], context=640, chunk=256, change=lambda plan: msgspec.structs.replace(plan, kv_tokens=1024)
    )
    assert await asyncio.gather(*(tight.tokens(prompt, 16, **options) for prompt in prompts)) == expected
    assert put_back


@pytest.mark.parametrize("weights", ["int4", "fp32"])
@pytest.mark.parametrize(
    ("layout", "topology"), [([[1, 2]], "mesh"), ([[2, 1, 1]], "star"), ([[1, 1], [2, 1]], "mesh")]
)
async def test_halves_whose_sums_travel_meanwhile_change_nothing(
    cluster, model, monkeypatch, layout, topology, weights
):
    cut = model("llama", weights)
    split: list[int] = []
    halves = Executor.halves

    def watched(self, batch):
        split.append(batch.rows)
        return halves(self, batch)

    monkeypatch.setattr(Executor, "halves", watched)
    running = await cluster(
        cut, layout, topology, chunk=8, change=lambda plan: msgspec.structs.replace(plan, overlap=True)
    )
    expected = cut.runner.greedy(PROMPT, 6)
    assert await asyncio.gather(*(running.tokens(PROMPT, 6) for _ in range(2))) == [expected] * 2
    assert set(split) <= set(range(4, 9))
    assert split


async def test_sums_that_are_rounded_on_the_way_are_those_of_the_plan_alone(cluster, model):
    """On a mesh every device rounds alike: twice the same, near what travels whole, and fewer bytes."""
    cut = model("llama", "int4-fast")
    sent, answers = {}, {}
    for payload in ("full", "fp16", "int8"):
        running = await cluster(
            cut, [[1, 1]], change=lambda plan, payload=payload: msgspec.structs.replace(plan, payload=payload)
        )
        first, again = await running.answer(PROMPT, 8, top_logprobs=0), await running.answer(PROMPT, 8, top_logprobs=0)
        assert first[0] == again[0]
        answers[payload] = [token.logprob for token in first[0]]
        sent[payload] = running.lanes(0)[1].sent_bytes
    assert sent["int8"] < sent["fp16"] < sent["full"]
    for payload, tolerance in (("fp16", 0.05), ("int8", 0.5)):
        assert abs(answers[payload][0] - answers["full"][0]) < tolerance
