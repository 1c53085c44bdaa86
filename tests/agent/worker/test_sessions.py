"""A session's end and its limits: stop ids, lengths, cancellation, refusals, times, errors in the numbers."""

from __future__ import annotations

import asyncio
import math

import msgspec
import numpy as np
import pytest

from ganglion.agent import control
from ganglion.agent.executor.executor import Executor
from ganglion.agent.supervisor_worker import read_beat
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import (
    ContextExceeded,
    Exhausted,
    Internal,
    InvalidRequest,
    PermissionDenied,
    ProtocolViolation,
)
from ganglion.wire.identity import TrustLabel
from ganglion.wire.limits import SESSIONS_QUEUED
from ganglion.wire.nouns import Plan
from ganglion.wire.session import SessionClient

PROMPT = list(range(65, 85))
DEADLINE_S = 20.0


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens inside a worker
            await asyncio.sleep(0.005)


async def test_the_end_by_length_stop_and_context(cluster, model):
    cut = model("llama")
    running = await cluster(cut, [[1, 1]], context=30)
    tokens, finished = await running.answer(PROMPT, 4)
    assert (finished.reason, len(tokens)) == (lane_pb2.FINISH_REASON_LENGTH, 4)
    assert (finished.prompt_tokens, finished.completion_tokens) == (20, 4)
    ids = [token.id for token in tokens]
    stopped, finished = await running.answer(PROMPT, 4, stop_ids=[ids[2]])
    assert [token.id for token in stopped] == ids[: ids.index(ids[2])]
    assert finished.reason == lane_pb2.FINISH_REASON_STOP
    long, finished = await running.answer(PROMPT, 1000)
    assert (finished.reason, len(long)) == (lane_pb2.FINISH_REASON_LENGTH, 10)
    assert [token.id for token in long] == cut.runner.greedy(PROMPT, 10)
    assert await running.tokens(PROMPT[:1] * 29, 5) == cut.runner.greedy(PROMPT[:1] * 29, 1)


async def test_what_cannot_be_run_is_refused_by_name(cluster, model):
    running = await cluster(model("llama"), [[1]], context=30)
    for prompt, options, kind, words in (
        ([], {}, InvalidRequest, "empty"),
        ([283], {}, InvalidRequest, "283"),
        ([1] * 30, {}, ContextExceeded, "30 tokens"),
        ([1], {"temperature": -1.0}, InvalidRequest, "temperature"),
        ([1], {"top_p": 0.0}, InvalidRequest, "top_p"),
    ):
        with pytest.raises(kind, match=words):
            await running.answer(prompt, 4, **options)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        await running.answer([1], 0)
    assert await running.tokens([1], 2)


async def test_a_client_that_leaves_frees_every_device(cluster, model):
    running = await cluster(model("llama"), [[1, 1], [1]], context=4096 // 16)
    events = running.client.run(lane_pb2.Open(prompt=PROMPT, max_tokens=200, sampling=lane_pb2.Sampling(top_p=1)))
    async for event in events:
        if event.WhichOneof("body") == "tokens":
            break
    assert all(size > 0 for size in running.kv_bytes())
    await events.aclose()
    await until(lambda: running.kv_bytes() == [0, 0, 0])
    await until(lambda: all(read_beat(path)[1:] == (0, 0, 0.0) for path in running.beats))
    assert min(read_beat(path)[0] for path in running.beats) > 2
    assert len(await running.tokens(PROMPT, 3)) == 3


async def test_the_queue_is_bounded_and_waits_its_turn(cluster, model):
    running = await cluster(model("llama"), [[1]], sessions=1, context=4096)
    scheduler = running.workers[0]._lead._scheduler
    holder = asyncio.create_task(running.tokens(PROMPT, 4000))
    await until(lambda: len(scheduler.active) == 1)
    waiting = [asyncio.create_task(running.tokens(PROMPT, 3)) for _ in range(SESSIONS_QUEUED)]
    await until(lambda: scheduler.queued == SESSIONS_QUEUED)
    with pytest.raises(Exhausted, match="--sessions"):
        await running.tokens(PROMPT, 3)
    assert not holder.done()  # else nobody was made to wait
    holder.cancel()
    answers = await asyncio.gather(*waiting)
    assert all(one == answers[0] for one in answers)


async def test_times_add_up_to_the_wall(cluster, model):
    running = await cluster(model("llama"), [[1, 1]], sessions=1)
    found = await asyncio.gather(*(running.answer(PROMPT, 30, temperature=1.0, top_k=5) for _ in range(2)))
    for _, finished in found:
        times = finished.timings
        parts = (times.queue_s, times.compute_s, times.exchange_s, times.seal_s, times.sample_s, times.other_s)
        assert min(parts) >= 0.0
        assert sum(parts) == pytest.approx(times.wall_s, rel=0.05)
        assert min(times.compute_s, times.exchange_s, times.seal_s, times.sample_s) > 0.0
        assert 0.0 < times.ttft_s <= times.wall_s
    assert max(finished.timings.queue_s for _, finished in found) > 0.3 * found[0][1].timings.wall_s


@pytest.mark.parametrize("poison", [math.nan, math.inf])
async def test_numbers_that_are_not_finite_fail_the_session_by_name(cluster, model, monkeypatch, poison):
    running = await cluster(model("llama"), [[1, 1]])
    spoiled, logits = running.workers[1]._loaded.executor, Executor.logits

    def spoil(self, batch, rows):
        found = logits(self, batch, rows)
        if self is spoiled:
            found[0, 3] = poison
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "logits", spoil)
        with pytest.raises(Internal, match=r"numeric_error.*device-1"):
            await running.answer(PROMPT, 4)
    assert len(await running.tokens(PROMPT, 4)) == 4  # the epoch goes on


async def test_more_candidates_are_fetched_when_the_mass_is_short(cluster, model, monkeypatch):
    monkeypatch.setattr("ganglion.wire.sampling.parameters.FILTER_CANDIDATES", 2)
    few = await cluster(model("llama"), [[1, 1, 1]])
    options = {"temperature": 2.0, "top_p": 0.97, "seed": 5}
    found = await few.tokens(PROMPT, 8, **options)
    monkeypatch.undo()
    assert found == await few.tokens(PROMPT, 8, **options)


async def test_a_plan_for_another_manifest_is_refused(cluster, model):
    def other(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, manifest_digest="0" * 64)

    with pytest.raises(InvalidRequest, match="another manifest"):
        await cluster(model("llama"), [[1]], change=other)


async def test_loading_says_how_far_it_is(cluster, model):
    running = await cluster(model("llama"), [[1]])
    loading = [event for event in running.events[0] if isinstance(event, control.Loading)]
    assert [event.done_bytes for event in loading] == sorted(event.done_bytes for event in loading)
    assert loading[-1].done_bytes == loading[-1].total_bytes > 0
    assert np.isfinite(loading[-1].total_bytes)


async def test_a_drafting_agent_is_admitted_by_name_and_owner(cluster, model, world, caplog):
    running = await cluster(model("llama"), [[1]])
    lead = running.workers[0]._loaded
    peer = identity_pb2.Peer(record=lead.identity.record, address=f"127.0.0.1:{lead.server.port}")
    agents = [world.node(), world.node(label=TrustLabel.FRIEND), world.node()]
    entries = tuple(
        control.PeerEntry(record=one.record.SerializeToString(), address="", name=f"agent-{number}")
        for number, one in enumerate(agents[:2])
    )
    await running.workers[0].handle(control.Gateways(gateways=entries))
    assert "agent-1 may open no sessions: agent-1 is labelled friend" in caplog.text
    expected = model("llama").runner.greedy(PROMPT, 3)
    gateway = running.client
    for number, agent in enumerate(agents):
        client = SessionClient(agent, peer, "demo", 7)
        try:
            running.client = client
            if number == 0:
                assert await running.tokens(PROMPT, 3) == expected
                opened = await client.open(
                    lane_pb2.Open(prompt=PROMPT, max_tokens=100, sampling=lane_pb2.Sampling(top_p=1))
                )
                await opened.send_drafts(lane_pb2.Drafts())  # it has no contract
                with pytest.raises(ProtocolViolation):
                    async for _ in opened.events():
                        pass
                assert await running.tokens(PROMPT, 3) == expected
            else:
                with pytest.raises(PermissionDenied, match="neither a gateway nor a drafting agent"):
                    await running.tokens(PROMPT, 3)
        finally:
            running.client = gateway
            await client.close()
