"""Whom a device is sent to for pieces: whole models first, then parts, then the others of its plan."""

from __future__ import annotations

import pytest

from ganglion.coordinator.fleet_service import read_held
from ganglion.proto import fleet_pb2
from ganglion.wire.errors import InvalidDocument, ProtocolViolation
from ganglion.wire.nouns import digest


def sources(agent) -> list[str]:
    return [peer.name for peer in agent.got("assign")[0].holders]


async def test_whole_holders_come_first_then_parts_then_the_plan(world, tools):
    name = digest(tools.manifest())
    a, b, c, d = [await world.agent(each) for each in "abcd"]
    await d.say(held=fleet_pb2.HeldModels(partial_manifest_digests=[name]))
    await c.say(held=fleet_pb2.HeldModels(manifest_digests=[name], partial_manifest_digests=["0" * 64]))
    watcher = await world.watch()
    for agent in (c, d):  # what an agent says is taken in order: once its new address shows, so does what it holds
        await agent.advertise(tools.profile(), ["0.0.0.0:7788"])
        await tools.until(lambda agent=agent: watcher.device(agent.name).address.endswith(":7788"))
    await world.deploy(a)
    assert sources(b) == ["a", "c", "d"]
    assert sources(d) == ["a", "c", "b"]
    # Who has everything is sent to nobody but its like.
    assert sources(a) == ["c"]
    assert sources(c) == ["a"]


def test_what_is_held_is_read_with_care():
    name = "a" * 64
    held = fleet_pb2.HeldModels(manifest_digests=[name], partial_manifest_digests=["b" * 64])
    assert read_held(held) == ({name}, {"b" * 64})
    with pytest.raises(InvalidDocument, match="hexadecimal"):
        read_held(fleet_pb2.HeldModels(partial_manifest_digests=["../x"]))
    with pytest.raises(ProtocolViolation, match="models held"):
        read_held(fleet_pb2.HeldModels(manifest_digests=[name] * 200, partial_manifest_digests=[name] * 100))
