"""Requests to edge experts, from the official client to a fleet's lead and to real servers of all moods."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from gateway.expert_server import Answers, ExpertServer, chunk, event, saying, writing

from ganglion.gateway.experts.outcomes import (
    Answer,
    Outcome,
    OutcomeLog,
    clear_outcomes,
    is_logging,
    read_outcomes,
    set_logging,
)
from ganglion.gateway.experts.servers import allow_server
from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.home import Home
from ganglion.wire.identity import Role, TrustLabel

ASK: list[Any] = [{"role": "user", "content": "what is it?"}]
CANARY = "canary-81f2"


def expert(name: str, url: str = "", **figures: Any) -> admin_pb2.ExpertState:
    spec = admin_pb2.ExpertSpec(name=name, url=url, label=identity_pb2.TRUST_LABEL_STRANGER)
    return admin_pb2.ExpertState(
        spec=spec,
        state=figures.pop("state", "ready"),
        queue=figures.pop("queue", 0),
        deployment="" if url else f"d-{name}",
        figures=admin_pb2.ExpertFigures(**figures),
    )


def selection(name: str, experts: list[str], **budget: Any) -> admin_pb2.Selection:
    return admin_pb2.Selection(budget=admin_pb2.Budget(name=name, **budget), experts=experts, value=0.5)


class Scene:
    """A gateway with edge experts: `tiny` of the fleet, and servers."""

    def __init__(self, fleet: Any, client: httpx.AsyncClient) -> None:
        self.fleet = fleet
        self.client = client
        self.servers: dict[str, ExpertServer] = {}
        self.stack = contextlib.ExitStack()

    def serve(self, name: str, answers: Answers, *, own: bool = False, **more: Any) -> ExpertServer:
        server = self.stack.enter_context(ExpertServer(answers, **more))
        self.servers[name] = server
        allow_server(self.fleet.home, name, url=server.url, key=f"sk-{name}", own=own)
        return server

    async def say(self, *selections: admin_pb2.Selection, **figures: Any) -> None:
        """The coordinator says so, and the gateway has heard it: it shows a class that was not there before."""
        experts = [expert(name, server.url, **figures.get(name, {})) for name, server in self.servers.items()]
        experts.append(expert("tiny", **figures.get("tiny", {})))
        mark = f"said-{next(_marks)}"
        self.fleet.coordinator.say(
            self.fleet.state("tiny"), experts=experts, selections=[*selections, selection(mark, ["tiny"])]
        )
        await self.until_listed(f"experts:{mark}")

    async def until_listed(self, name: str) -> None:
        await self.until(lambda: self.client.get(f"{self.fleet.url}/models"), lambda answer: name in answer.text)

    async def until(
        self, ask: Callable[[], Awaitable[httpx.Response]], wanted: Callable[[httpx.Response], bool]
    ) -> httpx.Response:
        async with asyncio.timeout(15):
            while not wanted(answer := await ask()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return answer

    async def post(self, **body: Any) -> httpx.Response:
        document = {"model": "experts", "messages": ASK} | body
        return await self.client.post(f"{self.fleet.url}/chat/completions", json=document)

    async def ask(self, **body: Any) -> tuple[str, dict[str, Any]]:
        answer = await self.post(**body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["choices"][0]["message"]["content"], found["ganglion"]["experts"]

    async def refused(self, status: int, **body: Any) -> dict[str, Any]:
        answer = await self.post(**body)
        assert answer.status_code == status, answer.text
        error: dict[str, Any] = answer.json()["error"]
        return error

    async def reported(self, **wanted: Any) -> admin_pb2.ExpertOutcome:
        """An outcome of those fields, once it has been reported."""
        found: list[admin_pb2.ExpertOutcome] = []

        def seen() -> bool:
            reports = self.fleet.coordinator.reports
            outcomes = [outcome for report in reports for outcome in report.outcomes]
            found[:] = [one for one in outcomes if all(getattr(one, name) == want for name, want in wanted.items())]
            return bool(found)

        await self.fleet.until(seen)
        return found[0]


_marks = itertools.count()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(make_fleet: Any, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Any]:
    """One gateway for all that do not change it."""
    async with make_fleet(tmp_path_factory.mktemp("experts")) as fleet:
        fleet.coordinator.say(fleet.state("tiny"))
        await fleet.start()
        await fleet.readyz(200)
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def scene(running: Any) -> AsyncIterator[Scene]:
    async with httpx.AsyncClient(timeout=15, verify=False) as client:
        made = Scene(running, client)
        with made.stack:
            await running.quiet()
            running.agent.script = running.scripts["saying"]("hello")
            running.coordinator.reports.clear()
            set_logging(running.home, False)
            clear_outcomes(running.home)
            yield made


# --- one of several


async def test_best_streams_and_falls_back_before_the_first_text(scene: Scene) -> None:
    scene.serve("anvil", writing(event({"choices": 7})))
    scene.serve("book", saying("from a book"))
    await scene.say(selection("default", ["anvil", "book"], tokens=64))
    text, account = await scene.ask()
    assert text == "from a book"
    assert account["asked"] == ["anvil", "book"]
    assert account["answered_by"] == "book"
    assert account["weights"] == {"anvil": 0.5, "book": 0.5}
    assert "not JSON" in account["dropped"]["anvil"]
    assert account["usage"]["book"] == {"prompt_tokens": 7, "completion_tokens": 11}
    failed = await scene.reported(expert="anvil", failed="nonsense")
    assert failed.why == "its answer could not be read"
    answered = await scene.reported(expert="book", failed="", tokens=11)
    assert answered.ttft_s > 0
    async with openai.AsyncOpenAI(base_url=scene.fleet.url, api_key="none", max_retries=0) as ai:
        stream = await ai.chat.completions.create(
            model="experts", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [one async for one in stream]
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "from a book"
    assert len(chunks) > 8, "as it is made"
    assert chunks[-2].model_extra is not None
    assert chunks[-2].model_extra["ganglion"]["experts"]["answered_by"] == "book"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 11
    _, headers, document = scene.servers["book"].seen[0]
    assert headers["authorization"] == "Bearer sk-book"
    assert document["max_tokens"] == 64
    assert document["messages"] == ASK


async def test_an_expert_of_the_fleet_answers_with_its_own_template(scene: Scene) -> None:
    scene.serve("stuck", writing(), status=503)
    await scene.say(selection("default", ["tiny"]), tiny={"tokens_per_s": 50.0})
    scene.fleet.agent.script = scene.fleet.scripts["saying"]("hello")
    text, account = await scene.ask(seed=3)
    assert (text, account["answered_by"]) == ("hello", "tiny")
    request = scene.fleet.agent.requests[-1]
    assert bytes(token for token in request.prompt if token < 256).decode() == "user: what is it?\nassistant: "
    assert request.sampling.seed == 3
    assert request.max_tokens == 128, "what the class counts on"
    assert (await scene.reported(expert="tiny", failed="")).tokens == 6
    body = {"model": "experts", "prompt": "abc", "echo": True, "max_tokens": 3}
    answer = (await scene.client.post(f"{scene.fleet.url}/completions", json=body)).json()
    assert answer["choices"][0]["text"] == "abchel"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["system_fingerprint"].startswith("fp_")


async def test_silence_and_death_are_answered_by_the_rest(scene: Scene) -> None:
    silent = scene.serve("asleep", writing())
    silent.answers = silent.stalling()
    scene.serve("broken", writing(chunk("half an ans")))
    scene.serve("well", saying("whole"))
    await scene.say(selection("default", ["asleep", "broken", "well"], latency_p95_s=0.1))
    text, account = await scene.ask()
    assert (text, account["answered_by"]) == ("whole", "well")
    assert account["dropped"]["asleep"] == "no first token within 1 s"
    assert "in the middle" in account["dropped"]["broken"]
    assert await asyncio.to_thread(silent.gone.wait, 10), "it was cancelled"
    assert (await scene.reported(expert="asleep")).failed == "unavailable"
    assert (await scene.reported(expert="broken")).failed == "device_lost"


async def test_death_in_the_middle_of_a_stream_ends_it_with_an_error(scene: Scene) -> None:
    scene.serve("broken", writing(chunk("half an ans")))
    scene.serve("well", saying("whole"))
    await scene.say(selection("default", ["broken", "well"]))
    answer = await scene.post(stream=True)
    assert answer.status_code == 200
    assert "half an ans" in answer.text
    assert "whole" not in answer.text
    assert '"error"' in answer.text.splitlines()[-2]


async def test_nobody_answers(scene: Scene) -> None:
    scene.serve("one", writing(b"data: x\n\n"))
    scene.serve("two", writing(CANARY.encode()), status=500)
    await scene.say(selection("default", ["one", "two"]))
    error = await scene.refused(503)
    assert "one: its answer is not JSON" in error["message"]
    assert "answered 500" in error["message"]
    failed = await scene.reported(expert="two")
    assert CANARY not in failed.why, "a server's words do not travel"
    await scene.say(selection("default", ["one"]))
    assert (await scene.refused(502))["code"] == "protocol_violation", "nothing but nonsense"


# --- several


async def test_votes_keep_what_most_of_the_weight_says_and_cancel_the_rest(scene: Scene) -> None:
    scene.serve("liar", saying("London", claims=10**6))
    scene.serve("right", saying("It is Paris."))
    scene.serve("same", saying("it is paris"))
    slow = scene.serve("slow", writing())
    slow.answers = slow.stalling("I th")
    await scene.say(
        selection("default", ["liar", "right", "same"]), selection("all", ["liar", "right", "same", "slow"])
    )
    scene.fleet.coordinator.selecting = lambda budget: selection(budget.name, ["liar", "right", "same"])
    text, account = await scene.ask(experts={"combine": "vote"})
    assert text == "It is Paris."
    assert account["answered_by"] == "right"
    assert sorted(account["asked"]) == ["liar", "right", "same"]
    assert account["usage"]["liar"]["completion_tokens"] <= 7
    asked = scene.fleet.coordinator.asked[-1]
    assert (asked.name, asked.combine) == ("default", admin_pb2.COMBINE_VOTE)
    scene.fleet.coordinator.selecting = lambda budget: selection(budget.name, ["right", "same", "liar", "slow"])
    scene.servers["liar"].answers = saying("“IT IS PARIS”")
    text, account = await scene.ask(model="experts:all", experts={"combine": "vote"}, stream=False)
    assert account["n"] == 4
    assert await asyncio.to_thread(slow.gone.wait, 10), "three of four equal weights decide it"


async def test_rerank_keeps_the_likeliest_by_its_own_expert(scene: Scene) -> None:
    scene.serve("sure", saying("certain", logprob=-0.1))
    scene.serve("unsure", saying("perhaps", logprob=-2.0))
    scene.serve("mute", saying("silent on this"))  # the gate's prior of 0.5 stands in: -0.69
    await scene.say(selection("default", ["mute", "sure", "unsure"], combine=admin_pb2.COMBINE_RERANK))
    text, account = await scene.ask()
    assert (text, account["combine"]) == ("certain", "rerank")
    assert all(server.seen[0][2]["logprobs"] is True for server in scene.servers.values())
    scene.servers["sure"].answers = saying("certain", logprob=-0.9)
    assert (await scene.ask())[0] == "silent on this"


async def test_n_answers_have_seeds_of_their_own_and_are_spread(scene: Scene) -> None:
    scene.serve("one", lambda document: saying(f"{document['seed'] % 2}")(document))
    scene.serve("two", lambda document: saying(f"{document['seed'] % 2}")(document))
    await scene.say(selection("default", ["one", "two"], combine=admin_pb2.COMBINE_VOTE))
    text, account = await scene.ask(seed=4, experts={"n": 5})
    seeds = [document["seed"] for server in scene.servers.values() for _, _, document in server.seen]
    assert text == "0"
    assert account["n"] == 5
    assert sorted(seeds) == [4, 5, 6, 7, 8]
    assert all(len(server.seen) >= 2 for server in scene.servers.values())
    _, account = await scene.ask(experts={"n": "auto"})
    assert 3 <= account["n"] <= 5, "the saturation point without data, or fewer where the vote is decided"
    _, account = await scene.ask(experts={"n": "auto"}, temperature=0)
    assert account["n"] == 2
    error = await scene.refused(400, experts={"n": 3}, temperature=0)
    assert error["param"] == "experts.n"


# --- where text goes


async def test_text_goes_only_where_this_gateway_says(scene: Scene) -> None:
    trap = scene.stack.enter_context(ExpertServer(saying("trapped")))
    honest = scene.serve("honest", saying("yes"))
    allowed = scene.stack.enter_context(ExpertServer(saying("allowed")))
    allow_server(scene.fleet.home, "moved", url=allowed.url, key="sk-secret")
    scene.servers |= {"moved": trap, "unknown": trap}
    await scene.say(selection("default", ["moved", "unknown", "honest"], combine=admin_pb2.COMBINE_VOTE))
    text, account = await scene.ask()
    assert text == "yes"
    assert "ganglion experts key unknown --url" in account["dropped"]["unknown"]
    assert allowed.url in account["dropped"]["moved"]
    await scene.say(selection("default", ["moved", "unknown"]))
    await scene.refused(403)
    assert trap.seen == allowed.seen == []
    assert honest.seen


async def test_private_requests_stay_with_the_owners_devices(scene: Scene) -> None:
    theirs = scene.serve("theirs", saying("theirs"))
    mine = scene.serve("mine", saying("mine"), own=True)
    scene.fleet.coordinator.selecting = lambda budget: selection(budget.name, ["theirs", "mine", "tiny"])
    await scene.say(selection("default", ["theirs", "mine", "tiny"]), selection("quiet", ["theirs"], private=True))
    set_logging(scene.fleet.home, True)
    text, account = await scene.ask(experts={"private": True, "combine": "vote"})
    assert text in {"mine", "hello"}
    assert "not the owner's own" in account["dropped"]["theirs"]
    assert set(account["asked"]) == {"mine", "tiny"}
    assert theirs.seen == []
    assert mine.seen
    error = await scene.refused(403, model="experts:quiet")
    assert "private" in error["message"]
    assert "private" in (await scene.refused(403, model="experts:quiet", experts={"private": False}))["message"]
    assert theirs.seen == []
    assert list(read_outcomes(scene.fleet.home)) == []


async def test_a_plan_over_other_peoples_devices_is_not_private(fleet: Any) -> None:
    stranger = fleet.world.node(Role.AGENT, label=TrustLabel.FRIEND)
    state = fleet.state("tiny")
    plan = json.loads(state.plan)
    share = dict(plan["stages"][0]["shares"][0], device=stranger.node_id)
    plan["stages"][0]["shares"].append(share)
    state.plan = json.dumps(plan).encode()
    devices = [admin_pb2.DeviceState(node_id=stranger.node_id, record=stranger.record)]
    selections = [selection("default", ["tiny"], private=True)]
    fleet.coordinator.say(state, experts=[expert("tiny")], selections=selections, devices=devices)
    await fleet.start()
    await fleet.readyz(200)
    async with httpx.AsyncClient(timeout=15, verify=False) as client:
        error = await Scene(fleet, client).refused(403)
    assert "not labelled owner" in error["message"]
    assert fleet.agent.requests == []


# --- what is refused


async def test_what_experts_cannot_be_asked(scene: Scene) -> None:
    scene.serve("one", saying("x"))
    await scene.say(selection("default", ["one"]))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for body, param in (
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"logit_bias": {"1": 1}}, "logit_bias"),
        ({"tools": [tool]}, "tools"),
        ({"experts": {"n": 3}}, "experts.n"),
        ({"experts": {"n": 99}}, "experts.n"),
        ({"experts": {"latency_s": 0}}, "experts.latency_s"),
        ({"experts": {"luck": 1}}, "experts.luck"),
        ({"experts": {"private": "yes"}}, "experts.private"),
        ({"model": "tiny", "experts": {"n": 1}}, "experts"),
        ({"model": "experts:No"}, "model"),
        ({"response_format": {"type": "json_object"}}, "experts"),
    ):
        error = await scene.refused(400, **body)
        assert (error["param"] or "").startswith(param), (body, error)
    assert "no class of requests" in (await scene.refused(404, model="experts:none"))["message"]
    error = await scene.refused(400, experts={"class": "a"}, model="experts:b")
    assert error["param"] == "experts.class"
    ids = {"model": "experts", "prompt": [1, 2]}
    answer = await scene.client.post(f"{scene.fleet.url}/completions", json=ids)
    assert answer.json()["error"]["param"] == "prompt"
    assert scene.servers["one"].seen == []


async def test_a_budget_that_nothing_meets_says_what_would(scene: Scene) -> None:
    scene.serve("one", saying("x"))
    why = "latency_s 0.01 is the tightest: the fastest expert, one, needs 0.4 s"
    scene.fleet.coordinator.selecting = lambda budget: admin_pb2.Selection(budget=budget, refused=why)
    await scene.say(
        selection("default", ["one"]), admin_pb2.Selection(budget=admin_pb2.Budget(name="hard"), refused=why)
    )
    for body in ({"experts": {"latency_s": 0.01}, "max_tokens": 77}, {"model": "experts:hard"}):
        error = await scene.refused(400, **body)
        assert error["param"] == "experts"
        assert error["message"] == why
    asked = scene.fleet.coordinator.asked[-1]
    assert (asked.name, asked.latency_p95_s, asked.tokens) == ("default", 0.01, 77)


async def test_without_the_coordinator_its_last_choice_holds(fleet: Any) -> None:
    fleet.coordinator.say(fleet.state("tiny"), experts=[expert("tiny")], selections=[selection("default", ["tiny"])])
    await fleet.start()
    await fleet.readyz(200)
    async with httpx.AsyncClient(timeout=15, verify=False) as client:
        scene = Scene(fleet, client)
        await fleet.coordinator.stop()
        answer = await scene.until(lambda: scene.post(experts={"latency_s": 1}), lambda answer: "away" in answer.text)
        assert answer.status_code == 503
        assert (await scene.ask())[0] == "hello"


async def test_too_long_for_everyone_is_the_requests_own_fault(scene: Scene) -> None:
    await scene.say(selection("default", ["tiny"]))
    error = await scene.refused(400, messages=[{"role": "user", "content": "x" * 400}])
    assert error["code"] == "context_length_exceeded"
    assert scene.fleet.coordinator.reports == [] or not any(
        outcome.failed for report in scene.fleet.coordinator.reports for outcome in report.outcomes
    )


async def test_a_client_that_leaves_ends_every_answer(scene: Scene) -> None:
    scene.fleet.agent.script = scene.fleet.scripts["stalling"](b"x")
    slow = scene.serve("slow", writing())
    slow.answers = slow.stalling("I th")
    await scene.say(selection("default", ["tiny", "slow"], combine=admin_pb2.COMBINE_VOTE))
    asking = asyncio.create_task(scene.post())
    await scene.fleet.until(lambda: scene.fleet.agent.open and slow.seen)
    asking.cancel()
    await scene.fleet.next_end()
    assert await asyncio.to_thread(slow.gone.wait, 10)


async def test_round_trips_are_reported(scene: Scene) -> None:
    scene.serve("linked", saying("x"))
    await scene.say(selection("default", ["linked"]))
    await scene.ask()
    reports = scene.fleet.coordinator.reports
    await scene.fleet.until(lambda: any(link.expert == "linked" for report in reports for link in report.links))
    links = {link.expert: link.rtt_s for report in reports for link in report.links}
    assert set(links) <= {"linked", "tiny"}
    assert all(0 < rtt_s < 5 for rtt_s in links.values())
    assert not any(report.HasField("profile") for report in reports), "an untrained gate thinks nothing of them"
    assert b"what is it" not in b"".join(report.SerializeToString() for report in reports)


# --- the log of outcomes


async def test_outcomes_are_kept_with_consent_only(scene: Scene) -> None:
    scene.serve("one", saying("Paris", logprob=-0.25))
    scene.serve("two", saying("paris"))
    await scene.say(selection("default", ["one", "two"], combine=admin_pb2.COMBINE_VOTE))
    home = scene.fleet.home
    await scene.ask()
    assert list(read_outcomes(home)) == []
    set_logging(home, True)
    await scene.ask()
    (outcome,) = read_outcomes(home)
    assert (outcome.request_class, outcome.combine, outcome.prompt) == ("default", "vote", "what is it?")
    assert {answer.expert: answer.text for answer in outcome.answers} == {"one": "Paris", "two": "paris"}
    assert outcome.answers[outcome.chosen].expert == "one"
    path = home.path / "experts" / "outcomes.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    set_logging(home, False)
    await scene.ask()
    assert len(list(read_outcomes(home))) == 1
    assert clear_outcomes(home) > 0
    assert list(read_outcomes(home)) == []


def test_the_log_is_bounded_and_survives_a_torn_line(tmp_path: Path) -> None:
    home = Home(tmp_path / "gateway")
    log = OutcomeLog(home, part_bytes=2000)

    def outcome(at: int, text: str = "t") -> Outcome:
        return Outcome(float(at), "default", "best", f"p{at}", (Answer("one", text, -0.5),), 0)

    assert not log.write(outcome(0)), "off as installed"
    set_logging(home, True)
    assert is_logging(home)
    for at in range(100):
        log.write(outcome(at))
    folder = home.path / "experts"
    assert sum(path.stat().st_size for path in folder.glob("outcomes*")) < 2 * 2200
    kept = [one.prompt for one in read_outcomes(home)]
    assert kept == [f"p{at}" for at in range(100 - len(kept), 100)]
    assert not log.write(outcome(100, "x" * (1 << 20))), "longer than a line may be"
    with (folder / "outcomes.jsonl").open("ab") as file:
        file.write(b'{"time": 1.0, "cla')
    assert len(list(read_outcomes(home))) == len(kept)
