"""Reports of routes: checked against the model, added up, remembered, and given to the planner."""

from __future__ import annotations

import msgspec
import pytest

from ganglion.coordinator.routes import REMEMBERED_TOKENS, added, check_routes, counted
from ganglion.proto import fleet_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.nouns import Layer, Manifest, digest


def mixture(tools) -> Manifest:
    """The second layer has four experts."""
    base = tools.manifest()
    heads, columns = base.layers[0].segments
    experts = msgspec.structs.replace(columns, axis="experts", experts=2, active=0.5)
    return msgspec.structs.replace(base, layers=(base.layers[0], Layer(segments=(heads, experts))))


def report(manifest: Manifest, tokens: int, sets: dict[tuple[int, ...], int], others: int = 0) -> fleet_pb2.RouteReport:
    layers = [
        fleet_pb2.LayerRoutes(),
        fleet_pb2.LayerRoutes(
            sets=[fleet_pb2.RouteSet(experts=one, tokens=count) for one, count in sets.items()], others=others
        ),
    ]
    return fleet_pb2.RouteReport(manifest_digest=digest(manifest), tokens=tokens, layers=layers)


def test_reports_add_up_and_old_ones_fade(tools):
    manifest = mixture(tools)
    first = added(b"", report(manifest, 600, {(0, 1): 400, (2, 3): 150}, 50))
    second = added(first, report(manifest, 600, {(0, 1): 100, (1, 2): 500}))
    known = counted(second, manifest)
    assert known is not None
    assert known.tokens == 1200
    assert dict(zip(known.layers[1].sets, known.layers[1].tokens, strict=True)) == {
        (0, 1): 500,
        (1, 2): 500,
        (2, 3): 150,
    }
    assert known.layers[1].others == 50
    assert known.layers[0].experts == 0
    later = counted(added(second, report(manifest, REMEMBERED_TOKENS, {(2, 3): REMEMBERED_TOKENS})), manifest)
    assert later is not None
    assert dict(zip(later.layers[1].sets, later.layers[1].tokens, strict=True))[0, 1] == 250
    assert counted(b"", manifest) is None


@pytest.mark.parametrize(
    ("tokens", "sets", "message"),
    [
        (511, {(0, 1): 1}, "at least 512"),
        (600, {(0, 1): 601}, "more tokens than the 600"),
        (600, {(1, 0): 1}, "none of its 4 experts"),
        (600, {(1, 1): 1}, "none of its 4 experts"),
        (600, {(0, 4): 1}, "none of its 4 experts"),
        (600, {(): 1}, "none of its 4 experts"),
        (1000, {(0, 1): 0}, "none of its 4 experts"),
    ],
)
def test_reports_that_cannot_be_are_refused(tools, tokens, sets, message):
    manifest = mixture(tools)
    with pytest.raises(ProtocolViolation, match=message):
        check_routes(report(manifest, tokens, sets), manifest)
    more = msgspec.structs.replace(manifest, layers=(*manifest.layers, manifest.layers[0]))
    with pytest.raises(ProtocolViolation, match="routes of 2 layers, tiny has 3"):
        check_routes(report(manifest, 600, {(0, 1): 1}), more)


async def test_what_a_lead_reports_reaches_the_planner_and_what_others_say_does_not(world, tools):
    seen = []

    def planner(manifest, devices, links, options, drafter, routes, soon):
        seen.append(routes)
        return tools.plan_all(manifest, devices, links, options)

    await world.stop()
    await world.start(planner=planner)
    a, b = await world.agent("a"), await world.agent("b")
    manifest = mixture(tools)
    watcher = await world.watch()
    await world.deploy(a, manifest)
    await watcher.until("READY")
    assert seen == [None]
    told = report(manifest, 600, {(0, 1): 600})
    await b.say(routes=told)  # not its lead: left aside
    await a.say(routes=told)
    await b.stop()
    await tools.until(lambda: len(seen) > 1)
    assert seen[-1].tokens == 600
    assert seen[-1].layers[1].sets == ((0, 1),)
