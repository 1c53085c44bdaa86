"""Sessions whose client chooses: what it is told is the model's row, however the model is split."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest

from ganglion.agent.executor.executor import Executor
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, Exhausted, Internal, InvalidRequest, ProtocolViolation
from ganglion.wire.limits import ASKED_IDS
from ganglion.wire.nouns import Plan
from ganglion.wire.session import Opened

DEADLINE_S = 20.0
PROMPT = list(range(65, 85))


class Chooser:
    """A client's end, one message after the other."""

    def __init__(self, opened: Opened, events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> None:
        self.opened, self.events = opened, events
        self.vocab = 0

    async def event(self) -> lane_pb2.SessionEvent:
        async with asyncio.timeout(DEADLINE_S):
            return await anext(self.events)

    async def scored(self) -> lane_pb2.Scored:
        event = await self.event()
        assert event.WhichOneof("body") == "scored", event
        return event.scored

    async def choose(self, position: int, *tokens: int) -> lane_pb2.Scored:
        await self.opened.choose(position, tokens)
        return await self.scored()

    async def ask(self, position: int, ids: Sequence[int] = ()) -> lane_pb2.Scored:
        await self.opened.ask(position, ids)
        return await self.scored()


@contextlib.asynccontextmanager
async def choosing(running: Any, prompt: Sequence[int] = PROMPT, candidates: int = 0, count: int = 50, **other: Any):
    opened = await running.client.open(
        lane_pb2.Open(
            request_id="r",
            prompt=prompt,
            max_tokens=count,
            choosing=lane_pb2.Choosing(candidates=candidates),
            **other,
        )
    )
    async with contextlib.aclosing(opened.events()) as events:
        chooser = Chooser(opened, events)
        accepted = await chooser.event()
        chooser.vocab = accepted.accepted.vocab
        yield chooser


def logits_of(scored: lane_pb2.Scored) -> np.ndarray:
    return np.array(scored.logits, np.float32)


async def drain(events: AsyncGenerator[lane_pb2.SessionEvent, None]) -> None:
    async for _ in events:
        pass


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for happens inside a worker
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("layout", [[[1]], [[1, 1]], [[1], [2, 1]]], ids=str)
async def test_what_is_told_is_the_models_row(cluster, model, layout):
    cut = model("llama")
    running = await cluster(cut, layout)
    vocab = cut.manifest.geometry.vocab
    expected = cut.runner.greedy(PROMPT, 6)
    ids = list(PROMPT)
    async with choosing(running) as whole, choosing(running, candidates=7) as few:
        assert whole.vocab == few.vocab == vocab
        told, listed = await whole.scored(), await few.scored()
        for token in expected:
            row = logits_of(told)
            assert told.position == listed.position == len(ids)
            assert (row.size, list(told.ids)) == (vocab, [])
            assert told.log_sum_exp == pytest.approx(math.log(np.exp(row.astype(np.float64)).sum()), abs=1e-12)
            assert listed.log_sum_exp == told.log_sum_exp
            order = np.lexsort((np.arange(vocab), -row))[:7]
            assert list(listed.ids) == order.tolist()
            assert np.array_equal(logits_of(listed), row[order])
            wanted = [vocab - 1, 0, int(order[0]), vocab // 2, 0]
            more = await few.ask(len(ids), wanted)
            assert (more.asked, more.position, list(more.ids)) == (True, len(ids), wanted)
            assert np.array_equal(logits_of(more), row[wanted])
            assert np.array_equal(logits_of(await few.ask(len(ids))), row)
            assert int(row.argmax()) == token
            told = await whole.choose(len(ids), token)
            listed = await few.choose(len(ids), token)
            ids.append(token)
        await few.opened.choose(len(ids), ())
        over = (await few.event()).finished
        assert (over.reason, over.prompt_tokens, over.completion_tokens) == (lane_pb2.FINISH_REASON_STOP, 20, 6)
    await until(lambda: running.kv_bytes() == [0] * len(running.workers))


async def test_several_tokens_at_once_are_run_and_only_the_last_row_told(cluster, model):
    running = await cluster(model("llama"), [[1, 1]], chunk=8)
    text = [3 * number % 250 for number in range(30)]
    async with choosing(running, candidates=5) as one, choosing(running, candidates=5) as many:
        told = await one.scored()
        assert logits_of(await many.scored()).tolist() == logits_of(told).tolist()
        for at, token in enumerate(text):
            told = await one.choose(20 + at, token)
        assert await many.choose(20, *text) == told
        assert told.position == 50


async def test_the_end_by_length(cluster, model):
    running = await cluster(model("llama"), [[1]], context=24)
    for count, fits in ((3, 3), (100, 4)):
        async with choosing(running, candidates=1, count=count) as chooser:
            await chooser.scored()
            with contextlib.suppress(StopAsyncIteration):
                await chooser.opened.choose(20, [1] * fits)
                finished = (await chooser.event()).finished
                assert (finished.reason, finished.completion_tokens) == (lane_pb2.FINISH_REASON_LENGTH, fits)
                continue
        raise AssertionError("no end")


async def test_a_choice_that_cannot_be_ends_the_session_by_name(cluster, model):
    running = await cluster(model("llama"), [[1]], context=28)
    for choice, kind, words in (
        (lane_pb2.Choose(position=19, tokens=[1]), ProtocolViolation, "position 19.*is of 20"),
        (lane_pb2.Choose(position=20, tokens=[283]), InvalidRequest, "283 is named; the vocabulary has 283"),
        (lane_pb2.Choose(position=20, tokens=[1] * 9), ContextExceeded, "9 tokens.*8 more fit.*--context"),
        (lane_pb2.Ask(position=21, ids=[1]), ProtocolViolation, "position 21"),
        (lane_pb2.Ask(position=20, ids=[1, 999]), InvalidRequest, "999"),
        (lane_pb2.Ask(position=20, ids=[1] * (ASKED_IDS + 1)), InvalidRequest, str(ASKED_IDS)),
    ):
        async with choosing(running, candidates=2) as chooser:
            await chooser.scored()
            if isinstance(choice, lane_pb2.Choose):
                await chooser.opened.choose(choice.position, choice.tokens)
            else:
                await chooser.opened.ask(choice.position, choice.ids)
            with pytest.raises(kind, match=words):
                await chooser.event()
    assert len(await running.tokens(PROMPT, 3)) == 3
    await until(lambda: running.kv_bytes() == [0])


async def test_what_is_said_out_of_turn_ends_the_session_by_name(cluster, model):
    running = await cluster(model("llama"), [[1]])
    async with choosing(running, candidates=2) as chooser:
        await chooser.scored()
        await chooser.opened.choose(20, [1])
        await chooser.opened.choose(20, [1])  # again, for a distribution that is answered
        with pytest.raises(ProtocolViolation, match="position 20"):
            await drain(chooser.events)
    opened = await running.client.open(lane_pb2.Open(prompt=PROMPT, max_tokens=90, sampling=lane_pb2.Sampling(top_p=1)))
    await opened.choose(20, [1])  # the lead draws
    with pytest.raises(ProtocolViolation):
        await drain(opened.events())
    assert len(await running.tokens(PROMPT, 3)) == 3


async def test_nothing_else_draws_where_the_client_chooses(cluster, model):
    running = await cluster(model("llama"), [[1]])
    for other, words in (
        ({"sampling": lane_pb2.Sampling(top_p=1)}, "sampling"),
        ({"grammar": "{}"}, "grammar"),
        ({"stop_ids": [1]}, "stop_ids"),
        ({"contract": lane_pb2.Contract()}, "contract"),
        ({"target": "big"}, "does not draft"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            async with choosing(running, **other):
                pass


async def test_a_client_that_is_silent_is_ended(cluster, model, monkeypatch):
    monkeypatch.setattr("ganglion.agent.lead.choosing.CHOICE_S", 0.2)
    running = await cluster(model("llama"), [[1, 1]])
    async with choosing(running, candidates=2) as chooser:
        await chooser.scored()
        with pytest.raises(Exhausted, match=r"said nothing for 0\.2 s about the token at 20"):
            await chooser.event()
    await until(lambda: running.kv_bytes() == [0, 0])
    assert all(not worker._lead._runner._kept for worker in running.workers[:1])


async def test_a_client_that_leaves_frees_every_device(cluster, model):
    running = await cluster(model("llama"), [[1, 1], [1]])
    async with choosing(running, candidates=2) as chooser:
        await chooser.scored()
        assert all(size > 0 for size in running.kv_bytes())
    await until(lambda: running.kv_bytes() == [0, 0, 0])
    assert running.workers[0]._lead._choosing._by_session == {}


async def test_many_choose_beside_others_that_are_drawn_for(cluster, model):
    running = await cluster(model("llama"), [[1, 1]], sessions=6)
    expected = model("llama").runner.greedy(PROMPT, 10)

    async def chosen() -> list[int]:
        ids: list[int] = []
        async with choosing(running, candidates=1) as chooser:
            told = await chooser.scored()
            while len(ids) < 10:
                ids.append(told.ids[0])
                told = await chooser.choose(told.position, ids[-1])
        return ids

    answers = await asyncio.gather(*(chosen() for _ in range(4)), *(running.tokens(PROMPT, 10) for _ in range(2)))
    assert all(one == expected for one in answers)


async def test_where_formats_mix_what_is_chosen_is_generated(cluster, model):
    running = await cluster(model("llama", "mixed"), [[1, 1]])
    expected = await running.tokens(PROMPT, 5)
    async with choosing(running, candidates=1) as chooser:
        told = await chooser.scored()
        for token in expected:
            assert told.ids[0] == token
            told = await chooser.choose(told.position, token)


async def test_put_back_while_its_client_thinks(cluster, model):
    """Two sessions of which one fits: the one that waits is put back, and goes on as if nothing had been."""

    def short(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, kv_tokens=1024, context=1024, prefix_tokens=0)

    cut = model("llama")
    running = await cluster(cut, [[1, 1]], sessions=2, context=1024, chunk=64, change=short)
    scheduler = running.workers[0]._lead._scheduler
    expected = cut.runner.greedy(PROMPT, 4)
    prompt = [7 * number % 250 for number in range(505)]
    put_back: list[int] = []
    step = scheduler.next_step

    def next_step(rows: int | None = None):
        found = step(rows)
        put_back.extend(found.put_back if found is not None else ())
        return found

    scheduler.next_step = next_step
    long = asyncio.create_task(running.tokens(prompt, 30))
    await until(lambda: len(scheduler.active) == 1)
    async with choosing(running, candidates=3) as chooser:
        told = await chooser.scored()
        await until(lambda: put_back)
        more = await chooser.ask(20, [told.ids[1]])  # of the row that is kept
        assert list(more.logits) == [told.logits[1]]
        for token in expected:
            assert token == told.ids[0]
            told = await chooser.choose(told.position, token)
    assert len(await long) == 30
    assert put_back == [2]


async def test_state_that_is_kept_serves_a_client_that_chooses(cluster, model):
    def kept(plan: Plan) -> Plan:
        return msgspec.structs.replace(plan, prefix_tokens=512)

    running = await cluster(model("llama"), [[1, 1]], change=kept)
    prompt, found = [7 * number % 250 for number in range(70)], []
    for _ in range(2):
        async with choosing(running, prompt, candidates=3) as chooser:
            found.append(await chooser.scored())
            await chooser.opened.choose(70, ())
            finished = (await chooser.event()).finished
    assert found[0] == found[1]
    assert finished.cached_tokens == 64


async def test_numbers_that_are_not_finite_fail_it_by_name(cluster, model, monkeypatch):
    running = await cluster(model("llama"), [[1, 1]])
    logits = Executor.logits

    def spoil(self, batch, rows):
        found = logits(self, batch, rows)
        found[0, 3] = math.nan
        return found

    monkeypatch.setattr(Executor, "logits", spoil)
    async with choosing(running, candidates=2) as chooser:
        with pytest.raises(Internal, match="numeric_error"):
            await chooser.event()
