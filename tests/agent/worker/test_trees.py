"""Branches verified beside windows: whatever is drafted where, the tokens are those of the model alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from verify_session import Device, opening

from ganglion.agent.executor.executor import Executor
from ganglion.agent.lead.scheduler import FIRST_SLOT, Scheduler, Step
from ganglion.agent.speculation.branching import Branch
from ganglion.agent.speculation.drafters import Propose
from ganglion.proto import lane_pb2
from ganglion.wire.prefixes import Prefix

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5, "top_logprobs": 3},
    {"temperature": 1.0, "seed": 6, "top_p": 0.9},
]
VOCAB = 97

pytestmark = pytest.mark.usefixtures("wide_windows")


@pytest.fixture
def steps(monkeypatch) -> list[Step]:
    """Every step that ran."""
    seen: list[Step] = []
    next_step = Scheduler.next_step

    def watched(self, prompt_rows=None):
        step = next_step(self, prompt_rows)
        seen.extend([step] if step else [])
        return step

    monkeypatch.setattr(Scheduler, "next_step", watched)
    return seen


def tree(length: int, answer: Sequence[int], right: float, seed: int = 1) -> Any:
    """Drafts a chain that is wrong somewhere, and beside its wrong token others, by chance the right one among them."""
    rng = random.Random(seed)

    def draft(device: Device, prefix: Prefix) -> lane_pb2.Drafts:
        told = list(answer[len(device.tokens) : len(device.tokens) + length]) or [1]
        at = rng.randrange(len(told))
        wrong = [(told[at] + shift) % VOCAB for shift in rng.sample(range(1, VOCAB), 3)]
        branches = [lane_pb2.Branch(parent=prefix.name, tokens=[*told[:at], wrong[0], *told[at + 1 :]])]
        fork = prefix.through(told[:at]).name
        branches.append(lane_pb2.Branch(parent=fork, tokens=[wrong[1], 3, 4]))
        if rng.random() < right:
            branches.append(lane_pb2.Branch(parent=fork, tokens=told[at:]))
        if at:
            branches.append(lane_pb2.Branch(parent=prefix.name, tokens=[wrong[2], 7]))
        return lane_pb2.Drafts(round=len(device.outcomes), branches=branches)

    return draft


def forced(running: Any, rows: int | None) -> None:
    running.workers[0]._lead._speculating.tree_rows = rows


def branches(steps: Sequence[Step]) -> int:
    return sum(entry.branch is not None for step in steps for entry in step.entries)


async def nothing_held(running: Any) -> None:
    """Every device has dropped every session and slot: with the next step, which some hear of a moment later."""
    async with asyncio.timeout(10):
        while any(running.kv_bytes()):  # noqa: ASYNC110 - a worker says nothing of it
            await asyncio.sleep(0.01)
    assert [worker._loaded.executor.sessions for worker in running.workers] == [0] * len(running.workers)


@pytest.mark.parametrize("weights", ["fp32", "int4", "mixed"])
@pytest.mark.parametrize(
    ("layout", "topology"), [([[1]], "mesh"), ([[3, 1]], "mesh"), ([[2, 5, 1]], "star"), ([[1, 2], [3, 1]], "mesh")]
)
async def test_tokens_are_those_of_the_model_alone(cluster, model, steps, layout, topology, weights):
    cut = model("llama", weights)
    alone = await cluster(cut, [[1]])
    running = await cluster(cut, layout, topology, chunk=24)
    forced(running, 10)
    for sampling in SAMPLINGS:
        expected, _ = await alone.answer(PROMPT, 40, **sampling)
        tokens = [token.id for token in expected]
        device = Device()
        del steps[:]
        await device.run(running.client, opening(cut.manifest, PROMPT, 40, **sampling), tree(6, tokens, 0.8))
        assert device.told == expected  # log-probabilities too
        branched = sum(one.branched for one in device.outcomes)
        assert branched > 2
        assert branches(steps) >= 2 * branched
        assert [one for step in steps for one in step.entries if one.branch is None and one.take_from is not None]
        assert device.finished.speculation.accepted == sum(one.accepted for one in device.outcomes)


async def test_a_long_step_in_halves_takes_rows_too(cluster, model, steps):
    """Halves run a segment after one another: a branch may be in the later one, and cut by the middle."""
    cut = model("llama", "int4")
    alone = await cluster(cut, [[1]])
    running = await cluster(cut, [[2, 1]], chunk=24, change=lambda plan: msgspec.structs.replace(plan, overlap=True))
    forced(running, 12)
    tokens = await alone.tokens(PROMPT, 60)
    device = Device()
    await device.run(running.client, opening(cut.manifest, PROMPT, 60), tree(9, tokens, 0.8))
    assert device.tokens == tokens
    assert max(step.rows for step in steps if branches([step])) >= 12
    assert sum(one.branched for one in device.outcomes) > 2


async def test_many_sessions_with_branches_share_memory_that_is_short_and_what_is_kept(cluster, model, steps):
    cut = model("llama", "int4")
    alone = await cluster(cut, [[1]], context=640, chunk=128)
    prompts = [(PROMPT * 30)[shift : shift + 480] for shift in range(3)]  # all of them grow beyond 512 tokens
    expected = [await alone.tokens(prompt, 70) for prompt in prompts]
    memory = 3 * 1024
    running = await cluster(
        cut,
        [[1, 2]],
        context=640,
        sessions=3,
        chunk=128,
        change=lambda plan: msgspec.structs.replace(plan, kv_tokens=memory, prefix_tokens=2048),
    )
    forced(running, 12)
    executor: Executor = running.workers[1]._loaded.executor
    most = executor._ledger._budget_bytes
    devices = [Device() for _ in prompts]
    runs = [
        device.run(running.client, opening(cut.manifest, prompt, 70), tree(6, tokens, 0.8, seed))
        for seed, (device, prompt, tokens) in enumerate(zip(devices, prompts, expected, strict=True))
    ]
    await asyncio.gather(*runs)
    assert [device.tokens for device in devices] == expected
    assert executor.kv_bytes <= most
    assert any(step.closed and min(step.closed) >= FIRST_SLOT for step in steps)  # slots, and no session with them
    assert not any(step.put_back for step in steps)
    # What was kept holds rows that were taken from a branch, and none of one that did not hold.
    for prompt, answer in zip(prompts, expected, strict=True):
        longer = [*prompt, *answer, 5]
        found, finished = await running.answer(longer, 8)
        assert finished.cached_tokens >= (len(longer) - 2) // 32 * 32
        assert [token.id for token in found] == await alone.tokens(longer, 8)
    await nothing_held(running)


async def test_a_client_that_leaves_leaves_no_slot(cluster, model, steps):
    cut = model("llama")
    running = await cluster(cut, [[1, 1]], sessions=1)
    forced(running, 8)
    tokens = await running.tokens(PROMPT, 60)
    for seed in range(3):
        device = Device()
        request = opening(cut.manifest, PROMPT, 60)
        await device.run(running.client, request, tree(6, tokens, 1.0, seed), leave_after=4)
        assert device.tokens == tokens[: len(device.tokens)]
    assert await running.tokens(PROMPT, 60) == tokens
    assert branches(steps) > 6
    await nothing_held(running)


async def test_steered_sessions_have_no_branches(cluster, model, steps):
    cut = model("llama")
    running = await cluster(cut, [[1]])
    forced(running, 8)
    options = {"temperature": 0.8, "seed": 3, "presence_penalty": 0.9}
    tokens = await running.tokens(PROMPT, 40, **options)
    device = Device()
    await device.run(running.client, opening(cut.manifest, PROMPT, 40, **options), tree(6, tokens, 1.0))
    assert device.tokens == tokens
    assert not branches(steps)


class Unsure:
    """A drafter of the lead's own whose first guess is wrong in one place of each window, and whose second is right."""

    name = "unsure"

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer = answer
        self._random = random.Random(4)
        self._seconds: list[Branch] = []

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        found = []
        for ask in asks:
            at = len(ask.ids) - len(PROMPT)
            told = list(self._answer[at : at + min(5, ask.most)])
            wrong = self._random.randrange(len(told)) if told else 0
            if told:
                self._seconds = [Branch(wrong, (told[wrong],)), Branch(0, (96,))][: ask.beside]
                told[wrong] = (told[wrong] + 1) % VOCAB
            found.append(told)
        return found

    def beside(self, session: int) -> Sequence[Branch]:
        return self._seconds

    def close(self, session: int) -> None:
        pass

    def token_s(self, batch: int) -> float:
        return 0.0


@pytest.mark.parametrize("rows", [2, None])
async def test_second_guesses_of_the_leads_own_drafter(cluster, model, steps, rows):
    cut = model("llama", "int4")
    alone = await cluster(cut, [[1]])
    for sampling in SAMPLINGS:
        expected, _ = await alone.answer(PROMPT, 40, **sampling)
        running = await cluster(cut, [[2, 1]], drafter=Unsure([token.id for token in expected]))
        forced(running, rows)
        found, finished = await running.answer(PROMPT, 40, **sampling)
        assert found == expected
        assert finished.speculation.passes < 20
        if rows:
            assert branches(steps) > finished.speculation.passes
            assert finished.speculation.drafted > 6 * (finished.speculation.passes - 3)


async def test_what_is_worth_it_is_measured(cluster, model, steps):
    """Left alone a lead branches where its client's second guesses turn out right, whatever the pass costs here."""
    cut = model("llama")
    running = await cluster(cut, [[1]])
    speculating = running.workers[0]._lead._speculating
    tokens = await running.tokens(PROMPT, 60)
    device = Device()
    await device.run(running.client, opening(cut.manifest, PROMPT, 60), tree(6, tokens, 1.0))
    assert device.tokens == tokens
    # Not always the first of the others: the right one comes after a wrong one.
    assert speculating._siblings.chance(2) > 0.3 > speculating._siblings.chance(1)
