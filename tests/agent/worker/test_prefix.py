"""State that is kept of earlier prompts, by real workers on real lanes: the same tokens, of nobody else's prompt."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import numpy as np
import pytest

from ganglion.agent import control
from ganglion.agent.executor.executor import Executor
from ganglion.agent.lead.prefix import PrefixIndex
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.certificates import Role
from ganglion.wire.errors import DeviceLost, Internal, InvalidRequest
from ganglion.wire.limits import TENANT_BYTES
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS as BLOCK
from ganglion.wire.session import SessionClient

CONTEXT = 512
CHAT = [int(one) for one in np.random.default_rng(7).integers(0, 283, 5 * BLOCK)]
SAMPLED = {"temperature": 1.0, "seed": 3, "top_logprobs": 4}


def keeping(tokens: int):
    return lambda plan: msgspec.structs.replace(plan, prefix_tokens=tokens)


async def turn(running, prompt, count: int = 12, tenant: str = "", client=None, **sampling):
    """(tokens with their log-probabilities, how many of the prompt were cached)."""
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": 4} | sampling
    request = lane_pb2.Open(prompt=prompt, max_tokens=count, sampling=lane_pb2.Sampling(**described), tenant=tenant)
    found = []
    async with asyncio.timeout(20.0), contextlib.aclosing((client or running.client).run(request)) as events:
        async for event in events:
            found += event.tokens.tokens
            if event.WhichOneof("body") == "tokens":
                cached = event.tokens.cached_tokens
            if event.WhichOneof("body") == "finished":
                assert event.finished.cached_tokens == cached
    return found, cached


def ids(tokens) -> list[int]:
    return [token.id for token in tokens]


@pytest.mark.parametrize(("layout", "weights"), [([[1]], "int4"), ([[3, 1]], "fp32"), ([[1, 1], [1]], "int4")], ids=str)
async def test_tokens_and_log_probabilities_are_those_without_a_cache(cluster, model, layout, weights):
    """F3: turns of a chat that go on, branch off and repeat; odd and even numbers of rows after what was kept."""
    cut = model("llama", weights)
    plain = await cluster(cut, layout, context=CONTEXT)
    kept = await cluster(cut, layout, context=CONTEXT, change=keeping(CONTEXT))
    answer, cached = await turn(kept, CHAT[:70], 35, **SAMPLED)
    assert cached == 0
    assert answer == (await turn(plain, CHAT[:70], 35, **SAMPLED))[0]
    second = CHAT[:70] + ids(answer)
    for prompt, found in (
        ([*second, 5, 6], [3, 3]),  # the answer's tokens too
        ([*second, 5, 6, 7], [3, 3]),
        (second[: 2 * BLOCK + 1], [2, 2]),  # one row is left to run
        (second[: 2 * BLOCK], [1, 1]),  # never the whole prompt
        ([*second[:40], 250, *second[41:]], [1, 3]),
    ):
        for sampling, blocks in zip(({}, SAMPLED), found, strict=True):
            here, cached = await turn(kept, prompt, 6, **sampling)
            assert cached == blocks * BLOCK
            assert here == (await turn(plain, prompt, 6, **sampling))[0]
    assert all(worker._loaded.executor._prefixes.bytes > 0 for worker in kept.workers)
    assert all(worker._loaded.executor._prefixes.bytes == 0 for worker in plain.workers)


async def test_eviction_under_pressure_changes_no_token(cluster, model):
    """More chats than there is room for, several at a time, on blocks that are written over again and again."""
    cut = model("llama")
    plain = await cluster(cut, [[1]], context=CONTEXT)
    kept = await cluster(cut, [[2, 1]], context=CONTEXT, sessions=3, change=keeping(4 * BLOCK))
    prompts = [CHAT[at : at + 75] for at in range(0, 50, 10)] * 2 + [CHAT[:75], CHAT[:90], CHAT[:40] + CHAT[:60]] * 2
    expected = [ids((await turn(plain, prompt, 5))[0]) for prompt in prompts]
    found = await asyncio.gather(*(turn(kept, prompt, 5) for prompt in prompts))
    assert [ids(tokens) for tokens, _ in found] == expected
    assert len({cached for _, cached in found}) > 1
    block_bytes = BLOCK * 2 * 4 * 16 * 4 * 4  # keys and values, float32, head_dim, groups, layers
    assert sum(worker._loaded.executor._prefixes.bytes for worker in kept.workers) == 4 * block_bytes


async def test_a_prompt_that_is_cancelled_half_way(cluster, model, monkeypatch):
    """What was run of it is kept; whoever comes next goes on there, with the same tokens."""
    cut = model("llama")
    kept = await cluster(cut, [[1, 1]], context=CONTEXT, chunk=16, change=keeping(CONTEXT))
    lead, forward = kept.workers[0]._lead, kept.workers[0]._lead._runner.forward
    there, going_on = asyncio.Event(), asyncio.Event()

    async def slowly(step, batch):
        if batch.entries[0].start >= 3 * BLOCK:
            there.set()
            await going_on.wait()
        await forward(step, batch)

    monkeypatch.setattr(lead._runner, "forward", slowly)
    leaving = asyncio.create_task(turn(kept, CHAT))
    await asyncio.wait_for(there.wait(), 20.0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    async with asyncio.timeout(20.0):
        while lead._sessions:  # noqa: ASYNC110 - until the lead has heard of it, in the midst of a step
            await asyncio.sleep(0.005)
    going_on.set()
    found, cached = await turn(kept, CHAT, 5)
    assert cached == 3 * BLOCK
    assert ids(found) == cut.runner.greedy(CHAT, 5)


async def test_f5_no_hit_across_tenants_and_gateways(cluster, model, world):
    """Whoever sends another's prompt learns nothing: no block of it is found, whatever he calls himself."""
    running = await cluster(model("llama"), [[1]], context=CONTEXT, change=keeping(8 * CONTEXT))
    other = world.node(Role.GATEWAY)
    own = running.client._identity
    entries = tuple(
        control.PeerEntry(record=one.record.SerializeToString(), address="", name="g") for one in (own, other)
    )
    await running.workers[0].handle(control.Gateways(gateways=entries))
    client = SessionClient(other, _lead_of(running), "demo", 7)
    try:
        expected, cached = await turn(running, CHAT, tenant="alice")
        assert cached == 0
        for tenant, by in (
            ("", None),
            ("bob", None),
            ("alice ", None),
            ("Alice", None),
            ("alice", client),
            ("", client),
        ):
            found, cached = await turn(running, CHAT, tenant=tenant, client=by)
            assert (found, cached) == (expected, 0), tenant
        for tenant, by in (("alice", None), ("bob", None), ("alice", client)):  # and each finds its own
            assert (await turn(running, CHAT, tenant=tenant, client=by))[1] == 4 * BLOCK
        with pytest.raises(InvalidRequest, match="tenant"):
            await turn(running, CHAT, tenant="é" * (TENANT_BYTES // 2 + 1))
    finally:
        await client.close()


def _lead_of(running):
    loaded = running.workers[0]._loaded
    return identity_pb2.Peer(record=loaded.identity.record, address=f"127.0.0.1:{loaded.server.port}", name="lead")


async def test_a_follower_refuses_what_no_lead_of_the_plan_says(cluster, model, monkeypatch):
    running = await cluster(model("llama"), [[1, 1]], context=CONTEXT, change=keeping(CONTEXT))
    monkeypatch.setattr(PrefixIndex, "keep", lambda *_: (0, [CONTEXT // BLOCK]))
    monkeypatch.setattr(running.workers[0]._loaded.executor, "prepare", lambda *_: None)  # a lead without scruples
    with pytest.raises(DeviceLost, match="block 16; the plan has 16"):
        await turn(running, CHAT[:70], 200)
    assert (await running.heard(1, control.PeerLost)).node_id == running.plan.devices[0]


async def test_what_is_not_finite_is_not_found_again(cluster, model, monkeypatch):
    running = await cluster(model("llama"), [[1, 1]], context=CONTEXT, change=keeping(CONTEXT))
    expected, _ = await turn(running, CHAT, 3)
    spoiled, logits = running.workers[1]._loaded.executor, Executor.logits

    def spoil(self, batch, rows):
        found = logits(self, batch, rows)
        if self is spoiled:
            found[0, 3] = np.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "logits", spoil)
        with pytest.raises(Internal, match="numeric_error"):
            await turn(running, CHAT, 3)
    assert await turn(running, CHAT, 3) == (expected, 0)
    assert await turn(running, CHAT, 3) == (expected, 4 * BLOCK)
