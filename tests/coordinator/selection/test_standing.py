"""When an expert is dropped, and how it comes back."""

from __future__ import annotations

import pytest

from ganglion.coordinator.selection.standing import FAILED, LONGEST_PAUSE_S, PASSED, PAUSE_S, Standing


def test_some_failures_are_borne_and_a_run_of_them_is_not() -> None:
    standing = Standing()
    for _ in range(4):
        assert not standing.failed("unavailable", "", 0.0)
        assert [standing.answered() for _ in range(3)] == [False] * 3
    for _ in range(FAILED - 1):
        assert not standing.failed("unavailable", "no answer within 30 s", 0.0)
    assert standing.failed("unavailable", "no answer within 30 s", 0.0)
    assert standing.state == "dropped"
    assert "no answer within 30 s" in standing.line("desk", 1.0)
    assert "29 s" in standing.line("desk", 1.0)
    assert "ganglion experts add desk" in standing.line("desk", 1.0)


def test_nonsense_is_borne_once() -> None:
    standing = Standing()
    assert not standing.failed("nonsense", "", 0.0)
    assert standing.failed("nonsense", "not JSON", 0.0)
    assert "not JSON" in standing.line("x", 0.0)


@pytest.mark.parametrize("code", ["unauthenticated", "not_found"])
def test_what_asking_again_does_not_mend_drops_at_once(code: str) -> None:
    standing = Standing()
    assert standing.failed(code, "no such model", 0.0)
    assert standing.state == "dropped"


def test_a_request_that_is_to_blame_does_not_count() -> None:
    standing = Standing()
    for _ in range(9):
        assert not standing.failed("context_length_exceeded", "", 0.0)


def test_probation_ends_in_good_standing_or_in_a_longer_pause() -> None:
    standing, now_s, pause_s = Standing(), 0.0, PAUSE_S
    standing.failed("not_found", "", now_s)
    for _ in range(9):
        assert not standing.tick(now_s + pause_s - 0.1)
        assert standing.tick(now_s + pause_s)
        assert standing.state == "probation"
        assert standing.line("x", now_s).startswith("on probation")
        now_s += pause_s
        assert standing.failed("unavailable", "", now_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        assert standing.pause_s == pause_s
    assert pause_s == LONGEST_PAUSE_S
    standing.tick(now_s + pause_s)
    assert [standing.answered() for _ in range(PASSED)] == [False] * (PASSED - 1) + [True]
    assert (standing.state, standing.line("x", 0.0), standing.pause_s) == ("ready", "", PAUSE_S)
