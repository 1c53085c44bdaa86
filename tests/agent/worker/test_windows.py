"""Drafted tokens verified in windows: whatever is drafted, the tokens are those of the model alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import msgspec
import pytest

from ganglion.agent.executor.executor import Executor
from ganglion.agent.lead.scheduler import Scheduler
from ganglion.agent.speculation.drafters import NGram, Propose

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9},
    {"temperature": 0.7, "seed": 7, "top_k": 9, "presence_penalty": 0.8, "frequency_penalty": 0.3},
    {"temperature": 1.0, "seed": 8, "repetition_penalty": 1.2, "top_logprobs": 3},
]


class Oracle:
    """Knows the answers; every token is right by `chance`, and windows are as long as they may be."""

    name = "oracle"

    def __init__(self, answers: dict[tuple[int, ...], Sequence[int]], chance: float, vocab: int = 97) -> None:
        self._answers = answers
        self._chance = chance
        self._random = random.Random(1)
        self._vocab = vocab
        self.asked = 0

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        self.asked += len(asks)
        found = []
        for ask in asks:
            answer = self._answers[tuple(ask.ids[: ask.prompt])]
            told = list(answer[len(ask.ids) - ask.prompt :][: ask.most])
            found.append(
                [one if self._random.random() < self._chance else self._random.randrange(self._vocab) for one in told]
            )
        return found

    def close(self, session: int) -> None:
        pass

    def token_s(self, batch: int) -> float:
        return 0.0


pytestmark = pytest.mark.usefixtures("wide_windows")


@pytest.fixture
def windows(monkeypatch) -> list[int]:
    """Draws of every entry that ran."""
    seen: list[int] = []
    next_step = Scheduler.next_step

    def watched(self, prompt_rows=None):
        step = next_step(self, prompt_rows)
        seen.extend(entry.draws for entry in step.entries) if step else None
        return step

    monkeypatch.setattr(Scheduler, "next_step", watched)
    return seen


@pytest.mark.parametrize("weights", ["fp32", "int4", "mixed"])
@pytest.mark.parametrize(
    ("layout", "topology"), [([[1]], "mesh"), ([[3, 1]], "mesh"), ([[2, 5, 1]], "star"), ([[1, 2], [3, 1]], "mesh")]
)
async def test_tokens_are_those_of_the_model_alone(cluster, model, windows, layout, topology, weights):
    cut = model("llama", weights)
    alone = await cluster(cut, [[1]])
    expected = [await alone.answer(PROMPT, 40, **sampling) for sampling in SAMPLINGS]
    assert max(windows) == 1
    for chance in (1.0, 0.7, 0.0):
        for sampling, (tokens, finished) in zip(SAMPLINGS, expected, strict=True):
            drafter = Oracle({tuple(PROMPT): [token.id for token in tokens]}, chance)
            running = await cluster(cut, layout, topology, drafter=drafter, chunk=16 if chance else 5)
            found, ended = await running.answer(PROMPT, 40, **sampling)
            assert found == tokens  # log-probabilities too
            assert (ended.reason, ended.completion_tokens) == (finished.reason, finished.completion_tokens)
            assert drafter.asked
            if chance == 1.0:
                assert ended.speculation.accepted == ended.speculation.drafted >= 30
                assert ended.speculation.passes <= 6
    assert max(windows) == 16


async def test_answers_end_where_they_would_alone(cluster, model):
    cut = model("llama")
    alone = await cluster(cut, [[1]])
    tokens = await alone.tokens(PROMPT, 30)
    stop = next(token for at, token in enumerate(tokens) if at > 5 and token not in tokens[:at])
    drafter = Oracle({tuple(PROMPT): tokens}, 1.0)
    running = await cluster(cut, [[2, 1]], drafter=drafter)
    for count in (1, 2, 3, 17, 30):
        assert await running.tokens(PROMPT, count) == tokens[:count]
    found, finished = await running.answer(PROMPT, 30, stop_ids=[stop])
    assert [token.id for token in found] == tokens[: tokens.index(stop)]
    assert finished.completion_tokens == tokens.index(stop)


async def test_many_sessions_whose_windows_share_steps_and_state_that_is_kept(cluster, model, windows):
    cut = model("llama", "int4")
    alone = await cluster(cut, [[1]], context=256)
    prompts = [(PROMPT * 4)[shift : shift + 40] for shift in range(5)]
    options = {"temperature": 0.8, "seed": 3, "frequency_penalty": 0.2}
    expected = [await alone.tokens(prompt, 60, **options) for prompt in prompts]
    answers = dict(zip(map(tuple, prompts), expected, strict=True))
    together = await cluster(
        cut,
        [[1, 2]],
        context=256,
        sessions=3,
        chunk=24,
        drafter=Oracle(answers, 0.8),
        change=lambda plan: msgspec.structs.replace(plan, prefix_tokens=1024),
    )
    assert await asyncio.gather(*(together.tokens(prompt, 60, **options) for prompt in prompts)) == expected
    assert max(windows) > 8
    # What was kept holds no row of a draft that did not hold: a conversation goes on as it would anyway.
    for prompt, answer in zip(prompts, expected, strict=True):
        longer = [*prompt, *answer, 5]
        answers[tuple(longer)] = [1] * 8
        found, finished = await together.answer(longer, 8, **options)
        assert finished.cached_tokens == (len(longer) - 2) // 32 * 32
        assert [token.id for token in found] == await alone.tokens(longer, 8, **options)


async def test_a_lookup_in_the_text_is_a_drafter(cluster, model):
    cut = model("llama", "int4")
    alone = await cluster(cut, [[1]])
    running = await cluster(cut, [[1, 1]], drafter=NGram())
    drafted = 0
    for sampling in SAMPLINGS:
        tokens, _ = await alone.answer(PROMPT * 3, 40, **sampling)
        found, finished = await running.answer(PROMPT * 3, 40, **sampling)
        assert found == tokens
        drafted += finished.speculation.drafted
    assert drafted > 20


async def test_windows_shrink_before_anybody_gives_up_memory(cluster, model, windows):
    cut = model("llama", "int4")
    prompts = [(PROMPT * 30)[shift : shift + 480] for shift in range(2)]
    alone = await cluster(cut, [[1]], context=640, chunk=256)
    expected = [await alone.tokens(prompt, 60) for prompt in prompts]
    put_back = []
    prepare = Executor.prepare

    def watched(self, keeps, closed, begins):
        put_back.extend(closed)
        return prepare(self, keeps, closed, begins)

    tight = await cluster(
        cut,
        [[1]],
        context=640,
        chunk=256,
        change=lambda plan: msgspec.structs.replace(plan, kv_tokens=1024),
        drafter=Oracle(dict(zip(map(tuple, prompts), expected, strict=True)), 0.9),
    )
    Executor.prepare = watched
    try:
        assert await asyncio.gather(*(tight.tokens(prompt, 30) for prompt in prompts)) == [one[:30] for one in expected]
    finally:
        Executor.prepare = prepare
