"""Answers that are drafted here and verified there: the target's tokens in every mode, through losses, and alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_verifier import NUMERIC_CLASS, EngineVerifier, unreachable

from ganglion.agent.speculation.early import early_layers
from ganglion.agent.speculation.engine import Ask, DraftEngine, Guess
from ganglion.agent.speculation.guesser import Guesser, Lookup
from ganglion.agent.speculation.hybrid import Hybrid, Policy, Target
from ganglion.agent.speculation.pilot import MODES
from ganglion.proto import lane_pb2
from ganglion.wire.errors import (
    ContextExceeded,
    DeviceLost,
    Exhausted,
    GanglionError,
    InvalidRequest,
    ProtocolViolation,
    Unavailable,
    Unsupported,
)
from ganglion.wire.nouns import digest, tokenizer_digest
from ganglion.wire.sampling.parameters import Sampling, parse_sampling

DEADLINE_S = 20.0
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101]
COUNT = 24
WARM = {"temperature": 0.7, "seed": 11}
SAMPLINGS: list[dict[str, Any]] = [{}, WARM, {"temperature": 1.0, "top_p": 0.9, "seed": 3}]


def opened(prompt: Sequence[int] = PROMPT, count: int = COUNT, away: int = 0, **sampling: Any) -> lane_pb2.Open:
    described = {"temperature": 0.0, "top_p": 1.0, "top_logprobs": -1} | sampling
    return lane_pb2.Open(
        request_id="r", prompt=prompt, max_tokens=count, sampling=lane_pb2.Sampling(**described), away=away
    )


class World:
    """Engines of one cut model: the target's, its early layers as drafters, and the device's own model."""

    def __init__(self, cut: Any) -> None:
        self.manifest = cut.manifest
        self.target: DraftEngine = cut.engine(slots=8, context=256)
        self.equal: DraftEngine = cut.engine(slots=8, context=256)
        self.early: DraftEngine = cut.engine(early_layers(cut.manifest, 2), slots=6, context=256)
        self.own: DraftEngine = cut.engine(early_layers(cut.manifest, 1), slots=8, context=256)
        self.narrow: DraftEngine = cut.engine(early_layers(cut.manifest, 2), slots=2, context=len(PROMPT) + 9)
        self.facts = Target(
            cut.manifest.name,
            digest(cut.manifest),
            NUMERIC_CLASS,
            tokenizer_digest(cut.manifest),
            cut.manifest.geometry.vocab,
            256,
        )
        self._texts: dict[tuple[Any, ...], list[int]] = {}

    def alone(self, request: lane_pb2.Open) -> list[int]:
        """What the target says by itself."""
        key = tuple(request.prompt), request.max_tokens, request.sampling.SerializeToString()
        if key not in self._texts:
            sampling = parse_sampling(request.sampling, self.facts.vocab)
            self._texts[key] = chain(self.target, request.prompt, request.max_tokens, sampling)
        return self._texts[key]

    async def local(self, request: lane_pb2.Open, gateway: str) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
        """The device's own lead: its early layers answer."""
        assert gateway == "gateway"
        yield lane_pb2.SessionEvent(accepted=lane_pb2.Accepted(numeric_class="own"))
        sampling = parse_sampling(request.sampling, self.facts.vocab)
        for token in chain(self.early, request.prompt, request.max_tokens, sampling):
            await asyncio.sleep(0)
            yield lane_pb2.SessionEvent(tokens=lane_pb2.Tokens(tokens=[lane_pb2.Token(id=token)]))
        yield lane_pb2.SessionEvent(finished=lane_pb2.Finished(reason=lane_pb2.FINISH_REASON_LENGTH))


def chain(engine: DraftEngine, prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        (guess,) = engine.step([Ask(0, text, sampling)])
        text.append(guess.tokens[0])
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def world(model: Callable[..., Any]) -> World:
    return World(model("llama"))


@pytest.fixture
async def hybrid(world: World):
    """Call it with a guesser and verifiers (the first one that is there answers); nothing may be left running."""
    made: list[tuple[Hybrid, list[EngineVerifier]]] = []

    def make(guesser: Guesser | None, *verifiers: EngineVerifier, local: Any = None, **policy: Any) -> Hybrid:
        found = Hybrid(
            guesser, lambda: next(iter(verifiers), None), local, world.facts, Policy(**({"wait_s": 20.0} | policy))
        )
        made.append((found, list(verifiers)))
        return found

    yield make
    for one, verifiers in made:
        await one.close()
        for verifier in verifiers:
            assert not verifier.running
    assert asyncio.all_tasks() == {asyncio.current_task()}


class Answered:
    """What a gateway saw."""

    def __init__(self) -> None:
        self.events: list[lane_pb2.SessionEvent] = []

    @property
    def tokens(self) -> list[int]:
        return [token.id for event in self.events for token in event.tokens.tokens]

    @property
    def local(self) -> list[int]:
        return [token.id for event in self.events if event.tokens.local for token in event.tokens.tokens]

    @property
    def finished(self) -> lane_pb2.Finished:
        assert [event.WhichOneof("body") for event in self.events].count("accepted") == 1
        assert self.events[0].HasField("accepted")
        return self.events[-1].finished


async def answer(hybrid: Hybrid, request: lane_pb2.Open, into: Answered | None = None) -> Answered:
    found = into or Answered()
    async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(hybrid.serve(request, "gateway")) as events:
        async for event in events:
            assert not event.tokens.HasField("outcome")
            found.events.append(event)
    return found


class Turned:
    """A drafter whose guesses are turned: `how` makes of the best tokens what is guessed."""

    def __init__(self, engine: DraftEngine, how: Callable[[tuple[int, ...], int], tuple[int, ...]]) -> None:
        self._engine = engine
        self._how = how

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, asks: Sequence[Ask]) -> list[Guess]:
        guesses = self._engine.step(asks)
        return [
            replace(one, tokens=self._how(one.tokens, len(ask.tokens))) for one, ask in zip(guesses, asks, strict=True)
        ]


class Swapped:
    """One drafter for the first steps, and then another, which knows nothing of what was drafted."""

    def __init__(self, first: DraftEngine, second: DraftEngine, steps: int) -> None:
        self._engines, self._left = (first, second), steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines[self._left <= 0], name)

    def step(self, asks: Sequence[Ask]) -> list[Guess]:
        self._left -= 1
        return self._engines[self._left <= 0].step(asks)


def at_random(tokens: tuple[int, ...], at: int) -> tuple[int, ...]:
    return tuple((token * 31 + at * 17) % 97 for token in tokens[:1])


GUESSERS: dict[str, Callable[[World], Guesser | None]] = {
    "equal": lambda world: world.equal,
    "early": lambda world: world.early,
    "ngram": lambda world: Lookup(),
    "random": lambda world: Turned(world.early, at_random),
    # Of an equal drafter always the second guess first: never right, and its branches nearly always.
    "adversary": lambda world: Turned(world.equal, lambda tokens, at: (*tokens[1:2], *tokens[:1], *tokens[2:])),
    "swapped": lambda world: Swapped(world.equal, world.early, 5),
}


# The same tokens.


@pytest.mark.parametrize("mode", [*MODES, None])
@pytest.mark.parametrize("drafter", GUESSERS)
async def test_every_mode_answers_as_the_target_alone(world, hybrid, mode, drafter):
    for own in (None, world.own):
        verifier = EngineVerifier(world.target, own=own)
        one = hybrid(GUESSERS[drafter](world), verifier, mode=mode)
        for sampling in SAMPLINGS:
            request = opened(**sampling)
            found = await answer(one, request)
            assert found.tokens == world.alone(request)
            finished = found.finished
            assert finished.reason == lane_pb2.FINISH_REASON_LENGTH
            assert (finished.prompt_tokens, finished.completion_tokens) == (len(PROMPT), COUNT)
            assert (finished.local_tokens, len(found.local)) == (0, 0)
            said = finished.speculation
            assert sum(said.accepted_counts) == said.passes
            assert sum(count * passes for count, passes in enumerate(said.accepted_counts)) == said.accepted
            assert said.accepted <= said.drafted
            assert COUNT - said.passes <= said.accepted <= COUNT
            assert said.mode in MODES
            assert mode in {None, said.mode}
            assert finished.timings.wall_s >= finished.timings.ttft_s > 0.0


@pytest.mark.parametrize("mode", MODES)
async def test_a_forced_mode_is_kept_to(world, hybrid, mode):
    """What the verifier is asked and sent is the mode's, with a drafter that is always right."""
    verifier = EngineVerifier(world.target, own=world.own, turns=60 if mode == "branch" else 3)
    one = hybrid(world.early if mode == "branch" else world.equal, verifier, mode=mode)
    found = await answer(one, opened(count=40))
    said, (stream,) = found.finished.speculation, verifier.streams
    misses = {message.miss for message in stream.messages} - {lane_pb2.MISS_UNSPECIFIED}
    sent = [len(branch.tokens) for message in stream.messages for branch in message.branches]
    assert said.mode == mode
    if mode == "plain":
        assert (said.passes, said.drafted, stream.messages, said.sent_bytes) == (40, 0, [], 0)
        assert verifier.opened[0].contract.miss == lane_pb2.MISS_RUN
    elif mode == "own":
        assert (stream.messages, said.hits) == ([], 0)
        assert said.accepted > 0
        assert verifier.opened[0].contract.miss == lane_pb2.MISS_DRAFT
    elif mode == "branch":
        assert not misses
        starts = [branch.parent for message in stream.messages for branch in message.branches]
        assert max(map(starts.count, starts)) > 1  # several continuations of one prefix
        assert said.hits > 0
    else:
        asked = [message.miss for message in stream.messages if message.miss]
        assert asked in ([lane_pb2.MISS_WAIT], [lane_pb2.MISS_WAIT, lane_pb2.MISS_DRAFT])
        assert len(asked) == 1 or stream.messages[-1].miss == lane_pb2.MISS_DRAFT  # there is nothing left to draft
        assert all(len(message.branches) <= 1 for message in stream.messages)
        assert said.accepted > said.passes  # of the equal drafter's, all are accepted
        assert (said.hits > 0) <= (mode == "ahead")
        assert said.sent_bytes == sum(lane_pb2.SessionRequest(drafts=message).ByteSize() for message in stream.messages)
    assert all(size > 0 for size in sent)


async def test_answers_share_one_drafter_and_more_than_it_has_slots_are_answered(world, hybrid):
    verifier = EngineVerifier(world.target)
    one = hybrid(world.narrow, verifier, mode="branch")
    requests = [opened(PROMPT[shift:], 12, temperature=0.7, seed=shift) for shift in range(5)]
    found = await asyncio.gather(*(answer(one, request) for request in requests))
    for request, each in zip(requests, found, strict=True):
        assert each.tokens == world.alone(request)
    assert sum(bool(stream.messages and stream.messages[0].branches) for stream in verifier.streams) >= 2
    again = await answer(one, opened(count=6))
    assert again.finished.speculation.sent_bytes > 0  # every slot has come back


async def test_a_drafter_whose_context_ends_leaves_the_rest_to_the_verifier(world, hybrid):
    for mode in ("sync", "branch"):
        verifier = EngineVerifier(world.target)
        found = await answer(hybrid(world.narrow, verifier, mode=mode), opened(count=40))
        assert found.tokens == world.alone(opened(count=40))
        assert found.finished.speculation.sent_bytes > 0


async def test_a_drafter_that_fails_costs_no_answer(world, hybrid):
    class Failing(Lookup):
        steps = 0

        def step(self, asks: Sequence[Ask]) -> list[Guess]:
            self.steps += 1
            if self.steps > 12:
                raise RuntimeError("out of order")
            return [Guess((65,), (1.0,)) for _ in asks]

    verifier = EngineVerifier(world.target)
    failing = Failing()
    found = await answer(hybrid(failing, verifier, mode="sync"), opened())
    assert found.tokens == world.alone(opened())
    assert failing.steps == 13
    assert found.finished.speculation.drafted > 0


async def test_a_device_without_a_drafter_still_answers(world, hybrid):
    found = await answer(hybrid(None, EngineVerifier(world.target)), opened())
    assert found.tokens == world.alone(opened())


async def test_a_stop_id_ends_the_answer(world, hybrid):
    alone = world.alone(opened())
    stop = alone[9]
    for mode in ("sync", "branch", "ahead"):
        request = opened()
        request.stop_ids.append(stop)
        found = await answer(hybrid(world.equal, EngineVerifier(world.target), mode=mode), request)
        assert found.tokens == alone[: alone.index(stop)]
        assert found.finished.reason == lane_pb2.FINISH_REASON_STOP


async def test_a_gateway_that_leaves_ends_the_verify_session(world, hybrid):
    verifier = EngineVerifier(world.target)
    one = hybrid(world.equal, verifier, mode="sync")
    async with asyncio.timeout(DEADLINE_S):
        events = one.serve(opened(count=200), "gateway")
        async for event in events:
            if event.HasField("tokens"):
                break
        await events.aclose()
    assert len(verifier.streams) == 1
    assert not verifier.running


# Away.


@pytest.mark.parametrize("mode", ["sync", "branch", None])
@pytest.mark.parametrize("sampling", [{}, WARM], ids=["greedy", "warm"])
async def test_lost_and_back_the_same_tokens_follow(world, hybrid, mode, sampling):
    verifier = EngineVerifier(world.target, lose_after=3)
    request = opened(**sampling)
    found = await answer(hybrid(world.early, verifier, mode=mode), request)
    assert verifier.lose_after is None
    assert found.tokens == world.alone(request)
    first, second = verifier.opened
    answered = second.answered
    assert 0 < answered < COUNT
    assert (first.answered, second.max_tokens) == (0, COUNT - answered)
    assert list(second.prompt) == [*PROMPT, *found.tokens[:answered]]
    assert found.finished.completion_tokens == COUNT


async def test_lost_and_gone_on_alone_and_back_for_the_next_answer(world, hybrid):
    verifier = EngineVerifier(world.target, lose_after=3)
    one = hybrid(world.early, verifier, local=world.local, away=lane_pb2.AWAY_LOCAL)
    found = await answer(one, opened())
    done = len(found.tokens) - len(found.local)
    assert 0 < done < COUNT
    assert found.tokens[:done] == world.alone(opened())[:done]
    assert found.local == chain(world.early, [*PROMPT, *found.tokens[:done]], COUNT - done, Sampling())
    assert found.finished.local_tokens == len(found.local)
    assert found.finished.completion_tokens == COUNT
    again = await answer(one, opened())
    assert again.tokens == world.alone(opened())
    assert again.finished.local_tokens == 0


async def test_alone_from_the_beginning(world, hybrid):
    verifier = EngineVerifier(world.target, refuse=unreachable())
    one = hybrid(world.early, verifier, local=world.local, away=lane_pb2.AWAY_LOCAL)
    found = await answer(one, opened())
    assert found.local == found.tokens == chain(world.early, PROMPT, COUNT, Sampling())
    assert found.events[0].accepted.numeric_class == "own"
    assert not found.finished.HasField("speculation")
    verifier.refuse = None
    assert (await answer(one, opened())).tokens == world.alone(opened())


async def test_nobody_there_is_away_too(world, hybrid):
    one = hybrid(world.early, away=lane_pb2.AWAY_FAIL)
    with pytest.raises(Unavailable, match=r"nobody verifies for llama at present.*--away wait"):
        await answer(one, opened())


async def test_waiting_ends_at_its_bound_and_names_it(world, hybrid):
    verifier = EngineVerifier(world.target, refuse=unreachable())
    one = hybrid(world.early, verifier, local=world.local, wait_s=0.25)
    with pytest.raises(Unavailable, match=r"llama has been away for 0.25 s \(127.0.0.1:1 did not answer\).*wait_s"):
        await answer(one, opened())
    assert len(verifier.opened) >= 2


async def test_failing_at_once_where_the_request_says_so(world, hybrid):
    verifier = EngineVerifier(world.target, lose_after=2)
    one = hybrid(world.early, verifier, local=world.local, away=lane_pb2.AWAY_LOCAL)
    found = Answered()
    with pytest.raises(DeviceLost, match="the tower fell"):
        await answer(one, opened(away=lane_pb2.AWAY_FAIL), found)
    assert found.tokens == world.alone(opened())[: len(found.tokens)]
    verifier.lose_after = 2
    back = await answer(one, opened(away=lane_pb2.AWAY_WAIT))
    assert back.tokens == world.alone(opened())
    assert not back.local


async def test_going_on_alone_without_a_model_says_so(world, hybrid):
    verifier = EngineVerifier(world.target, refuse=unreachable())
    with pytest.raises(Unavailable, match="no model on this device can go on"):
        await answer(hybrid(Lookup(), verifier, away=lane_pb2.AWAY_LOCAL), opened())


@pytest.mark.parametrize(
    "refusal",
    [Unsupported("another model"), ContextExceeded("too long"), InvalidRequest("no"), Exhausted("32 wait")],
    ids=lambda one: one.code,
)
async def test_refusals_are_the_clients(world, hybrid, refusal: GanglionError):
    verifier = EngineVerifier(world.target, refuse=refusal)
    one = hybrid(world.early, verifier, local=world.local, away=lane_pb2.AWAY_LOCAL)
    with pytest.raises(type(refusal)) as raised:
        await answer(one, opened())
    assert raised.value is refusal
    assert len(verifier.opened) == 1


def _outcome(change: Callable[[lane_pb2.Outcome], None]) -> Callable[[lane_pb2.SessionEvent], None]:
    def spoil(event: lane_pb2.SessionEvent) -> None:
        if event.tokens.outcome.round == 3:
            change(event.tokens.outcome)

    return spoil


SPOILS: dict[str, tuple[Callable[[lane_pb2.SessionEvent], None], str]] = {
    "prefix": (_outcome(lambda one: setattr(one, "prefix", b"12345678")), "another text"),
    "accepted": (_outcome(lambda one: setattr(one, "accepted", 99)), "99 accepted"),
    "drafted": (_outcome(lambda one: setattr(one, "drafted", 99)), "a window of 99 tokens"),
    "credits": (_outcome(lambda one: setattr(one, "credits", 999)), "999 credits"),
    "queued": (_outcome(lambda one: setattr(one, "queued", 999)), "999 drafted tokens left"),
    "round": (_outcome(lambda one: setattr(one, "round", 9)), "outcome 9 where 3 is due"),
    "bare": (lambda event: event.tokens.ClearField("outcome"), "outcome"),
    "vocabulary": (lambda event: [setattr(one, "id", 1 << 20) for one in event.tokens.tokens], "token id 1048576"),
}


@pytest.mark.parametrize("what", SPOILS)
async def test_a_verifier_that_breaks_the_protocol_is_named_and_not_trusted(world, hybrid, what):
    spoil, match = SPOILS[what]
    verifier = EngineVerifier(world.target, spoil=spoil)
    one = hybrid(world.early, verifier, local=world.local, mode="sync")
    with pytest.raises(ProtocolViolation, match=f"the verifier tower: .*{match}"):
        await answer(one, opened())
    assert len(verifier.opened) == 1
    one.policy = replace(one.policy, away=lane_pb2.AWAY_LOCAL)
    found = await answer(one, opened())
    assert 0 < len(found.local) == found.finished.local_tokens
    assert found.finished.completion_tokens == COUNT
    done = COUNT - len(found.local)
    assert found.tokens[:done] == world.alone(opened())[:done]


async def test_terms_of_another_prompt_are_a_violation(world, hybrid, monkeypatch):
    verifier = EngineVerifier(world.target)
    open_ = verifier.open

    async def other(request: lane_pb2.Open) -> Any:
        stream = await open_(request)
        stream.accepted.terms.prefix = b"12345678"
        return stream

    monkeypatch.setattr(verifier, "open", other)
    with pytest.raises(ProtocolViolation, match=r"the verifier tower: .*another prompt"):
        await answer(hybrid(world.early, verifier), opened())
    assert functools.reduce(lambda found, stream: found and not stream.messages, verifier.streams, True)
