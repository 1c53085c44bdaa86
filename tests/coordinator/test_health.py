# ruff: noqa: N802 - the ids of faults in names of tests are upper case
"""The health state machine against a script, and against the dumbest possible judge."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.coordinator.health import TICK_S, Changed, Gone, HealthTable, Silent


def run_ticks(table: HealthTable, start_s: float, stop_s: float) -> list[tuple[float, object]]:
    events: list[tuple[float, object]] = []
    count = round((stop_s - start_s) / TICK_S)
    for number in range(1, count + 1):
        now_s = start_s + number * TICK_S
        events += [(round(now_s, 3), event) for event in table.tick(now_s)]
    return events


def test_silence_makes_suspect_then_dead_and_a_message_alive():
    table = HealthTable()
    table.joined("a", 0.0)
    assert run_ticks(table, 0.0, 13.0) == [(6.1, Changed("a", "suspect")), (12.1, Changed("a", "dead"))]
    assert table.heard("a", 13.0) == [Changed("a", "alive")]
    assert table.heard("a", 13.1) == []
    assert table.health("a") == "alive"


def test_a_serving_deployment_notices_one_second():
    table = HealthTable()
    table.joined("a", 0.0)
    run_ticks(table, 0.0, 1.9)
    # The device beats every 2 s until it knows that it serves: silence counts from then on.
    table.set_active(frozenset({"a"}), 1.9)
    events = run_ticks(table, 1.9, 3.0)
    assert [event for _, event in events] == [Changed("a", "suspect"), Silent("a", events[1][1].silence_s)]
    assert 2.8 < events[0][0] < 3.1
    assert run_ticks(table, 3.0, 4.0) == []  # said once
    assert table.heard("a", 4.0) == [Changed("a", "alive")]
    assert [type(event) for _, event in run_ticks(table, 4.0, 5.3)] == [Changed, Silent]
    table.heard("a", 5.3)
    table.set_active(frozenset(), 5.3)
    assert run_ticks(table, 5.3, 8.0) == []


def test_the_end_of_a_stream_is_a_loss_at_once():
    table = HealthTable()
    table.joined("a", 0.0)
    assert table.left("a", "broken") == [Gone("a", "broken")]
    assert table.left("a", "broken") == []
    assert table.health("a") is None
    assert table.heard("a", 1.0) == []


def test_D9_a_process_that_slept_does_not_blame_the_devices():
    table = HealthTable()
    table.joined("a", 0.0)
    table.set_active(frozenset({"a"}), 0.0)
    table.tick(0.1)
    assert table.tick(60.0) == []
    assert table.health("a") == "alive"
    assert [type(event) for _, event in run_ticks(table, 60.0, 62.0)] == [Changed, Silent]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["tick", "beat"]), max_size=200))
def test_health_is_what_the_last_message_says(steps: list[str]):
    table = HealthTable()
    table.joined("a", 0.0)
    now_s = heard_s = 0.0
    for step in steps:
        if step == "beat":
            heard_s = now_s
            table.heard("a", now_s)
        else:
            for _ in range(10):
                now_s += TICK_S
                table.tick(now_s)
        silence_s = now_s - heard_s
        if min(abs(silence_s - 6), abs(silence_s - 12)) > 1e-6:
            assert table.health("a") == ("dead" if silence_s > 12 else "suspect" if silence_s > 6 else "alive")
