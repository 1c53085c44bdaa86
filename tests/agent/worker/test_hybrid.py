"""A drafting device and a real lead on a real stream: every mode gives the lead's own tokens; replicas may die."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from ganglion.agent.speculation.early import early_layers
from ganglion.agent.speculation.engine import DraftEngine, load_engine
from ganglion.agent.speculation.guesser import Guesser, Lookup
from ganglion.agent.speculation.hybrid import Hybrid, Policy, Target
from ganglion.agent.speculation.pilot import MODES, WAITING
from ganglion.agent.speculation.verifier import AgentVerifier
from ganglion.agent.store import PieceStore
from ganglion.proto import identity_pb2, lane_pb2
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import digest, tokenizer_digest

DEADLINE_S = 20.0
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33]
COUNT = 24
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.7, "seed": 11}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}]


def facts(manifest: Any, **changed: Any) -> Target:
    known = {
        "name": manifest.name,
        "manifest_digest": digest(manifest),
        "numeric_class": manifest.numeric_class.name,
        "tokenizer_digest": tokenizer_digest(manifest),
        "vocab": manifest.geometry.vocab,
        "context": 128,
    }
    return Target(**(known | changed))


def drafter(model: Any, folder: Any, layers: int = 2, slots: int = 4) -> DraftEngine:
    manifest = early_layers(model.manifest, layers)
    return load_engine(manifest, PieceStore(model.store).open, folder / "drafter", slots=slots, context=128)


def verifier(cluster: Any) -> AgentVerifier:
    client, worker = cluster.client, cluster.workers[0]
    peer = identity_pb2.Peer(record=worker._loaded.identity.record, address=client._address, name="tower")
    return AgentVerifier(client._identity, peer, "demo", 7)


def asked(prompt: list[int] = PROMPT, count: int = COUNT, **sampling: Any) -> lane_pb2.Open:
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
    return lane_pb2.Open(request_id="r", prompt=prompt, max_tokens=count, sampling=lane_pb2.Sampling(**described))


async def answer(hybrid: Hybrid, request: lane_pb2.Open, seen: asyncio.Event | None = None):
    tokens: list[int] = []
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(hybrid.serve(request, "gateway")) as events:
        async for event in events:
            tokens += [token.id for token in event.tokens.tokens]
            if seen is not None and len(tokens) > 4:
                seen.set()
            if event.HasField("finished"):
                return tokens, event.finished
    raise AssertionError("no finished event")


@pytest.mark.parametrize(
    ("weights", "layout", "modes"),
    [("fp32", [[1]], (*MODES, None)), ("mixed", [[1]], ("sync", "branch")), ("fp32", [[1, 1]], ("edge",))],
    ids=["fp32", "mixed", "two"],
)
async def test_every_mode_gives_the_leads_tokens(model, cluster, tmp_path, weights, layout, modes):
    cut = model("llama", weights)
    running = await cluster(cut, layout)
    guessers: list[Guesser] = [drafter(cut, tmp_path), Lookup()]
    expected = [await running.tokens(PROMPT, COUNT, **sampling) for sampling in SAMPLINGS]
    port = verifier(running)
    drafted = dict.fromkeys(modes, 0)
    for guesser in guessers:
        for mode in modes:
            hybrid = Hybrid(guesser, lambda: port, None, facts(cut.manifest), Policy(mode=mode))
            for sampling, tokens in zip(SAMPLINGS, expected, strict=True):
                found, finished = await answer(hybrid, asked(**sampling))
                assert found == tokens, (guesser.name, mode, sampling)
                assert finished.completion_tokens == COUNT
                assert mode in {None, finished.speculation.mode}
                drafted[mode] += finished.speculation.drafted
            await hybrid.close()
    for mode, count in drafted.items():
        if mode in {"plain", "own"}:
            assert count == 0  # this lead has no drafter
        elif mode in WAITING:
            assert count > 0
    await port.close()


async def test_several_answers_are_drafted_at_once(model, cluster, tmp_path):
    cut = model("llama")
    running = await cluster(cut, [[1]], sessions=4)
    port = verifier(running)
    hybrid = Hybrid(drafter(cut, tmp_path, slots=5), lambda: port, None, facts(cut.manifest), Policy(mode="edge"))
    requests = [asked(PROMPT[shift:], 20, temperature=0.7, seed=shift) for shift in range(3)]
    found = await asyncio.gather(*(answer(hybrid, request) for request in requests))
    for shift, (tokens, finished) in enumerate(found):
        assert tokens == await running.tokens(PROMPT[shift:], 20, temperature=0.7, seed=shift)
        assert finished.speculation.sent_bytes > 0
    await hybrid.close()
    await port.close()


@pytest.mark.parametrize("mode", ["sync", "branch"])
async def test_a_replica_dies_in_the_middle_and_another_goes_on(model, cluster, tmp_path, mode):
    cut = model("llama")
    first, second = await cluster(cut, [[1]]), await cluster(cut, [[1]])
    expected = await second.tokens(PROMPT, 100, temperature=0.7, seed=5)
    ports = [verifier(first), verifier(second)]
    dead: list[int] = []
    hybrid = Hybrid(drafter(cut, tmp_path), lambda: ports[len(dead)], None, facts(cut.manifest), Policy(mode=mode))
    begun = asyncio.Event()
    answering = asyncio.create_task(answer(hybrid, asked(count=100, temperature=0.7, seed=5), begun))
    async with asyncio.timeout(DEADLINE_S):
        await begun.wait()
    assert not answering.done()
    dead.append(1)
    await first.workers[0].close()
    tokens, finished = await answering
    assert tokens == expected
    assert finished.completion_tokens == 100
    await hybrid.close()
    for port in ports:
        await port.close()


async def test_a_verifier_of_another_model_is_refused_at_the_contract(model, cluster, tmp_path):
    cut = model("llama")
    running = await cluster(cut, [[1]])
    port = verifier(running)
    for changed, name in (
        ({"manifest_digest": "0" * 64}, "manifest_digest"),
        ({"numeric_class": "int4-32-exact"}, "numeric_class"),
        ({"tokenizer_digest": bytes(32)}, "tokenizer_digest"),
        ({"vocab": 17}, "vocab"),
    ):
        hybrid = Hybrid(Lookup(), lambda: port, None, facts(cut.manifest, **changed), Policy(away=lane_pb2.AWAY_LOCAL))
        with pytest.raises(Unsupported, match=name):
            await answer(hybrid, asked())
        await hybrid.close()
    await port.close()
