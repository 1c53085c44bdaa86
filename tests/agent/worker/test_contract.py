"""Sessions whose client drafts: by one protocol, whatever it sends, the tokens are those of the model alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from verify_session import Device, opening

from ganglion.agent.speculation.drafters import NGram
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError, InvalidRequest, ProtocolViolation, Unsupported
from ganglion.wire.prefixes import Prefix

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
pytestmark = pytest.mark.usefixtures("wide_windows")


def chain(length: int, answer: Sequence[int], chance: float = 1.0, seed: int = 1) -> Any:
    """Drafts a chain of the known answer after each outcome, each token right by `chance`."""
    rng = random.Random(seed)

    def draft(device: Device, prefix: Prefix) -> lane_pb2.Drafts:
        told = answer[len(device.tokens) : len(device.tokens) + length]
        tokens = [token if rng.random() < chance else rng.randrange(97) for token in told] or [1]
        branch = lane_pb2.Branch(parent=prefix.name, tokens=tokens)
        return lane_pb2.Drafts(round=len(device.outcomes), branches=[branch])

    return draft


SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.7, "seed": 5}, {"temperature": 1.0, "seed": 6, "top_p": 0.9}]


@pytest.mark.parametrize("weights", ["fp32", "int4", "mixed"])
@pytest.mark.parametrize("layout", [[[1]], [[2, 1]]])
async def test_a_device_that_waits_for_each_outcome(cluster, model, layout, weights):
    cut = model("llama", weights)
    running = await cluster(cut, layout)
    for sampling in SAMPLINGS:
        expected = await running.tokens(PROMPT, 40, **sampling)
        for chance in (1.0, 0.6, 0.0):
            device = Device()
            await device.run(running.client, opening(cut.manifest, PROMPT, 40, **sampling), chain(5, expected, chance))
            assert device.tokens == expected
            assert device.finished is not None
            assert device.finished.completion_tokens == 40
            assert device.finished.speculation.passes == len(device.outcomes)
            if chance == 1.0:
                assert len(device.outcomes) < 20
                assert sum(device.finished.speculation.accepted_counts[2:]) > 3


async def test_branches_that_are_queued_go_on_from_an_outcome_at_once(cluster, model):
    """A device that knows what the correction will be: its branch is the next window, and nothing is waited for."""
    cut = model("llama")
    running = await cluster(cut, [[1]])
    expected = await running.tokens(PROMPT, 40)

    def draft(device: Device, prefix: Prefix) -> lane_pb2.Drafts | None:
        if len(device.outcomes) != 1:
            return None
        at, branches = len(device.tokens), []
        wrong = (expected[at + 2] + 1) % 97
        branches.append(lane_pb2.Branch(parent=prefix.name, tokens=[*expected[at : at + 2], wrong, 3, 4]))
        after = prefix.through(expected[at : at + 2])
        branches.append(lane_pb2.Branch(parent=after.name, tokens=expected[at + 2 : at + 30]))
        return lane_pb2.Drafts(round=1, branches=branches)

    running.workers[0]._lead._speculating.tree_rows = 0  # one by one
    device = Device()
    request = opening(cut.manifest, PROMPT, 24, terms={"window_tokens": 8})
    await device.run(running.client, request, draft)
    assert device.tokens == expected[:24]
    assert [one.accepted for one in device.outcomes[:3]] == [0, 2, 8]
    assert device.outcomes[1].queued > 8
    assert device.finished.speculation.hits >= 3


@pytest.mark.parametrize("miss", ["MISS_RUN", "MISS_DRAFT"])
async def test_a_verifier_that_goes_on_by_itself(cluster, model, miss):
    cut = model("llama", "int4")
    running = await cluster(cut, [[1]], drafter=NGram())
    for sampling in SAMPLINGS:
        alone = await cluster(cut, [[1]])
        expected = await alone.tokens(PROMPT * 3, 40, **sampling)
        device = Device()
        request = opening(cut.manifest, PROMPT * 3, 40, terms={"miss": lane_pb2.Miss.Value(miss)}, **sampling)
        await device.run(running.client, request, lambda *_: None)
        assert device.tokens == expected
        assert device.terms.drafter == "ngram"
        # Drafts that are late are dropped, or followed along what was committed since.
        late = Device()
        await late.run(running.client, request, chain(4, expected, 0.7))
        assert late.tokens == expected


async def test_an_answer_goes_on_where_it_was_left(cluster, model):
    cut = model("llama", "mixed")
    running, other = await cluster(cut, [[1]]), await cluster(cut, [[1, 2]])
    options = {"temperature": 0.8, "seed": 3, "presence_penalty": 0.9, "repetition_penalty": 1.1}
    expected = await running.tokens(PROMPT, 40, **options)
    first = Device()
    await first.run(
        running.client, opening(cut.manifest, PROMPT, 40, **options), chain(4, expected, 0.7), leave_after=6
    )
    held = len(first.tokens)
    assert first.tokens == expected[:held]
    second = Device()
    request = opening(cut.manifest, [*PROMPT, *first.tokens], 40 - held, answered=held, **options)
    await second.run(other.client, request, chain(4, expected[held:], 0.7))
    assert second.tokens == expected[held:]
    assert second.finished.prompt_tokens == len(PROMPT)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"manifest_digest": "0" * 64}, Unsupported),
        ({"manifest_digest": "nonsense"}, InvalidRequest),
        ({"numeric_class": "fp64"}, Unsupported),
        ({"tokenizer_digest": bytes(32)}, Unsupported),
        ({"vocab": 3}, Unsupported),
    ],
)
async def test_a_contract_that_does_not_hold_is_refused(cluster, model, change, error):
    cut = model("llama")
    running = await cluster(cut, [[1]])
    with pytest.raises(error) as caught:
        await Device().run(running.client, opening(cut.manifest, PROMPT, 4, terms=change), lambda *_: None)
    assert caught.value.param == f"contract.{next(iter(change))}"


def _hostile(kind: str) -> Any:
    def draft(device: Device, prefix: Prefix) -> lane_pb2.Drafts:
        branch = lane_pb2.Branch(parent=prefix.name, tokens=[1, 2])
        drafts = lane_pb2.Drafts(round=len(device.outcomes), branches=[branch])
        if kind == "vocabulary":
            branch = drafts.branches.add(parent=prefix.name, tokens=[1 << 31])
        elif kind == "round":
            drafts.round += 1
        elif kind == "prefix":
            drafts.branches[0].parent = b"nonsense"
        elif kind == "credits":
            drafts.branches.extend(lane_pb2.Branch(parent=prefix.name, tokens=[n % 97]) for n in range(400))
        elif kind == "empty":
            drafts.branches.add(parent=prefix.name)
        elif kind == "miss":
            drafts.miss = 9  # type: ignore[assignment]
        return drafts

    return draft


async def test_a_device_that_breaks_the_contract_is_cut_off_and_nobody_else(cluster, model):
    cut = model("llama")
    running = await cluster(cut, [[1]], sessions=3)
    expected = await running.tokens(PROMPT, 40)
    kinds = ("vocabulary", "round", "prefix", "credits", "empty", "miss")
    honest = [Device() for _ in range(2)]
    runs = [
        asyncio.create_task(one.run(running.client, opening(cut.manifest, PROMPT, 40), chain(3, expected, 0.7, seed)))
        for seed, one in enumerate(honest)
    ]
    for kind in kinds:
        with pytest.raises(ProtocolViolation) as caught:
            await Device().run(running.client, opening(cut.manifest, PROMPT, 40), _hostile(kind))
        assert caught.value.param == kind
    await asyncio.gather(*runs)
    assert all(one.tokens == expected for one in honest)
    assert running.workers[0]._lead.violations == dict.fromkeys(kinds, 1)
    assert await running.tokens(PROMPT, 40) == expected
    assert issubclass(ProtocolViolation, GanglionError)
