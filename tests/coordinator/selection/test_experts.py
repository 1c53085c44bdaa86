"""The table of experts: specs, deployments and measurements put together."""

from __future__ import annotations

import pytest

from ganglion.coordinator.selection.experts import EXPERTS, ExpertTable, Present, Spec
from ganglion.coordinator.selection.figures import Claim
from ganglion.wire.errors import Exhausted, NotFound

HERE = Present(
    deployment="d1", why="", node_id="n1", label="friend", tokenizer_digest="ab", sessions=3, slots=4, devices=2,
    ms_per_token=20.0,
)  # fmt: skip


def test_a_deployment_says_where_it_is_and_what_is_predicted() -> None:
    table = ExpertTable()
    table.put(Spec(name="demo"))
    assert table.served_models() == {"demo"}
    (away,) = table.experts({}, 0.0)
    assert (away.state, away.why) == ("away", "it is not deployed: ganglion run demo")
    (ready,) = table.experts({"demo": HERE}, 0.0)
    assert (ready.state, ready.label, ready.queue, ready.slots) == ("ready", "friend", 3, 4)
    assert (ready.deployment, ready.node_id, ready.tokenizer_digest) == ("d1", "n1", "ab")
    assert ready.figures.tokens_per_s == pytest.approx(50.0)
    table.put(Spec(name="demo", claim=Claim(tokens_per_s=7.0)))
    assert table.experts({"demo": HERE}, 0.0)[0].figures.tokens_per_s == pytest.approx(7.0)


def test_a_server_is_asked_where_it_is() -> None:
    table = ExpertTable()
    table.put(Spec(name="big", url="http://box:1/v1", model="Big-7B", label="owner"))
    (big,) = table.experts({"big": HERE}, 0.0)
    assert (big.state, big.label, big.deployment, big.slots) == ("ready", "owner", "", 0)
    assert table.served_models() == set()


def test_measurements_survive_a_new_spec_and_a_restart_but_not_another_model() -> None:
    table = ExpertTable()
    table.put(Spec(name="a", url="http://x/v1"))
    for _ in range(5):
        table.answered("a", 0.2, 0.5, 0.0)
    assert table.experts({}, 0.0)[0].figures.tokens_per_s == pytest.approx(2.0)
    ((name, saved),) = table.unsaved()
    assert list(table.unsaved()) == []
    table.put(Spec(name="a", url="http://x/v1", domains=("c",)))
    assert table.experts({}, 0.0)[0].figures.samples == 5
    again = ExpertTable()
    again.put(Spec(name=name, url="http://x/v1"), saved)
    assert again.experts({}, 0.0)[0].figures.tokens_per_s == pytest.approx(2.0)
    table.put(Spec(name="a", url="http://y/v1"))
    assert table.experts({}, 0.0)[0].figures.samples == 0


def test_who_fails_is_dropped_and_adding_it_again_takes_it_back() -> None:
    table = ExpertTable()
    table.put(Spec(name="a", url="http://x/v1"))
    assert table.failed("a", "unauthenticated", "HTTP 401", 0.0)
    (dropped,) = table.experts({}, 10.0)
    assert dropped.state == "dropped"
    assert dropped.why == ("unauthenticated: HTTP 401; tried again in 20 s, or at once with: ganglion experts add a")
    assert not table.tick(29.0)
    assert table.tick(30.0)
    assert table.experts({}, 30.0)[0].state == "ready"
    table.failed("a", "unauthenticated", "HTTP 401", 31.0)
    table.put(Spec(name="a", url="http://x/v1"))
    assert (table.experts({}, 32.0)[0].state, table.experts({}, 32.0)[0].why) == ("ready", "")


def test_the_number_of_experts_is_bounded_and_unknown_ones_are_told() -> None:
    table = ExpertTable()
    for number in range(EXPERTS):
        table.put(Spec(name=f"e{number}"))
    table.put(Spec(name="e0"))
    with pytest.raises(Exhausted, match="64 experts"):
        table.put(Spec(name="one-more"))
    table.remove("e0")
    with pytest.raises(NotFound, match="e1"):
        table.remove("e0")
    assert not table.answered("e0", 1.0, 1.0, 0.0)
    assert not table.failed("e0", "unavailable", "", 0.0)
