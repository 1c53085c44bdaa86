"""What guesses at a lead, and a device that drafts for another: the tokens are those of the target alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from verifier_replicas import Process

from ganglion.agent import control
from ganglion.agent.speculation.http.openai import HttpVerifier
from ganglion.agent.speculation.http.rounds import RoundVerifier
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.agent.store import ManifestShelf
from ganglion.agent.worker_drafting import DraftingFor, Guessing
from ganglion.models import demo_path
from ganglion.proto import lane_pb2
from ganglion.wire.errors import GanglionError, InvalidRequest, Unavailable
from ganglion.wire.nouns import Drafter, Drafting, Plan, digest

DEADLINE_S = 20.0
PROMPT = [5, 9, 2, 5, 9, 2, 5, 9]
COUNT = 24


def guessing(drafter: Drafter) -> Any:
    return lambda plan: msgspec.structs.replace(plan, drafter=drafter)


def drafting(manifest: Any, **options: Any) -> Any:
    """A plan that drafts for `big`, with an engine of its own model."""

    def change(plan: Plan) -> Plan:
        own = Drafter(kind="model", manifest_digest=digest(manifest), slots=8, context=128)
        return msgspec.structs.replace(plan, drafter=own, drafting=Drafting(target="big", **options))

    return change


def asked(prompt: Sequence[int], target: str = "big", away: int = 0, **sampling: Any) -> lane_pb2.Open:
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
    return lane_pb2.Open(
        request_id="r",
        prompt=prompt,
        max_tokens=COUNT,
        sampling=lane_pb2.Sampling(**described),
        target=target,
        away=away,
    )


async def answer(cluster: Any, request: lane_pb2.Open) -> tuple[list[int], list[bool], lane_pb2.Finished]:
    """(ids, whether each was drawn by the device alone, the end) of one session."""
    ids: list[int] = []
    local: list[bool] = []
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(cluster.client.run(request)) as events:
        async for event in events:
            ids += [token.id for token in event.tokens.tokens]
            local += [event.tokens.local] * len(event.tokens.tokens)
            if event.WhichOneof("body") == "finished":
                return ids, local, event.finished
    raise AssertionError("no finished event")


def verifier_of(target: Any) -> control.Verifier:
    loaded = target.workers[0]._loaded
    record = loaded.identity.record.SerializeToString()
    lead = control.PeerEntry(record=record, address=f"127.0.0.1:{loaded.server.port}", name="cloud")
    return control.Verifier(
        target="big",
        lead=lead,
        lead_deployment="demo",
        lead_epoch=7,
        manifest_digest=digest(loaded.manifest),
        numeric_class=loaded.manifest.numeric_class.name,
        context=loaded.plan.context,
        vocab=loaded.manifest.geometry.vocab,
        eos_ids=loaded.manifest.eos_ids,
    )


async def admit(target: Any, device: Any) -> None:
    """The target's lead lets the device's agent open sessions."""
    entry = control.PeerEntry(
        record=device.workers[0]._loaded.identity.record.SerializeToString(), address="", name="device"
    )
    await target.workers[0].handle(control.Gateways(gateways=(entry,)))


@pytest.mark.parametrize(
    "drafter",
    [
        Drafter(kind="ngram"),
        Drafter(kind="ngram", window_tokens=2),
        Drafter(kind="early", layers=2, slots=2, context=128),
    ],
)
@pytest.mark.parametrize("layout", [[[1]], [[1, 1]]])
async def test_what_guesses_at_a_lead_changes_no_token(cluster, model, drafter, layout):
    alone = await cluster(model(), [[1]])
    wanted = [await alone.tokens(PROMPT, COUNT), await alone.tokens(PROMPT, COUNT, temperature=0.8, seed=3)]
    helped = await cluster(model(), layout, change=guessing(drafter))
    assert helped.workers[0]._loaded.guessing.drafter is not None
    assert [
        await helped.tokens(PROMPT, COUNT),
        await helped.tokens(PROMPT, COUNT, temperature=0.8, seed=3),
    ] == wanted


async def test_a_device_drafts_and_the_target_answers(cluster, model):
    target = await cluster(model(), [[1]])
    wanted = await target.tokens(PROMPT, COUNT)
    device = await cluster(model(), [[1]], change=drafting(model().manifest, mode="sync"))
    await admit(target, device)
    await device.workers[0].handle(verifier_of(target))
    ids, local, finished = await answer(device, asked(PROMPT))
    assert ids == wanted
    assert not any(local)
    # Whether guesses pay here is for the measurement to say; that they were verified there is not.
    assert (finished.speculation.mode, finished.speculation.passes > 0) == ("sync", True)
    assert finished.speculation.sent_bytes > 0
    # Its own model is served as before.
    assert await device.tokens(PROMPT, COUNT) == wanted
    with pytest.raises(InvalidRequest, match="drafts for big"):
        await answer(device, asked(PROMPT, target="another"))


async def test_while_nobody_verifies_the_policy_decides(cluster, model):
    target = await cluster(model(), [[1]])
    wanted = await target.tokens(PROMPT, COUNT)
    device = await cluster(model(), [[1]], change=drafting(model().manifest, wait_s=0.2))
    with pytest.raises(Unavailable, match="big is away"):
        await answer(device, asked(PROMPT, away=lane_pb2.AWAY_FAIL))
    with pytest.raises(GanglionError, match="has been away"):
        await answer(device, asked(PROMPT))
    ids, local, finished = await answer(device, asked(PROMPT, away=lane_pb2.AWAY_LOCAL))
    assert ids == wanted  # its model is the same one here
    assert all(local)
    assert finished.local_tokens == COUNT
    # It comes, and goes again.
    await admit(target, device)
    await device.workers[0].handle(verifier_of(target))
    assert (await answer(device, asked(PROMPT)))[1] == [False] * COUNT
    await device.workers[0].handle(control.Verifier(target="big", why_away="gone"))
    with pytest.raises(Unavailable, match="big is away"):
        await answer(device, asked(PROMPT, away=lane_pb2.AWAY_FAIL))


async def test_a_device_drafts_for_a_replica_at_a_url(cluster, model):
    made = model()
    ManifestShelf(made.store).put(made.manifest)
    target = await cluster(made, [[1]])
    wanted = await target.tokens(PROMPT, COUNT, temperature=0.8, seed=3)
    replica = await Process.start(made.store, made.manifest.name)
    try:
        url = f"http://127.0.0.1:{replica.port}/verify"
        device = await cluster(made, [[1]], change=drafting(made.manifest, mode="sync", url=url, wait_s=0.2))
        await device.workers[0].handle(control.Verifier(target="big", url=url))
        ids, local, finished = await answer(device, asked(PROMPT, temperature=0.8, seed=3))
        assert ids == wanted
        assert not any(local)
        assert finished.speculation.sent_bytes > 0
    finally:
        await replica.end()
    ids, local, _ = await answer(device, asked(PROMPT, away=lane_pb2.AWAY_LOCAL, temperature=0.8, seed=3))
    assert (ids, all(local)) == (wanted, True)  # it is gone, and the model is the same one here


@pytest.mark.parametrize(
    ("url", "kind", "where"),
    [
        ("http://127.0.0.1:1/verify", RoundVerifier, "http://127.0.0.1:1"),
        ("http://127.0.0.1:1/ours/verify", RoundVerifier, "http://127.0.0.1:1/ours"),
        ("http://127.0.0.1:1/v1", HttpVerifier, "http://127.0.0.1:1/v1"),
    ],
)
async def test_the_url_says_which_kind_verifies(world, model, url, kind, where):
    stored = (demo_path("demo") / "tokenizer.json").read_bytes()
    texts = TokenTexts(stored, 2048, eos_ids=(0,), name="demo")
    drafts = DraftingFor(
        world.node(),
        model().manifest,
        Drafting(target="big", url=url),
        Guessing(texts=texts),
        lambda *_: pytest.fail("it ran here"),
    )
    try:
        drafts.told(control.Verifier(target="big", url=url))
        assert isinstance(drafts._verifier, kind)
        assert drafts._verifier.name == where
    finally:
        await drafts.close()


async def test_a_lead_that_drafts_for_nobody_refuses_such_sessions(cluster, model):
    alone = await cluster(model(), [[1]])
    with pytest.raises(InvalidRequest, match="does not draft"):
        await answer(alone, asked(PROMPT))
