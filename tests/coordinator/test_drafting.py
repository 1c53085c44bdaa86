"""Devices that draft for a model: who tells whom of what, offers and their answers, and losses on either side."""

from __future__ import annotations

import msgspec
import pytest

from ganglion.coordinator.deployments.offers import Offers, read_offer
from ganglion.partitioner.placement import place
from ganglion.proto import admin_pb2, fleet_pb2
from ganglion.wire.errors import InvalidDocument
from ganglion.wire.identity import Role, TrustLabel, verify_record
from ganglion.wire.nouns import Drafting, Plan, PlanOptions, digest, from_json, to_json

READY = admin_pb2.DEPLOYMENT_PHASE_READY
FAILED = admin_pb2.DEPLOYMENT_PHASE_FAILED
BIG = 1 << 30


@pytest.fixture
async def fleet(world, tools):
    """A coordinator with the real planner, and a cloud that answers with `big`."""
    await world.stop()
    await world.start(planner=place)
    cloud = await world.agent("cloud", profile=tools.profile(BIG))
    await world.deploy(cloud, tools.manifest("big"), PlanOptions(devices=("cloud",)))
    return cloud


def offer(manifest, **drafting) -> fleet_pb2.DraftOffer:
    return fleet_pb2.DraftOffer(manifest=to_json(manifest), drafting=to_json(Drafting(**drafting)))


def verifiers(agent) -> list[fleet_pb2.Verifier]:
    return agent.got("verifier")


def admitted(agent, world) -> list[set[str]]:
    """Agents that may open sessions on the lead, as each order for it said."""
    return [
        {
            record.node_id
            for record in (verify_record(peer.record, world.owner.public_key) for peer in order.gateways)
            if record.role is Role.AGENT
        }
        for order in agent.got("connect")
    ]


async def test_a_drafting_deployment_is_told_who_verifies(world, tools, fleet):
    device = await world.agent("device", profile=tools.profile(BIG))
    options = PlanOptions(devices=("device",), drafting=Drafting(target="big", mode="sync", away="local"))
    events = await world.deploy(device, tools.manifest("small"), options)
    assert events[-1].phase == READY
    plan = from_json(Plan, device.got("assign")[-1].plan, limit_bytes=1 << 20)
    assert plan.drafting == options.drafting
    assert plan.devices == (device.node_id,)
    assert plan.drafter is not None
    assert (plan.drafter.kind, plan.drafter.manifest_digest) == ("model", plan.manifest_digest)
    await tools.until(lambda: verifiers(device))
    told = verifiers(device)[-1]
    big = tools.manifest("big")
    assert (told.target, told.manifest_digest, told.vocab) == ("big", digest(big), big.geometry.vocab)
    assert (told.lead.address, told.lead_epoch, list(told.eos_ids)) == ("127.0.0.1:7778", 1, [0])
    assert verify_record(told.lead.record, world.owner.public_key).node_id == fleet.node_id
    assert told.context > 0
    await tools.until(lambda: {device.node_id} in admitted(fleet, world))
    watcher = await world.watch()
    state = await watcher.until("READY", "small")
    assert state.drafts_for == "big"


async def test_neither_ends_with_the_other(world, tools, fleet):
    device = await world.agent("device", profile=tools.profile(BIG))
    options = PlanOptions(devices=("device",), drafting=Drafting(target="big"))
    await world.deploy(device, tools.manifest("small"), options)
    await tools.until(lambda: verifiers(device) and verifiers(device)[-1].HasField("lead"))
    # The verifier goes: the device is told why, and its deployment stays.
    await fleet.stop()
    await tools.until(lambda: not verifiers(device)[-1].HasField("lead"))
    await tools.until(lambda: "big is" in verifiers(device)[-1].why_away)
    assert verifiers(device)[-1].manifest_digest == digest(tools.manifest("big"))
    assert not device.got("release")
    # It comes back in another epoch.
    cloud = await world.again(fleet, profile=tools.profile(BIG))
    await tools.until(lambda: verifiers(device)[-1].HasField("lead"))
    assert verifiers(device)[-1].lead_epoch == 2
    await tools.until(lambda: {device.node_id} in admitted(cloud, world))
    # The device goes: the verifier is told that nobody drafts, and answers on.
    await device.stop()
    await tools.until(lambda: admitted(cloud, world)[-1] == set())
    assert not cloud.got("release")
    # Stopping the model leaves the device with its reason.
    device = await world.again(device, profile=tools.profile(BIG))
    await tools.until(lambda: verifiers(device) and verifiers(device)[-1].HasField("lead"))
    admin = await world.admin()
    await world.call(admin.Stop(admin_pb2.StopRequest(deployment="big")))
    await tools.until(lambda: verifiers(device)[-1].why_away == "big is not deployed")


async def test_a_url_verifies_in_place_of_a_deployment(world, tools, fleet):
    device = await world.agent("device", profile=tools.profile(BIG))
    drafting = Drafting(target="elsewhere", url="http://192.0.2.1:8000/v1")
    await world.deploy(device, tools.manifest("small"), PlanOptions(devices=("device",), drafting=drafting))
    await tools.until(lambda: verifiers(device))
    assert verifiers(device)[-1].url == drafting.url
    assert not verifiers(device)[-1].HasField("lead")
    assert all(not each for each in admitted(fleet, world))


async def test_an_offer_is_taken_for_every_model_that_it_fits(world, tools, fleet):
    device = await world.agent("device", profile=tools.profile(BIG))
    await device.say(draft_offer=offer(tools.manifest("small"), away="local"))
    await tools.until(lambda: verifiers(device))
    assert verifiers(device)[-1].target == "big"
    assert [(each.target, each.refused) for each in device.got("draft_answer")] == [("big", "")]
    # Another model comes: it is drafted for too, on its own devices, and the device is not planned on.
    await world.deploy(fleet, tools.manifest("large"))
    await tools.until(lambda: {each.target for each in verifiers(device)} == {"big", "large"})
    watcher = await world.watch()
    models = sorted((each.model, each.drafts_for) for each in watcher.states[-1].deployments)
    assert models == [("big", ""), ("large", ""), ("small", "big"), ("small", "large")]
    # Said again it changes nothing; taken back, what came of it ends.
    await device.say(draft_offer=offer(tools.manifest("small"), away="local"))
    await device.say(draft_offer=fleet_pb2.DraftOffer())
    await tools.until(lambda: len({each.deployment for each in device.got("release")}) == 2)
    await tools.until(lambda: len(watcher.states[-1].deployments) == 2)


async def test_an_offer_is_refused_with_its_reason(world, tools, fleet):
    identity = await world.enrol("phone", label=TrustLabel.FRIEND)
    device = await world.enter(identity, profile=tools.profile(BIG))
    await device.say(draft_offer=offer(tools.manifest("small")))
    await tools.until(lambda: device.got("draft_answer"))
    assert "labelled friend" in device.got("draft_answer")[0].refused
    watcher = await world.watch()
    (refused,) = watcher.states[-1].refused_offers
    assert (refused.node_id, refused.model) == (device.node_id, "small")
    other = await world.agent("other", profile=tools.profile(BIG))
    small = tools.manifest("small")
    wide = msgspec.structs.replace(small, geometry=msgspec.structs.replace(small.geometry, vocab=32))
    await other.say(draft_offer=offer(wide))
    await tools.until(lambda: other.got("draft_answer"))
    assert "vocabulary of 32 tokens" in other.got("draft_answer")[0].refused
    await other.stop()
    await tools.until(lambda: len(watcher.states[-1].refused_offers) == 1)


async def test_a_device_that_offers_to_draft_is_planned_on_when_it_is_named_only(world, tools, fleet):
    device = await world.agent("device", profile=tools.profile(BIG))
    await device.say(draft_offer=offer(tools.manifest("small")))
    await tools.until(lambda: verifiers(device))
    await world.deploy(fleet, tools.manifest("big"))
    await fleet.stop()
    watcher = await world.watch()
    await watcher.until("FAILED", "big")
    await tools.until(lambda: verifiers(device)[-1].why_away.startswith("big is failed"))
    cloud = await world.again(fleet, profile=tools.profile(BIG))
    await watcher.until("READY", "big")
    named = await world.deploy(cloud, tools.manifest("large"), PlanOptions(devices=("device",)))
    assert named[-1].phase == READY
    assert named[-1].devices[0].name == "device"


async def test_a_model_s_own_drafter_goes_with_it(world, tools, fleet):
    admin = await world.admin()
    request = tools.request(fleet.node_id, tools.manifest("other"), PlanOptions(drafter="model"))
    request.drafter = to_json(tools.manifest("small"))
    events = await tools.collect(admin.Deploy(request))
    assert events[-1].phase == READY
    assign = fleet.got("assign")[-1]
    assert assign.drafter == request.drafter
    plan = from_json(Plan, assign.plan, limit_bytes=1 << 20)
    assert plan.drafter is not None
    assert plan.drafter.manifest_digest == digest(tools.manifest("small"))
    watcher = await world.watch()
    state = await watcher.until("READY", "other")
    assert (state.drafter, state.drafter_digest) == ("small", plan.drafter.manifest_digest)
    # It is wanted after a restart of the coordinator too.
    await world.stop()
    await world.start(planner=place)
    cloud = await world.again(fleet, profile=tools.profile(BIG))
    await tools.until(lambda: any(each.drafter == request.drafter for each in cloud.got("assign")))
    explained = await world.call((await world.admin()).Explain(request))
    assert b"drafts by small" in explained.report


def test_offers_that_do_not_parse_are_refused() -> None:
    with pytest.raises(InvalidDocument):
        read_offer(fleet_pb2.DraftOffer(manifest=b"{"))
    assert read_offer(fleet_pb2.DraftOffer()) is None


def test_an_answer_is_told_once_until_it_is_another(tools) -> None:
    labels = {"a": "stranger"}
    offers = Offers(labels.__getitem__, str.upper)
    offers.put("a", read_offer(offer(tools.manifest("small"))))
    assert offers.match(["a", "unknown"], {"big": tools.manifest("big")}) == []
    assert ["A is labelled stranger" in each.refused for _, each in offers.news()] == [True]
    assert offers.news() == []
    labels["a"] = "owner"
    (wanted,) = offers.match(["a"], {"big": tools.manifest("big"), "small": tools.manifest("small")})
    assert wanted.options.drafting == Drafting(target="big", offered=True)
    offers.answer("a", "big", "")
    assert [each.refused for _, each in offers.news()] == [""]
    assert offers.refused() == []
    # Under one name the one could be taken for the other.
    offers.put("a", read_offer(offer(tools.manifest("big"))))
    assert offers.match(["a"], {"big": tools.manifest("big")}) == []
    assert "called big too" in offers.news()[0][1].refused
    only = read_offer(offer(tools.manifest("small"), target="large"))
    offers.put("a", only)
    assert offers.match(["a"], {"big": tools.manifest("big")}) == []
    with pytest.raises(InvalidDocument, match="name"):
        read_offer(offer(tools.manifest("small"), url="http://x"))
