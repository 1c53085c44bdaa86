"""A mixture whose experts lie on several devices: the tokens of one device, whoever holds what."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from verify_session import Device, opening

from ganglion.agent import control
from ganglion.agent.exchange.experts import ExpertExchange
from ganglion.agent.speculation.drafters import NGram
from ganglion.proto import lane_pb2
from ganglion.wire import lane_socket
from ganglion.wire.errors import DeviceLost, InvalidDocument
from ganglion.wire.frames import Dtype, Expectation, Kind
from ganglion.wire.nouns import Manifest, Plan
from ganglion.wire.routed import token_bytes

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]

DEADLINE_S = 20.0

Hold = Callable[[int, int, int], set[int]]
"""(expert, its layer's experts, devices) -> who holds it."""


def turns(expert: int, experts: int, devices: int) -> set[int]:
    return {expert % devices}


def replicas(expert: int, experts: int, devices: int) -> set[int]:
    return {expert % devices, expert * 7 % devices} | ({0} if expert == 1 else set())


def uneven(expert: int, experts: int, devices: int) -> set[int]:
    return {devices - 1} if expert else {0}


def elsewhere(expert: int, experts: int, devices: int) -> set[int]:
    """The lead holds none."""
    return {1 + expert % (devices - 1)}


def everywhere(expert: int, experts: int, devices: int) -> set[int]:
    return set(range(devices))


def placed(manifest: Manifest, hold: Hold, first: Hold | None = None) -> Callable[[Plan], Plan]:
    """A plan whose experts lie as `hold` says; `first`: those of the first layer that has any."""

    def change(plan: Plan) -> Plan:
        (stage,) = plan.stages
        devices = len(stage.shares)
        held: list[list[tuple[int, ...]]] = [[] for _ in range(devices)]
        how = first or hold
        for layer in manifest.layers:
            experts = next((one.groups for one in layer.segments if one.axis == "experts"), 0)
            for rank in range(devices):
                held[rank].append(tuple(one for one in range(experts) if rank in how(one, experts, devices)))
            how = hold if experts else how
        shares = tuple(
            msgspec.structs.replace(share, experts=tuple(held[rank])) for rank, share in enumerate(stage.shares)
        )
        return msgspec.structs.replace(plan, stages=(msgspec.structs.replace(stage, shares=shares),))

    return change


@pytest.fixture
def start(cluster):
    """A cluster of so many devices over which the experts of a model lie."""

    async def begin(cut: Any, devices: int, hold: Hold = turns, first: Hold | None = None, **options: Any) -> Any:
        change = options.pop("change", lambda plan: plan)
        lay = placed(cut.manifest, hold, first)
        layout = [[1, *[0] * (devices - 1)]]
        return await cluster(cut, layout, "star", change=lambda plan: change(lay(plan)), **options)

    return begin


@pytest.mark.parametrize(
    ("name", "weights"),
    [("qwen3-moe", "fp32"), ("qwen3-moe", "int4"), ("qwen3-moe", "int8"), ("olmoe", "fp32"), ("deepseek-lite", "int8")],
)
async def test_tokens_are_those_of_one_device(start, model, name, weights):
    cut = model(name, weights, "whole")
    one = await start(cut, 1)
    options = {"temperature": 0.8, "seed": 4, "top_logprobs": 2}
    expected, sampled = await one.tokens(PROMPT, 8), await one.answer(PROMPT, 8, **options)
    assert len(set(expected)) > 3
    if weights == "int4" and (await (await start(cut, 1, chunk=1)).answer(PROMPT, 8, **options))[0] != sampled[0]:
        pytest.skip("this processor's int4 kernels give a row alone other bits than in a batch")
    for devices, hold, chunk in ((2, turns, 16), (3, replicas, 5), (4, uneven, 64)):
        running = await start(cut, devices, hold, chunk=chunk)
        assert await running.tokens(PROMPT, 8) == expected
        assert (await running.answer(PROMPT, 8, **options))[0] == sampled[0]  # log-probabilities too


@pytest.mark.parametrize("name", ["deepseek-groups", "gpt-oss", "mixtral-one-kv-tied"])
async def test_tokens_of_other_mixtures(start, model, name):
    cut = model(name, "int8", "whole")
    expected = await (await start(cut, 1)).tokens(PROMPT, 8)
    assert await (await start(cut, 3, replicas, chunk=7)).tokens(PROMPT, 8) == expected


async def test_a_lead_without_experts_and_devices_without_those_of_a_layer(start, model):
    cut = model("olmoe", "int8", "whole")
    expected = await (await start(cut, 1)).tokens(PROMPT, 8)
    for hold, first in ((elsewhere, None), (turns, uneven), (uneven, everywhere), (turns, elsewhere)):
        running = await start(cut, 3, hold, first)
        assert await running.tokens(PROMPT, 8) == expected


async def test_devices_that_are_not_needed_hear_of_steps_only(start, model):
    cut = model("olmoe", "int8", "whole")
    running = await start(cut, 3, everywhere)
    expected = await (await start(cut, 1)).tokens(PROMPT, 8)
    assert await running.tokens(PROMPT, 8) == expected
    assert [lane.received_bytes for lane in running.lanes(0).values()] == [0, 0]


@pytest.fixture
def patience(monkeypatch):
    monkeypatch.setattr(lane_socket, "SPIN_S", 0.0)  # the workers share a loop: waiting in place only holds it up
    monkeypatch.setattr(lane_socket, "IN_PLACE_S", 0.0)


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("lanes", ["grpc", "socket"])
async def test_sessions_at_the_same_time_give_what_they_give_alone(start, model, lanes):
    cut = model("qwen3-moe", "int8", "whole")
    alone = await start(cut, 1)
    together = await start(cut, 3, replicas, chunk=9, sessions=4, lanes=lanes)
    assert {lane.medium for lane in together.lanes(0).values()} == {lanes}
    prompts = [PROMPT, PROMPT[:3], PROMPT[5:], PROMPT[7:19], PROMPT[:1]]
    expected = [await alone.tokens(prompt, 10) for prompt in prompts]
    assert await asyncio.gather(*(together.tokens(prompt, 10) for prompt in prompts)) == expected
    assert sum(together.kv_bytes()[1:]) == 0  # state is the lead's alone


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("lanes", ["grpc", "socket"])
async def test_a_whole_prompt_in_one_frame_a_layer(start, model, lanes):
    """More rows than a gRPC lane writes at once, and 256 in a step."""
    cut = model("olmoe", "fp32", "whole")
    prompt = (PROMPT * 20)[:250]
    expected = await (await start(cut, 1, context=256, chunk=256)).tokens(prompt, 4)
    running = await start(cut, 2, context=256, chunk=256, lanes=lanes)
    assert await running.tokens(prompt, 4) == expected


async def test_prompts_that_are_kept_are_the_leads_alone(start, model):
    cut = model("olmoe", "int8", "whole")
    running = await start(cut, 2, context=128, change=lambda plan: msgspec.structs.replace(plan, prefix_tokens=512))
    prompt = PROMPT * 4
    expected, first = await running.answer(prompt, 6)
    found, again = await running.answer(prompt, 6)
    assert found == expected
    assert (first.cached_tokens, again.cached_tokens) == (0, 64)


@pytest.mark.usefixtures("wide_windows")
async def test_windows_and_branches_are_rows_like_others(start, model):
    cut = model("olmoe", "int8", "whole")
    alone, running = await start(cut, 1), await start(cut, 3, replicas, drafter=NGram())
    for sampling in ({"temperature": 0.0}, {"temperature": 0.7, "seed": 5}):
        expected = await alone.tokens(PROMPT * 3, 30, **sampling)
        assert await running.tokens(PROMPT * 3, 30, **sampling) == expected
        device = Device()

        def draft(device: Device, prefix: Any, expected: list[int] = expected) -> lane_pb2.Drafts:
            told = expected[len(device.tokens) :][:5] or [1]
            wrong = [*told[:-1], (told[-1] + 1) % 97, 5]
            sides = [lane_pb2.Branch(parent=prefix.through(told[:-1]).name, tokens=[*told[-1:], 7])]
            return lane_pb2.Drafts(
                round=len(device.outcomes), branches=[lane_pb2.Branch(parent=prefix.name, tokens=wrong), *sides]
            )

        await device.run(running.client, opening(cut.manifest, PROMPT * 3, 30, **sampling), draft)
        assert device.tokens == expected


async def test_rounded_rows_are_those_of_the_plan_alone(start, model):
    """Twice the same, near what travels whole, and fewer bytes."""
    cut = model("olmoe", "int4-fast", "whole")
    sent, answers = {}, {}
    for payload in ("full", "fp16", "int8"):
        running = await start(
            cut, 2, change=lambda plan, payload=payload: msgspec.structs.replace(plan, payload=payload)
        )
        first, again = await running.answer(PROMPT, 8, top_logprobs=0), await running.answer(PROMPT, 8, top_logprobs=0)
        assert first[0] == again[0]
        answers[payload] = [token.logprob for token in first[0]]
        lane = running.lanes(0)[1]
        sent[payload] = lane.sent_bytes + lane.received_bytes
    assert sent["int8"] < sent["fp16"] < sent["full"]
    for payload, tolerance in (("fp16", 0.05), ("int8", 0.5)):
        assert abs(answers[payload][0] - answers["full"][0]) < tolerance


@pytest.mark.parametrize(("weights", "payload"), [("int8", "full"), ("int4-fast", "fp16"), ("int4-fast", "int8")])
async def test_bytes_per_token_are_those_that_are_counted(start, model, monkeypatch, weights, payload):
    cut = model("olmoe", weights, "whole")
    running = await start(
        cut, 3, replicas, change=lambda plan: msgspec.structs.replace(plan, payload=payload), context=256
    )
    await running.tokens(PROMPT, 1)
    touched: list[list[int]] = []
    give = ExpertExchange.give

    async def watched(self, step, index, routed):
        routing = await give(self, step, index, routed)
        touched.append([int(asked.counts[0]) for _, asked in routing.asked])
        return routing

    lanes = running.lanes(0).values()

    def travelled() -> int:
        return sum(lane.sent_bytes + lane.received_bytes for lane in lanes)

    monkeypatch.setattr(ExpertExchange, "give", watched)
    before = travelled()
    assert len(await running.tokens(PROMPT[:1], 60)) == 60
    layers = sum(any(one.axis == "experts" for one in layer.segments) for layer in cut.manifest.layers)
    tokens = len(touched) // layers
    hidden, exact = cut.manifest.geometry.hidden, cut.manifest.numeric_class.exact
    counted = sum(
        token_bytes(touched[at : at + layers], 3, hidden, exact=exact, payload=payload)
        for at in range(0, len(touched), layers)
    )
    assert tokens == 60
    assert travelled() - before == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("lanes", ["grpc", "auto"])
async def test_a_holder_killed_while_it_answers(start, model, victim, lanes):
    running = await start(model("olmoe", "int8", "whole"), 3, context=256, lanes=lanes)
    async with contextlib.aclosing(running.open_long(PROMPT, 230)) as events:
        tokens = 0
        while tokens < 3:
            tokens += len((await anext(events)).tokens.tokens)
        await running.kill(victim)
        with pytest.raises(DeviceLost, match=f"device-{victim}"):
            await running.drain(events)
    assert (await running.heard(0, control.PeerLost)).node_id == running.plan.devices[victim]


async def announce(running, rows: int = 2, step: int = 1) -> Any:
    lane = running.lanes(0)[1]
    told = lane_pb2.Step(step=step, entries=[lane_pb2.StepEntry(session=4, start=0, count=rows)])
    await lane.send_message(Kind.STEP, step, told.SerializeToString())
    return lane


def routed(hidden: int, rows: int = 1, expert: int = 1, weight: float = 1.0) -> bytes:
    """A frame that says so, one expert a row."""
    counts = np.ones(rows, np.uint16)
    experts = np.full(rows, expert, np.uint16)
    weights = np.full(rows, weight, np.float32)
    parts = (weights, np.zeros((rows, hidden), np.float32), experts, counts)
    return struct.pack("<II", rows, rows) + b"".join(part.tobytes() for part in parts)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"expert": 0}, "expert 0, which does not lie here"),
        ({"expert": 999}, "expert 999 of a layer"),
        ({"rows": 3}, "of 3 rows, the step has 2"),
        ({"weight": float("nan")}, "weights that are not finite"),
        ({"layer": 7}, "layer 7, which has no experts"),
        ({"step": 2}, "rows of step 2, expected of step 1"),
        ({"rows": 20}, "frame of"),
        ({"cut": 3}, "bytes"),
    ],
    ids=str,
)
async def test_a_lead_that_lies_is_cut_off(start, model, lie, reason):
    cut = model("olmoe", "int8", "whole")
    running = await start(cut, 2, chunk=3)
    lane = await announce(running)
    told = dict(lie)
    layer, step, cut_bytes = told.pop("layer", 1), told.pop("step", 1), told.pop("cut", 0)
    content = routed(cut.manifest.geometry.hidden, **told)
    await lane.send_message(Kind.ROUTED, step, content[: len(content) - cut_bytes], layer)
    lost = await running.heard(1, control.PeerLost)
    assert lost.node_id == running.plan.devices[0]
    assert reason in lost.reason


async def test_rows_of_a_layer_come_once_and_of_no_step_that_is_over(start, model):
    cut = model("olmoe", "int8", "whole")
    hidden = cut.manifest.geometry.hidden
    for first, then, reason in (
        ((1, 1), (1, 1), "layer 1 after those for layer 1"),
        ((1, 1), (1, 0), "layer 0 after those for layer 1"),
        ((1, 0), (2, 1), "step 2, expected of step 1"),
    ):
        running = await start(cut, 2)
        lane = await announce(running)
        for step, layer in (first, then):
            await lane.send_message(Kind.ROUTED, step, routed(hidden), layer)
        lost = await running.heard(1, control.PeerLost)
        assert reason in lost.reason


async def test_a_step_may_need_nothing_of_a_device(start, model):
    cut = model("olmoe", "int8", "whole")
    running = await start(cut, 2)
    lane = await announce(running)
    for step in (2, 3):
        told = lane_pb2.Step(step=step, entries=[lane_pb2.StepEntry(session=4, start=step, count=1)])
        await lane.send_message(Kind.STEP, step, told.SerializeToString())
    await lane.send_message(Kind.ROUTED, 3, routed(cut.manifest.geometry.hidden), 1)
    size = 4 * cut.manifest.geometry.hidden
    async with asyncio.timeout(DEADLINE_S):
        given = await lane.receive(Expectation(Kind.GIVEN, 3, 1, Dtype.U8, 1, size))
    assert given.shape == (1, size)


@pytest.mark.parametrize("change", ["kind", "size", "step"])
async def test_a_holder_that_lies_is_cut_off(start, model, monkeypatch, change):
    running = await start(model("olmoe", "int8", "whole"), 2)
    lane = running.lanes(1)[0]
    send = lane.send_tensor

    async def lying(kind, step, exchange, array):
        if change == "kind":
            kind = Kind.PARTIAL
        elif change == "step":
            step += 1
        else:
            array = np.ascontiguousarray(array[:, 4:])
        await send(kind, step, exchange, array)

    monkeypatch.setattr(lane, "send_tensor", lying)
    with pytest.raises(DeviceLost, match="device-1"):
        await running.tokens(PROMPT, 4)
    lost = await running.heard(0, control.PeerLost)
    assert lost.node_id == running.plan.devices[1]
    assert "frame" in lost.reason


@pytest.mark.parametrize("fault", ["overlap", "mesh"])
async def test_a_plan_that_nobody_can_run(start, model, fault):
    def change(plan: Plan) -> Plan:
        if fault == "overlap":
            return msgspec.structs.replace(plan, overlap=True)
        return msgspec.structs.replace(plan, stages=(msgspec.structs.replace(plan.stages[0], topology="mesh"),))

    with pytest.raises(InvalidDocument, match="experts on several devices"):
        await start(model("olmoe", "int8", "whole"), 2, change=change)
