"""A gateway beside an agent that drafts: which way a request goes, and what of the answer is marked."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from ganglion.gateway.answers import fingerprint
from ganglion.gateway.deployments import Deployments
from ganglion.proto import admin_pb2, lane_pb2
from ganglion.wire.errors import NotFound, Unavailable
from ganglion.wire.identity import verify_record

CLASS = "fp32-exact on test"


def table(fleet: Any, prefers: str | None = None) -> Deployments:
    beside = fleet.agent.identity.node_id if prefers is None else prefers
    return Deployments(lambda record: verify_record(record, fleet.world.owner.public_key), beside)


def fleetwide(*states: admin_pb2.DeploymentState) -> admin_pb2.Fleetwide:
    return admin_pb2.Fleetwide(deployments=states)


async def test_the_agent_beside_is_asked_for_what_it_drafts_for(fleet: Any) -> None:
    target = fleet.state("tiny", sessions=0)
    drafting = fleet.state("org/bare", drafts_for="tiny", sessions=3)
    routes = table(fleet)
    routes.update(fleetwide(target, drafting))
    found = routes.find("tiny")
    assert (found.deployment, found.hybrid, found.facts.digest) == ("d-org/bare", True, target.manifest_digest)
    assert routes.find("org/bare").hybrid is False
    # Another device's drafting is not ours to ask.
    elsewhere = table(fleet, prefers="")
    elsewhere.update(fleetwide(target, drafting))
    assert elsewhere.find("tiny").deployment == "d-tiny"
    # Its own name is another deployment's where there is one.
    ordinary = fleet.state("org/bare", deployment="plain", sessions=9)
    routes.update(fleetwide(target, drafting, ordinary))
    assert routes.find("org/bare").deployment == "plain"
    routes.update(fleetwide(target, drafting))
    # The model goes away: its name still works, by what is known of it.
    target.phase = admin_pb2.DEPLOYMENT_PHASE_REPLANNING
    target.ClearField("plan")
    target.ClearField("lead")
    assert routes.update(fleetwide(target, drafting)) == {("d-tiny", 1)}
    assert (routes.find("tiny").hybrid, routes.find("tiny").context) == (True, found.context)
    assert routes.update(fleetwide(drafting)) == frozenset()
    assert routes.find("tiny").facts.digest == target.manifest_digest
    # And the device: without it nothing is left.
    drafting.phase = admin_pb2.DEPLOYMENT_PHASE_PREPARING
    assert ("d-org/bare", 1) in routes.update(fleetwide(target, drafting))
    with pytest.raises(Unavailable, match="planned again"):
        routes.find("tiny")
    routes.update(fleetwide(drafting))
    with pytest.raises(NotFound):
        routes.find("tiny")


async def test_the_name_of_an_http_verifier_has_the_drafter_s_facts(fleet: Any) -> None:
    drafting = fleet.state("org/bare", drafts_for="elsewhere")
    routes = table(fleet)
    routes.update(fleetwide(drafting))
    assert routes.find("elsewhere").facts.digest == drafting.manifest_digest


def partly_local(request: lane_pb2.Open) -> Any:
    return _answer(request, ((b"ab", False), (b"cd", True)), local_tokens=2)


def all_local(request: lane_pb2.Open) -> Any:
    return _answer(request, ((b"abcd", True),), local_tokens=4)


async def _answer(
    request: lane_pb2.Open, parts: Any, *, local_tokens: int
) -> AsyncGenerator[lane_pb2.SessionEvent, None]:
    yield lane_pb2.SessionEvent(accepted=lane_pb2.Accepted(numeric_class=CLASS))
    for ids, local in parts:
        made = [lane_pb2.Token(id=token) for token in ids]
        yield lane_pb2.SessionEvent(tokens=lane_pb2.Tokens(tokens=made, local=local))
    done = lane_pb2.Finished(
        reason=lane_pb2.FINISH_REASON_LENGTH,
        prompt_tokens=len(request.prompt),
        completion_tokens=4,
        local_tokens=local_tokens,
        speculation=lane_pb2.Speculation(passes=2, drafted=3, accepted=1, accepted_counts=[1, 1], mode="sync"),
    )
    yield lane_pb2.SessionEvent(finished=done)


async def _ready(fleet: Any) -> None:
    fleet.coordinator.say(fleet.state("tiny"), fleet.state("org/bare", drafts_for="tiny"))
    await fleet.start(prefers=fleet.agent.identity.node_id)
    await fleet.readyz(200, lambda found: len(found["deployments"]) == 3)


async def test_what_a_device_drew_alone_is_marked(fleet: Any) -> None:
    await _ready(fleet)
    fleet.agent.script = partly_local
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 4, "away": "local", "return_timings": True}
    async with httpx.AsyncClient(timeout=15) as http:
        whole = (await http.post(f"{fleet.url}/completions", json=asked)).json()
        speculation = whole["ganglion"]["speculation"]
        assert whole["ganglion"]["local_tokens"] == 2
        assert (speculation["passes"], speculation["mode"], speculation["accepted_counts"]) == (2, "sync", [1, 1])
        assert whole["timings"]["speculation"] == speculation
        assert whole["system_fingerprint"] == fingerprint(CLASS)
        request = fleet.agent.requests[-1]
        assert (request.target, request.away) == ("tiny", lane_pb2.AWAY_LOCAL)
        # In a stream: the chunks that are, and the account in the last one.
        for path, extra in (
            ("completions", {}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            body = {key: value for key, value in asked.items() if key not in {"prompt", "return_timings"}}
            body |= {"stream": True} | (extra or {"prompt": "x"})
            answer = await http.post(f"{fleet.url}/{path}", json=body)
            lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
            chunks = [json.loads(line) for line in lines]
            marked = [chunk["ganglion"] for chunk in chunks if "ganglion" in chunk]
            assert marked[0] == {"local": True}
            assert marked[-1]["local_tokens"] == 2
        # Where the device drew everything the fingerprint is its own model's.
        fleet.agent.script = all_local
        whole = (await http.post(f"{fleet.url}/completions", json=asked)).json()
        assert whole["system_fingerprint"] == fingerprint("fp32-exact")
        # An ordinary way takes no policy.
        await http.post(f"{fleet.url}/completions", json=asked | {"model": "org/bare"})
        assert (fleet.agent.requests[-1].target, fleet.agent.requests[-1].away) == ("", lane_pb2.AWAY_UNSPECIFIED)
        refused = await http.post(f"{fleet.url}/completions", json=asked | {"away": "hide"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "away")


async def test_while_the_model_is_away_the_gateway_is_ready(fleet: Any) -> None:
    await _ready(fleet)
    away = fleet.state("tiny", phase=admin_pb2.DEPLOYMENT_PHASE_REPLANNING, lead=None, plan=None)
    fleet.coordinator.say(away, fleet.state("org/bare", drafts_for="tiny"))
    fleet.agent.script = all_local
    await fleet.readyz(200, lambda found: not all(row["ready"] for row in found["deployments"]))
    async with httpx.AsyncClient(timeout=15) as http:
        answer = await http.post(f"{fleet.url}/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 4})
    assert answer.json()["ganglion"]["local_tokens"] == 4
