"""From what is alive to a plan: who is left out when, and what is said when nothing holds the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ganglion.coordinator.deployments.planning import PlanInput, less_reserved, make_plan, shortage_text
from ganglion.partitioner.cost import Device
from ganglion.wire.errors import DoesNotFit, Unavailable
from ganglion.wire.nouns import Candidate, PlanOptions, PlanReport


@pytest.fixture
def asked(tools) -> PlanInput:
    devices = tuple(Device(letter * 26, f"name-{letter}", "owner", tools.profile()) for letter in "abc")
    return PlanInput(
        manifest=tools.manifest(),
        options=PlanOptions(),
        devices=devices,
        links={},
        holders=("name-a",),
        holder="name-a",
    )


def node_ids(letters: str) -> frozenset[str]:
    return frozenset(letter * 26 for letter in letters)


@pytest.mark.parametrize(
    ("avoid", "banned", "expected"),
    [("", "", "abc"), ("b", "", "ac"), ("abc", "", "abc"), ("", "b", "ac"), ("a", "b", "c"), ("ac", "b", "ac")],
)
def test_devices_that_failed_are_avoided_if_possible_and_banned_ones_always(tools, asked, avoid, banned, expected):
    placed = make_plan(tools.plan_all, asked, node_ids(avoid), node_ids(banned))
    assert set(placed.plan.devices) == node_ids(expected)
    assert set(placed.reserved_bytes) == node_ids(expected)


def test_a_device_that_failed_is_taken_when_it_is_needed(tools, asked):
    small = tools.profile(tools.model_bytes // 2 - 1)
    asked = replace(asked, devices=tuple(replace(device, profile=small) for device in asked.devices))
    placed = make_plan(tools.plan_all, asked, node_ids("b"), frozenset())
    assert set(placed.plan.devices) == node_ids("abc")
    with pytest.raises(DoesNotFit, match="2 bytes are missing"):
        make_plan(tools.plan_all, asked, frozenset(), node_ids("b"))


def test_what_is_missing_is_said(tools, asked):
    with pytest.raises(Unavailable, match="name-a held them"):
        make_plan(tools.plan_all, replace(asked, holders=()), frozenset(), frozenset())
    with pytest.raises(Unavailable, match="no device is alive"):
        make_plan(tools.plan_all, replace(asked, devices=()), frozenset(), frozenset())


def test_reserved_memory_is_taken_off(tools, asked):
    rest = less_reserved(asked.devices, [{"a" * 26: 100}, {"a" * 26: 50, "b" * 26: 1 << 60}])
    budget = tools.profile().memory_budget_bytes
    assert [device.profile.memory_budget_bytes for device in rest] == [budget - 150, 0, budget]


def test_a_shortage_is_told_in_one_line_with_the_first_reasons():
    candidates = tuple(
        Candidate(mode="single", devices=(name,), feasible=False, chosen=False, reason=f"{name} lacks 1 MB")
        for name in "abcdef"
    )
    report = PlanReport(model="m", numeric_class="fp32-exact", candidates=candidates, plan=None)
    text = shortage_text(report, at_most=2)
    assert text == (
        "no set of devices can hold m (fp32-exact): a: a lacks 1 MB; b: b lacks 1 MB; "
        "and 4 more (ganglion plan --explain)"
    )
