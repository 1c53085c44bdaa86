"""Experts over the wire: what owners set, what gateways measure, what watchers see."""

from __future__ import annotations

import math

import pytest

from ganglion.coordinator.selection import driver
from ganglion.proto import admin_pb2
from ganglion.wire.errors import InvalidRequest, NotFound
from ganglion.wire.identity import Role

URL = "http://192.0.2.7:11434/v1"


def server(name: str = "big", **claimed: float) -> admin_pb2.ExpertSpec:
    return admin_pb2.ExpertSpec(name=name, url=URL, claimed=admin_pb2.ExpertFigures(**claimed))


def answers(name: str, count: int, *, ttft_s: float = 0.2, tpot_s: float = 0.05) -> list[admin_pb2.ExpertOutcome]:
    return [admin_pb2.ExpertOutcome(expert=name, ttft_s=ttft_s, tpot_s=tpot_s, tokens=50)] * count


async def put(world, spec: admin_pb2.ExpertSpec) -> admin_pb2.ExpertState:
    owner = await world.admin()
    return await world.call(owner.PutExpert(admin_pb2.PutExpertRequest(spec=spec)))


async def put_budget(world, **fields) -> admin_pb2.Selection:
    owner = await world.admin()
    return await world.call(owner.PutBudget(admin_pb2.PutBudgetRequest(budget=admin_pb2.Budget(**fields))))


async def report(world, **fields) -> None:
    gateway = await world.admin(Role.GATEWAY)
    await world.call(gateway.Report(admin_pb2.OutcomeReport(**fields)))


def chosen(watcher, name: str = "default") -> list[str]:
    found = [each for each in watcher.states[-1].selections if each.budget.name == name]
    return list(found[0].experts) if found else []


def expert(watcher, name: str = "big") -> admin_pb2.ExpertState:
    return next(each for each in watcher.states[-1].experts if each.spec.name == name)


async def test_a_deployed_model_becomes_an_expert_when_it_is_ready_and_leaves_with_it(world, tools):
    watcher = await world.watch()
    added = await put(world, admin_pb2.ExpertSpec(name="tiny"))
    assert (added.state, added.why) == ("away", "it is not deployed: ganglion run tiny")
    assert chosen(watcher) == []
    agent = await world.agent("a")
    await world.deploy(agent)
    await tools.until(lambda: chosen(watcher) == ["tiny"])
    state = expert(watcher, "tiny")
    assert (state.state, state.node_id) == ("ready", agent.node_id)
    assert state.deployment == watcher.deployment().deployment
    assert len(state.tokenizer_digest) == 64
    before = watcher.states[-1].selections[0].generation
    await agent.stop()
    await tools.until(lambda: watcher.states[-1].selections[0].refused)
    assert "tiny" in watcher.states[-1].selections[0].refused
    assert watcher.states[-1].selections[0].generation > before


async def test_only_models_that_were_added_are_experts(world, tools):
    agent = await world.agent("a")
    await world.deploy(agent)
    watcher = await world.watch()
    await tools.until(lambda: watcher.states[-1].selections)
    assert not watcher.states[-1].experts
    assert "ganglion experts add" in watcher.states[-1].selections[0].refused


async def test_an_expert_that_lies_about_its_speed_is_corrected_and_leaves(world, tools, monkeypatch):
    monkeypatch.setattr(driver, "SETTLE_S", 0.0)
    await put(world, server(tokens_per_s=1000.0, ttft_s=0.1))
    assert (await put_budget(world, name="quick", latency_p95_s=2.0)).experts == ["big"]
    watcher = await world.watch()
    await report(world, outcomes=answers("big", 4, tpot_s=0.5))
    await tools.until(lambda: chosen(watcher, "quick") == [])
    assert chosen(watcher) == ["big"]
    assert expert(watcher).figures.tokens_per_s == pytest.approx(2.0)
    assert expert(watcher).figures.samples == 4
    refused = next(each.refused for each in watcher.states[-1].selections if each.budget.name == "quick")
    assert refused.startswith("latency_s 2: the fastest expert is big")


async def test_noise_does_not_move_a_subset(world, tools, monkeypatch):
    monkeypatch.setattr(driver, "SETTLE_S", 0.0)
    await put(world, server(tokens_per_s=20.0, ttft_s=0.2))
    watcher = await world.watch()
    generation = watcher.states[-1].selections[0].generation
    for number in range(8):
        await report(world, outcomes=answers("big", 1, tpot_s=0.05 + 0.004 * (number % 2)))
    await tools.until(lambda: expert(watcher).figures.samples == 8)
    assert watcher.states[-1].selections[0].generation == generation


async def test_who_fails_is_dropped_with_a_reason_and_comes_back_when_added_again(world, tools):
    await put(world, server("a"))
    await put(world, server("b"))
    assert (await put_budget(world, name="all", combine=admin_pb2.COMBINE_VOTE)).experts == ["a", "b"]
    watcher = await world.watch()
    wrong = admin_pb2.ExpertOutcome(expert="a", failed="nonsense", why="its answer\nis not JSON")
    await report(world, outcomes=[wrong, wrong])
    await tools.until(lambda: chosen(watcher, "all") == ["b"])
    assert expert(watcher, "a").state == "dropped"
    assert "its answer is not JSON" in expert(watcher, "a").why
    left = next(each for each in watcher.states[-1].selections if each.budget.name == "all").left_out
    assert [each.expert for each in left] == ["a"]
    await put(world, server("a"))
    await tools.until(lambda: chosen(watcher, "all") == ["a", "b"])


async def test_a_gates_view_decides_and_survives_a_restart(world, tools):
    await put(world, server("a"))
    await put(world, server("b"))
    await put_budget(world, name="one", most=1, latency_p95_s=30.0)
    profile = admin_pb2.QualityProfile(experts=["a", "b"], rows=[admin_pb2.QualityRow(share=1.0, quality=[0.2, 0.9])])
    await report(world, outcomes=answers("b", 3), links=[admin_pb2.LinkFigure(expert="b", rtt_s=0.03)], profile=profile)
    watcher = await world.watch()
    await tools.until(lambda: chosen(watcher, "one") == ["b"])
    assert expert(watcher, "b").figures.link_s == pytest.approx(0.03)
    await world.stop()
    await world.start()
    again = await world.watch()
    await tools.until(lambda: chosen(again, "one") == ["b"])
    assert expert(again, "b").figures.samples == 3
    assert expert(again, "b").figures.tokens_per_s == pytest.approx(20.0)


async def test_a_budget_of_ones_own_is_answered_and_not_kept(world):
    await put(world, server(tokens_per_s=100.0))
    gateway = await world.admin(Role.GATEWAY)
    budget = admin_pb2.Budget(latency_p95_s=0.5, tokens=10)
    for _ in range(2):
        refused = await world.call(gateway.Select(admin_pb2.SelectRequest(budget=budget)))
        assert refused.experts == []
        assert refused.refused.startswith("latency_s 0.5: the fastest expert is big")
    found = await world.call(gateway.Select(admin_pb2.SelectRequest(budget=admin_pb2.Budget(latency_p95_s=5.0))))
    assert found.experts == ["big"]
    assert found.budget.tokens == 128
    watcher = await world.watch()
    assert [each.budget.name for each in watcher.states[-1].selections] == ["default"]


async def test_the_default_class_is_always_there(world):
    assert (await put_budget(world, name="default", private=True)).budget.private
    owner = await world.admin()
    await world.call(owner.RemoveBudget(admin_pb2.RemoveBudgetRequest(name="default")))
    watcher = await world.watch()
    (default,) = watcher.states[-1].selections
    assert not default.budget.private
    with pytest.raises(NotFound, match="default"):
        await world.call(owner.RemoveBudget(admin_pb2.RemoveBudgetRequest(name="nobody")))
    with pytest.raises(NotFound):
        await world.call(owner.RemoveExpert(admin_pb2.RemoveExpertRequest(name="nobody")))


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        (admin_pb2.ExpertSpec(name="Big"), "name"),
        (admin_pb2.ExpertSpec(name="a" * 64), "name"),
        (admin_pb2.ExpertSpec(name="a\n"), "name"),
        (admin_pb2.ExpertSpec(name="a", model="x" * 129), "model"),
        (admin_pb2.ExpertSpec(name="a", domains=["c, d"]), "domains"),
        (admin_pb2.ExpertSpec(name="a", domains=[f"d{each}" for each in range(17)]), "domains"),
        (admin_pb2.ExpertSpec(name="a", claimed=admin_pb2.ExpertFigures(tokens_per_s=-1.0)), "claimed.tokens_per_s"),
        (admin_pb2.ExpertSpec(name="a", claimed=admin_pb2.ExpertFigures(ttft_s=math.nan)), "claimed.ttft_s"),
        *(
            (admin_pb2.ExpertSpec(name="a", url=url), "url")
            for url in (
                "ftp://x/v1", "x", "http://me:secret@x/v1", "http://x/v1?key=1", "http://x/v1#a", "http://x/ y",
                "http://" + "x" * 600,
            )
        ),
    ],
)  # fmt: skip
async def test_specs_are_bounded(world, spec, param):
    with pytest.raises(InvalidRequest) as refused:
        await put(world, spec)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "budget",
    [
        admin_pb2.Budget(name="UPPER"),
        admin_pb2.Budget(name=""),
        admin_pb2.Budget(name="a", latency_p95_s=math.inf),
        admin_pb2.Budget(name="a", energy_j=-0.1),
        admin_pb2.Budget(name="a", tokens=1 << 30),
        admin_pb2.Budget(name="a", most=65),
        admin_pb2.Budget(name="a", combine=9),  # type: ignore[arg-type]
    ],
)
async def test_budgets_are_bounded(world, budget):
    owner = await world.admin()
    with pytest.raises(InvalidRequest):
        await world.call(owner.PutBudget(admin_pb2.PutBudgetRequest(budget=budget)))


def profile(experts: list[str], rows: list[tuple[float, list[float]]]) -> admin_pb2.OutcomeReport:
    made = [admin_pb2.QualityRow(share=share, quality=quality) for share, quality in rows]
    return admin_pb2.OutcomeReport(profile=admin_pb2.QualityProfile(experts=experts, rows=made))


@pytest.mark.parametrize(
    "message",
    [
        admin_pb2.OutcomeReport(outcomes=answers("a", 1025)),
        admin_pb2.OutcomeReport(outcomes=answers("A", 1)),
        admin_pb2.OutcomeReport(outcomes=answers("a", 1, ttft_s=math.inf)),
        admin_pb2.OutcomeReport(outcomes=answers("a", 1, ttft_s=0.0)),
        admin_pb2.OutcomeReport(links=[admin_pb2.LinkFigure(expert="a", rtt_s=-1.0)]),
        profile(["a"], [(1.0, [0.5, 0.5])]),
        profile(["a"], [(1.0, [1.5])]),
        profile(["a"], [(1.0, [math.nan])]),
        profile(["a"], [(0.4, [0.5])]),
        profile(["a", "a"], [(1.0, [0.5, 0.5])]),
        profile(["a"], []),
        profile(["a"], [(1.0 / 513, [0.5])] * 513),
    ],
)
async def test_reports_are_bounded_and_taken_whole_or_not_at_all(world, message):
    gateway = await world.admin(Role.GATEWAY)
    with pytest.raises(InvalidRequest):
        await world.call(gateway.Report(message))


async def test_urls_lose_their_last_slash(world):
    added = await put(world, admin_pb2.ExpertSpec(name="a", url="https://[2001:db8::1]:8000/v1/"))
    assert added.spec.url == "https://[2001:db8::1]:8000/v1"
