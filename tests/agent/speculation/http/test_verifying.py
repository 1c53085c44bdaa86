"""Sessions over HTTP say what the model says alone, whatever is drafted and however the server is asked."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from ganglion.agent.speculation.http.openai import HttpVerifier
from ganglion.proto import lane_pb2

PROMPTS = (
    "<|endoftext|><|user|>Write a function that sorts a list<|end|><|assistant|>",
    "# A small example\nfor i in range(10):\n    ",
    "def main(argv=None):\n    parser = argparse",
)
SERVERS: dict[str, dict[str, Any]] = {
    "vllm": {},
    "llama-server": {"slots": 5},
    "llama-cpp-python": {},
    "echo": {},
}


def drafting(server: Any, prompt: list[int], count: int, kind: str) -> Any:
    """Drafts: those of the model with some tokens spoilt, random ones, none."""
    true = [*prompt, *server.greedy(prompt, count + 8)]
    dice = random.Random(5)

    def draft(ids: list[int], most: int) -> list[int]:
        if kind == "none":
            return []
        if kind == "random":
            return [dice.randrange(4, 2048) for _ in range(most)]
        return [token if dice.random() < 0.8 else dice.randrange(4, 2048) for token in true[len(ids) : len(ids) + most]]

    return draft


@pytest.mark.parametrize("kind", ["good", "random", "none"])
@pytest.mark.parametrize("speaks", SERVERS)
async def test_tokens_are_the_servers_own(serve, tokenizer, verifier, drafted, speaks, kind) -> None:
    server = serve(speaks, **SERVERS[speaks])
    made: HttpVerifier = verifier(server.url)
    miss = lane_pb2.MISS_RUN if kind == "none" else lane_pb2.MISS_WAIT
    count = 40 if kind == "good" else 8
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        draft = drafting(server, ids, count, kind)
        answer = await drafted(made, ids, count, draft, miss=miss)
        assert answer.tokens == server.greedy(ids, count, stops=[0])
        finished = answer.finished
        assert finished.completion_tokens == len(answer.tokens)
        assert finished.speculation.passes <= len(answer.events) + 1
        if kind == "good" and len(answer.tokens) == 40:
            assert finished.speculation.passes < 30
            assert finished.speculation.accepted > 10
        assert answer.requests.drawn_alone == 0
        assert finished.speculation.sent_bytes > 0


async def test_a_text_that_the_server_would_write_in_other_tokens(serve, tokenizer, verifier, drafted) -> None:
    """The model writes "FIXME" in other tokens than its tokenizer: by text the server then goes on by itself."""
    server = serve("llama-cpp-python")
    ids = tokenizer.encode("def fibonacci(n):\n").ids
    true = server.greedy(ids, 60)
    assert tokenizer.encode(tokenizer.decode([*ids, *true])).ids != [*ids, *true]
    answer = await drafted(verifier(server.url), ids, 60, drafting(server, ids, 60, "good"))
    assert answer.tokens == true
    assert answer.requests.drawn_alone > 0
    assert answer.requests.count < 30
    by_ids = await drafted(verifier(serve("vllm").url), ids, 60, drafting(server, ids, 60, "good"))
    assert by_ids.tokens == true


async def test_a_prompt_that_the_server_would_write_in_other_tokens(serve, tokenizer, verifier, drafted) -> None:
    from ganglion.wire.errors import Unsupported

    server = serve("llama-cpp-python")
    ids = [tokenizer.token_to_id(letter) for letter in "return"]
    with pytest.raises(Unsupported, match=r"takes text only.*token ids"):
        await drafted(verifier(server.url), ids, 8, lambda ids, most: [5])


@pytest.mark.parametrize("speaks", ["vllm", "llama-server"])
async def test_log_probabilities(serve, tokenizer, verifier, drafted, speaks) -> None:
    server = serve(speaks)
    ids = tokenizer.encode(PROMPTS[2]).ids
    draft = drafting(server, ids, 12, "good")
    answer = await drafted(verifier(server.url), ids, 12, draft, top_logprobs=3)
    seen = list(ids)
    for token in (one for event in answer.events for one in event.tokens):
        row = server.logprobs(seen)[-1]
        assert token.logprob == pytest.approx(row[token.id], abs=1e-6)
        assert [one.id for one in token.top] == row.argsort()[::-1][:3].tolist()
        seen.append(token.id)


@pytest.mark.parametrize("speaks", SERVERS)
async def test_the_context_ends(serve, tokenizer, verifier, drafted, speaks) -> None:
    ids = tokenizer.encode(PROMPTS[2]).ids
    server = serve(speaks, context=len(ids) + 12)
    answer = await drafted(verifier(server.url), ids, 100, drafting(server, ids, 30, "good"))
    assert answer.finished.reason == lane_pb2.FINISH_REASON_LENGTH
    true = server.greedy(ids, 20)
    assert answer.tokens == true[: len(answer.tokens)]
    assert 11 <= len(answer.tokens) <= 12


@pytest.mark.parametrize("speaks", SERVERS)
async def test_a_stop_inside_a_window(serve, tokenizer, verifier, drafted, speaks) -> None:
    """Drafts that go on past the end are not believed."""
    server = serve(speaks)
    ids = tokenizer.encode(PROMPTS[1]).ids
    true = server.greedy(ids, 80, stops=[0])
    assert len(true) < 80
    beyond = [*ids, *true, *[300] * 8]
    start = len(true) - 3
    answer = await drafted(
        verifier(server.url), [*ids, *true[:start]], 80, lambda ids, most: beyond[len(ids) : len(ids) + most]
    )
    assert answer.tokens == true[start:]
    assert answer.finished.reason == lane_pb2.FINISH_REASON_STOP


@pytest.mark.parametrize("by", [0.3, 5.0])
@pytest.mark.parametrize("speaks", SERVERS)
async def test_characters_of_several_tokens(serve, tokenizer, verifier, drafted, speaks, by) -> None:
    """The answer is made to hold a letter that the vocabulary has in two halves only; `by` so much likelier."""
    server = serve(speaks, rows={})
    ids = tokenizer.encode(PROMPTS[2]).ids
    first = server.greedy(ids, 3)
    letter = tokenizer.encode("ж").ids
    assert len(letter) == 2
    said = [*ids, *first]
    for token in [*letter, *letter]:  # the model is led to say it: these rows are what it would have had to compute
        server.logprobs(said)
        row = server.rows[tuple(said)].copy()
        row[token] = row.max() + by
        server.rows[tuple(said)] = row - np.log(np.exp(row).sum())
        said.append(token)
    true = server.greedy(ids, 10)
    assert true[3:7] == [*letter, *letter]
    for kind in ("good", "none"):
        miss = lane_pb2.MISS_RUN if kind == "none" else lane_pb2.MISS_WAIT
        answer = await drafted(verifier(server.url), ids, 10, drafting(server, ids, 10, kind), miss=miss)
        assert answer.tokens == true
