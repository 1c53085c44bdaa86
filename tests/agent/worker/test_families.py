"""What a family declares, run by real workers on real lanes: tokens are those of the dumb runner on one device."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import msgspec
import pytest
from family_shapes import FIRST

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
MIXTURES = ("mixtral", "olmoe", "qwen3-moe", "gpt-oss", "deepseek-lite")
# Where a layer norms or multiplies what a half adds, residual and sum travel apart between stages.
PARTS = ("gemma2", "gemma3", "olmo2", "olmo3", "granite")


@pytest.mark.parametrize("name", [*FIRST.values(), *MIXTURES])
async def test_tokens_of_a_pipeline_of_uneven_stages(cluster, model, name):
    cut = model(name)
    assert (cut.manifest.handover == "parts") == (name.split("-")[0] in PARTS)
    expected = cut.runner.greedy(PROMPT, 8)
    assert len(set(expected)) > 3
    running = await cluster(cut, [[1, 2], [3]], chunk=7)
    assert await running.tokens(PROMPT, 8) == expected


@pytest.mark.parametrize("name", ["olmo2-kv2", "granite-kv2", "cohere-kv3-biases", "gemma3-kv3-biases"])
async def test_tokens_of_three_devices_one_of_them_without_heads(cluster, model, name):
    cut = model(name)
    running = await cluster(cut, [[4, 1, 2]], "star", chunk=5)
    assert await running.tokens(PROMPT, 8) == cut.runner.greedy(PROMPT, 8)


@pytest.mark.parametrize("name", ["olmo2-kv1-tied", "cohere-kv1", "phi3-kv1-long"])
async def test_sessions_side_by_side_with_one_key_value_head(cluster, model, name):
    """Steps of several sessions copy rows to and from attention, what a segment carries among them."""
    cut = model(name)
    alone, together = await cluster(cut, [[1]]), await cluster(cut, [[1, 2]], chunk=7)
    prompts = [PROMPT, PROMPT[5:]]
    expected = [await alone.tokens(prompt, 8) for prompt in prompts]
    assert expected[0] == cut.runner.greedy(PROMPT, 8)
    assert await asyncio.gather(*(together.tokens(prompt, 8) for prompt in prompts)) == expected


async def test_wide_heads_in_a_context_below_their_padding(cluster, model):
    cut = model("gemma3-kv1-wide")
    running = await cluster(cut, [[1, 2]], context=30, chunk=4)
    assert await running.tokens(PROMPT, 8) == cut.runner.greedy(PROMPT, 8)


async def test_stages_that_handed_on_a_sum_would_be_caught(cluster, model):
    """The comparison above can fail: the norm of what the last half added is lost in a sum."""
    cut = model("gemma2-kv2-tied")
    spoiled = replace(cut, manifest=msgspec.structs.replace(cut.manifest, handover="sum"))
    running = await cluster(spoiled, [[1], [1]])
    assert await running.tokens(PROMPT, 8) != cut.runner.greedy(PROMPT, 8)
