"""The demo model cut and run by the dumb runner, for servers over HTTP; sessions with them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from openai_server import ModelServer
from reference_runner import Runner, cut_evenly
from tokenizers import Tokenizer

from ganglion.agent.speculation.http.client import Timeouts
from ganglion.agent.speculation.http.openai import HttpVerifier
from ganglion.agent.speculation.http.texts import TokenTexts
from ganglion.models import demo_path
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.proto import lane_pb2
from ganglion.wire.prefixes import Prefix

DEADLINE_S = 60.0
Serve = Callable[..., ModelServer]
Draft = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("demo")
    pieces = DirectorySink(folder / "pieces")
    path = demo_path("demo")
    manifest = partition(path, pieces, name="demo", numeric_class=numeric_class(path, "fp32"))
    return Runner(manifest, pieces, folder / "reference", cut_evenly(manifest, [1]))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))


@pytest.fixture(scope="session")
def texts() -> TokenTexts:
    stored = (demo_path("demo") / "tokenizer.json").read_bytes()
    return TokenTexts(stored, 2048, eos_ids=(0,), name="demo")


@pytest.fixture(scope="session")
def rows() -> dict[tuple[int, ...], Any]:
    return {}


@pytest.fixture
def serve(runner: Runner, tokenizer: Tokenizer, rows: dict[tuple[int, ...], Any]) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:
        yield lambda speaks, **options: stack.enter_context(
            ModelServer(runner, tokenizer, speaks, **({"rows": rows} | options))
        )


@pytest.fixture
async def verifier(texts: TokenTexts) -> AsyncIterator[Callable[..., HttpVerifier]]:
    made: list[HttpVerifier] = []

    def make(url: str, **options: Any) -> HttpVerifier:
        options = {"bos_id": 0, "timeouts": Timeouts(answer_s=20.0)} | options
        made.append(HttpVerifier(url, options.pop("texts", texts), **options))
        return made[-1]

    yield make
    for one in made:
        await one.close()


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    events: list[lane_pb2.Tokens] = field(default_factory=list)
    finished: lane_pb2.Finished | None = None
    requests: Any = None


def opening(
    prompt: Sequence[int], count: int, *, miss: int = lane_pb2.MISS_WAIT, vocab: int = 2048, **sampling: Any
) -> lane_pb2.Open:
    contract = lane_pb2.Contract(vocab=vocab, window_tokens=6, miss=miss)  # type: ignore[arg-type]
    told = lane_pb2.Sampling(**({"top_p": 1.0, "top_logprobs": -1} | sampling))
    return lane_pb2.Open(prompt=prompt, max_tokens=count, stop_ids=[0], contract=contract, sampling=told)


@pytest.fixture(scope="session")
def drafted() -> Callable[..., Any]:
    """A session whose device drafts `draft(ids, most)` after each outcome; checks every outcome against the mirror."""

    async def run(verifier: HttpVerifier, prompt: Sequence[int], count: int, draft: Draft, **sampling: Any) -> Answer:
        answer = Answer()
        async with asyncio.timeout(DEADLINE_S):
            stream = await verifier.open(opening(prompt, count, **sampling))
            ids, tip = list(prompt), Prefix.of(prompt)
            assert stream.accepted.terms.prefix == tip.name
            credit = stream.accepted.terms.credits
            sent = 0

            async def send(number: int) -> int:
                tokens = draft(ids, min(stream.accepted.terms.window_tokens, credit))
                if tokens:
                    branch = lane_pb2.Branch(parent=tip.name, tokens=tokens)
                    await stream.send(lane_pb2.Drafts(round=number, branches=[branch]))
                return len(tokens)

            sent = await send(0)
            credit -= sent
            async with contextlib.aclosing(stream.events()) as events:
                async for event in events:
                    if event.WhichOneof("body") == "finished":
                        answer.finished = event.finished
                        break
                    told = event.tokens
                    new = [token.id for token in told.tokens]
                    ids += new
                    tip = tip.through(new)
                    answer.tokens += new
                    answer.events.append(told)
                    assert told.outcome.round == len(answer.events)
                    assert told.outcome.prefix == tip.name
                    assert len(new) <= told.outcome.accepted + 1
                    credit += told.outcome.credits
                    credit -= await send(told.outcome.round)
            answer.requests = stream.requests
        return answer

    return run
