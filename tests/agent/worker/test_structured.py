"""Grammars and penalties of real sessions: the same tokens on one device and three, and those of transformers."""

from __future__ import annotations

import asyncio
import contextlib
import json

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from ganglion.agent.store import needed_pieces
from ganglion.proto import lane_pb2
from ganglion.wire.errors import InvalidRequest

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
EOS = 257
DEADLINE_S = 20.0
SCHEMA = {
    "x-guidance": {"whitespace_flexible": False},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": -5, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "long tag", "</s>", 7]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMAR = json.dumps({"grammars": [{"json_schema": SCHEMA}]})
PENALTIES = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2}
SAMPLINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 2} | PENALTIES,
    {"temperature": 3.0, "top_p": 0.9, "logit_bias": [{"id": ord('"'), "bias": -5.0}]},
    {"temperature": 1.0, "min_p": 0.3, "top_logprobs": 3} | PENALTIES,
]


async def answer(running, count=90, grammar=GRAMMAR, stop_ids=(EOS,), **sampling):
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1, "seed": 5} | sampling
    request = lane_pb2.Open(
        prompt=PROMPT, max_tokens=count, sampling=lane_pb2.Sampling(**described), stop_ids=stop_ids, grammar=grammar
    )
    found = []
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(running.client.run(request)) as events:
        async for event in events:
            found += event.tokens.tokens
            reason = event.finished.reason
    return found, reason


async def test_a_grammar_is_followed_alike_on_one_and_three(cluster, model):
    cut = model("llama")
    one = await cluster(cut, [[1]])
    three = await cluster(cut, [[2, 5, 1]], "star", sessions=3)
    needs = [
        cut.manifest.tokenizer["tokenizer.json"] in needed_pieces(cut.manifest, three.plan, node)
        for node in three.plan.devices
    ]
    assert needs == [True, False, False]  # only the lead masks
    expected = [await answer(one, **sampling) for sampling in SAMPLINGS]
    found = await asyncio.gather(*(answer(three, **sampling) for sampling in SAMPLINGS))  # several in a step
    assert found == expected  # log-probabilities too
    for tokens, reason in found:
        assert reason == lane_pb2.FINISH_REASON_STOP
        jsonschema.validate(json.loads(bytes(token.id for token in tokens)), SCHEMA)
    assert len({bytes(token.id for token in tokens) for tokens, _ in found}) > 2


async def test_penalties_alike_on_one_and_three_stages_and_never_kept_beyond_a_session(cluster, model):
    cut = model("llama")
    one, three = await cluster(cut, [[1]]), await cluster(cut, [[1], [2, 1]])
    plain = [token.id for token in (await answer(one, 12, "", repetition_penalty=1.0))[0]]
    seen = {tuple(plain)}
    for sampling in SAMPLINGS[2:]:
        expected = await answer(one, 12, "", **sampling)
        assert await answer(three, 12, "", **sampling) == expected
        seen.add(tuple(token.id for token in expected[0]))
    assert len(seen) == 4
    assert [token.id for token in (await answer(three, 12, ""))[0]] == plain


async def test_penalties_are_those_of_transformers(cluster, model):
    cut = model("llama")
    running = await cluster(cut, [[3, 1]], chunk=5)
    bias = {10: 2.0, 200: 1.0, 33: -100.0}
    reference = AutoModelForCausalLM.from_pretrained(cut.path, dtype=torch.float32)
    expected = reference.generate(
        torch.tensor([PROMPT]),
        do_sample=False,
        max_new_tokens=12,
        repetition_penalty=1.5,
        sequence_bias={(token,): value for token, value in bias.items()},
    )[0, len(PROMPT) :].tolist()
    biases = [{"id": token, "bias": value} for token, value in bias.items()]
    found, _ = await answer(running, 12, "", repetition_penalty=1.5, logit_bias=biases)
    assert [token.id for token in found] == expected
    assert expected != [token.id for token in (await answer(running, 12, ""))[0]]


async def test_a_grammar_that_is_cut_off_or_wrong(cluster, model):
    running = await cluster(model("llama"), [[1, 1]])
    tokens, reason = await answer(running, 3)
    assert (reason, bytes(token.id for token in tokens)) == (lane_pb2.FINISH_REASON_LENGTH, b'{"n')
    wrong = json.dumps({"grammars": [{"json_schema": {"type": "array", "uniqueItems": True}}]})
    for grammar, words in ((wrong, "uniqueItems"), ("x", "form")):
        with pytest.raises(InvalidRequest, match=words):
            await answer(running, grammar=grammar)
    with pytest.raises(InvalidRequest, match="repetition_penalty"):
        await answer(running, grammar="", repetition_penalty=-1.0)
    ended_by_eos = json.dumps({"grammars": [{"lark_grammar": "start: /x{2}y*/"}]})
    eager = [{"id": EOS, "bias": 100.0}]
    tokens, reason = await answer(running, grammar=ended_by_eos, stop_ids=(), logit_bias=eager)
    assert (reason, bytes(token.id for token in tokens)) == (lane_pb2.FINISH_REASON_STOP, b"xx")
    forced = json.dumps({"grammars": [{"lark_grammar": 'start: "é" | "è" </s>'}]})
    tokens, reason = await answer(running, grammar=forced)
    assert reason == lane_pb2.FINISH_REASON_STOP
    assert bytes(token.id for token in tokens).decode() in ("é", "è")
