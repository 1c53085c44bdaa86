"""Experts blended through real sessions: the tokens of the dense mixture, whoever is lost, slow or lies meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from dense_mixture import draw_dense

from ganglion.gateway.experts.blending import Blended, BlendStatistics, blend
from ganglion.gateway.experts.seat import BlendExpert, Patience
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ContextExceeded, GanglionError, InvalidRequest, Unavailable
from ganglion.wire.sampling.parameters import parse_sampling
from ganglion.wire.sampling.penalties import Penalties
from ganglion.wire.session import Opened

DEADLINE_S = 20.0
PROMPT = [5, 9, 200, 31, 7, 64, 50, 12]
NAMES = ("demo", "demo-drafter")
WEIGHTS = {"demo": 0.6, "demo-drafter": 0.2}  # in proportion
CHAT = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1}


@pytest.fixture(scope="session")
def rows() -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
    return {}


@pytest.fixture
def dense(model: Callable[..., Any], rows: dict[tuple[str, tuple[int, ...]], np.ndarray]) -> Callable[..., Any]:
    """The answer by the dumb runner and the dumb draw; `alone`: from which token on only demo draws."""

    def answer(count: int, weights: dict[str, float] = WEIGHTS, alone: int | None = None, **sampling: Any):
        parsed = parse_sampling(lane_pb2.Sampling(**CHAT | sampling), 2048)
        penalties = Penalties(parsed, PROMPT)
        adjustments, ids = penalties.take(), list(PROMPT)
        for number in range(count):
            used = {"demo": 1.0} if alone is not None and number >= alone else weights
            for name in used:
                key = name, tuple(ids)
                if key not in rows:
                    rows[key] = np.array(model(name).runner.forward(ids, [len(ids)])[0][-1], np.float32)
            total = sum(used.values())
            found = draw_dense(
                [rows[name, tuple(ids)] for name in used],
                [weight / total for weight in used.values()],
                parsed,
                adjustments,
                position=len(ids),
            )
            ids.append(found[0])
            penalties.drawn(found[0])
            adjustments = adjustments.updated(penalties.take())
        return ids[len(PROMPT) :]

    return answer


@pytest.fixture
async def experts(cluster: Callable[..., Any], model: Callable[..., Any]) -> list[BlendExpert]:
    """demo on one device, demo-drafter on two."""
    layouts = {"demo": [[1]], "demo-drafter": [[1, 1]]}
    return [
        BlendExpert(name, WEIGHTS[name], (await cluster(model(name), layout)).client.open)
        for name, layout in layouts.items()
    ]


def blended(experts: Sequence[BlendExpert], count: int, **options: Any) -> AsyncGenerator[Blended, None]:
    names = ("candidates", "patience", "statistics", "stop_ids", "on_drop")
    given = {name: options.pop(name) for name in names if name in options}
    described = {"stop_ids": (), "on_drop": lambda name, error: None} | given
    return blend(experts, PROMPT, lane_pb2.Sampling(**CHAT | options), max_tokens=count, **described)


async def ids_of(experts: Sequence[BlendExpert], count: int, **options: Any) -> list[int]:
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(blended(experts, count, **options)) as tokens:
        return [token.id async for token in tokens]


async def streams(experts: Sequence[BlendExpert], expected: Sequence[int]) -> None:
    """Token by token, up to a stop id."""
    stop = expected[5]
    statistics = BlendStatistics()
    seen: list[int] = []
    async with contextlib.aclosing(blended(experts, 8, stop_ids=[stop], statistics=statistics)) as tokens:
        async for token in tokens:
            seen.append(token.id)
            assert statistics.tokens == len(seen)  # no token is drawn before the one before it is told
            assert token.weights == {"demo": pytest.approx(0.75), "demo-drafter": pytest.approx(0.25)}
    assert seen == expected[: expected.index(stop)]
    assert statistics.reason == lane_pb2.FINISH_REASON_STOP


async def test_the_tokens_are_those_of_the_dense_mixture(experts, dense):
    asked = 0
    for sampling, candidates in (
        ({}, 64),
        ({}, 1),
        ({"temperature": 1.0, "seed": 3}, 16),
        ({"temperature": 0.7, "seed": 3, "top_p": 0.9}, 64),
        ({"temperature": 1.0, "seed": 3, "top_k": 10}, None),
        ({"temperature": 1.2, "seed": 3, "min_p": 0.05, "repetition_penalty": 1.2, "frequency_penalty": 0.5}, 2),
        ({"temperature": 1.0, "seed": 3, "top_p": 0.95}, 0),
    ):
        statistics = BlendStatistics()
        found = await ids_of(experts, 8, candidates=candidates, statistics=statistics, **sampling)
        assert found == dense(8, **sampling), sampling
        assert (statistics.tokens, statistics.reason) == (8, lane_pb2.FINISH_REASON_LENGTH)
        assert (statistics.near_ties, statistics.dropped) == (0, {})
        assert statistics.token_bytes > 0
        assert candidates != 0 or statistics.asks == 0
        asked += statistics.asks
    assert asked > 0
    await streams(experts, dense(8))


async def test_one_expert_is_its_own_answer_bit_for_bit(cluster, model):
    running = await cluster(model("llama"), [[1, 1]])
    only = [BlendExpert("llama", 3.0, running.client.open)]
    for sampling in (
        {},
        {"temperature": 1.0, "seed": 8},
        {"temperature": 0.8, "seed": 9, "top_p": 0.9, "top_logprobs": 2},
        {"temperature": 1.0, "seed": 2, "top_k": 7, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    ):
        options = {"top_logprobs": 0} | sampling
        own, _ = await running.answer(PROMPT, 10, **options)
        async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(blended(only, 10, **options)) as tokens:
            found = [token async for token in tokens]
        assert [token.id for token in found] == [token.id for token in own]
        assert [token.logprob for token in found] == [token.logprob for token in own]
        assert [token.top for token in found] == [tuple((one.id, one.logprob) for one in token.top) for token in own]


async def kill(running: Any) -> None:
    """What a killed process looks like from outside."""
    worker = running.workers[0]
    worker._serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await worker._serving
    await worker._loaded.server.stop()


async def test_D1_an_expert_killed_in_mid_answer(cluster, model, dense):  # noqa: N802
    sampling, weights = {"temperature": 1.0, "seed": 3, "top_p": 0.95}, {"demo": 0.1, "demo-drafter": 0.9}
    running = {name: await cluster(model(name), [[1]]) for name in NAMES}
    experts = [BlendExpert(name, weights[name], one.client.open) for name, one in running.items()]
    dropped: list[tuple[str, GanglionError]] = []
    found: list[Blended] = []
    tokens = blended(experts, 12, on_drop=lambda *what: dropped.append(what), **sampling)
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(tokens):
        async for token in tokens:
            found.append(token)
            if len(found) == 4:
                await kill(running["demo-drafter"])
    assert [name for name, _ in dropped] == ["demo-drafter"]
    both = sum(len(token.weights) == 2 for token in found)
    assert 4 <= both <= 5  # a distribution may have been under way
    assert [token.weights for token in found[both:]] == [{"demo": 1.0}] * (12 - both)
    ids = [token.id for token in found]
    assert ids == dense(12, weights, alone=both, **sampling)
    assert ids != dense(12, weights, **sampling)


class Bent:
    """An expert's session whose events a test changes."""

    def __init__(self, opened: Opened, bend: Callable[[lane_pb2.Scored], Any]) -> None:
        self._opened, self._bend = opened, bend
        self.choose, self.ask, self.close = opened.choose, opened.ask, opened.close
        self.sent_bytes = self.received_bytes = 0

    async def events(self) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        async with contextlib.aclosing(self._opened.events()) as events:
            async for event in events:
                if event.WhichOneof("body") == "scored" and event.scored.position >= len(PROMPT) + 3:
                    await self._bend(event.scored)
                yield event


def _nan(scored: lane_pb2.Scored) -> None:
    scored.logits[1] = float("nan")


def _shifted(scored: lane_pb2.Scored) -> None:
    scored.position += 1


def _unknown(scored: lane_pb2.Scored) -> None:
    scored.ids[0] = 5000


def _too_likely(scored: lane_pb2.Scored) -> None:
    scored.log_sum_exp -= 3.0


async def test_an_expert_that_is_slow_or_talks_nonsense_is_dropped(experts, dense):
    for nonsense, words in (
        (_nan, "finite"),
        (_shifted, "position"),
        (_unknown, "5000"),
        (_too_likely, "add up"),
        (None, "more than 0.2 s"),
    ):

        async def bend(scored: lane_pb2.Scored, nonsense: Any = nonsense) -> None:
            if nonsense is None:
                await asyncio.Event().wait()
            else:
                nonsense(scored)

        async def open_bent(request: lane_pb2.Open, bend: Any = bend) -> Bent:
            return Bent(await experts[1].open(request), bend)

        dropped: dict[str, GanglionError] = {}
        bent = [experts[0], BlendExpert("demo-drafter", 0.2, open_bent)]
        patience = Patience(token_s=0.2 if nonsense is None else DEADLINE_S)
        found = await ids_of(bent, 6, on_drop=dropped.__setitem__, patience=patience)
        assert found == dense(6, alone=3)
        assert list(dropped) == ["demo-drafter"]
        assert words in dropped["demo-drafter"].message


async def test_who_cannot_be_asked(cluster, model, dense):
    short = await cluster(model("demo-drafter"), [[1]], context=len(PROMPT) + 4)
    long = await cluster(model("demo"), [[1]])
    both = [BlendExpert("demo", 0.6, long.client.open), BlendExpert("demo-drafter", 0.2, short.client.open)]
    dropped: dict[str, GanglionError] = {}
    # The short one tells 4 distributions, and its context is full with the token that follows.
    assert await ids_of(both, 8, on_drop=dropped.__setitem__) == dense(8, alone=4)
    assert "context is full with 12 tokens" in dropped["demo-drafter"].message
    statistics = BlendStatistics()
    alone = await ids_of(both[1:], 8, statistics=statistics)
    assert (len(alone), statistics.reason) == (4, lane_pb2.FINISH_REASON_LENGTH)

    async def unreachable(_request: lane_pb2.Open) -> Opened:
        raise Unavailable("nobody is there")

    gone = [BlendExpert(name, 1.0, unreachable) for name in ("a", "b")]
    assert await ids_of([*gone, both[0]], 4) == dense(4, {"demo": 1.0})
    with pytest.raises(Unavailable, match="no expert is left: a: nobody is there; b: nobody is there"):
        await ids_of(gone, 4)
    with pytest.raises(ContextExceeded, match="12"):
        async with contextlib.aclosing(
            blend(
                both[1:],
                list(range(12)),
                lane_pb2.Sampling(**CHAT),
                stop_ids=(),
                max_tokens=1,
                on_drop=lambda *_: None,
            )
        ) as tokens:
            await anext(tokens)
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(InvalidRequest, match=f"weight of expert demo is {weight}"):
            await ids_of([BlendExpert("demo", weight, long.client.open)], 1)
    with pytest.raises(InvalidRequest, match="named once"):
        await ids_of([both[0], both[0]], 1)
    with pytest.raises(InvalidRequest, match="temperature"):
        await ids_of(both, 1, temperature=-1.0)


async def test_a_client_that_leaves_ends_every_session(cluster, model):
    running = [await cluster(model(name), [[1]]) for name in NAMES]
    experts = [BlendExpert(name, 1.0, one.client.open) for name, one in zip(NAMES, running, strict=True)]
    async with contextlib.aclosing(blended(experts, 100)) as tokens:
        await anext(tokens)
        assert all(one.kv_bytes()[0] > 0 for one in running)
    async with asyncio.timeout(DEADLINE_S):
        while any(one.kv_bytes()[0] for one in running):  # noqa: ASYNC110 - it happens inside workers
            await asyncio.sleep(0.005)
