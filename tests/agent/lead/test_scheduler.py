"""The scheduler as a pure core: transcripts of small cases, invariants over random ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.agent.lead.scheduler import Entry, Scheduler, Step
from ganglion.wire.errors import Exhausted
from ganglion.wire.limits import SESSIONS_QUEUED


def test_a_prompt_in_chunks_then_tokens():
    scheduler = Scheduler(chunk=4, sessions=2)
    scheduler.open(1, 6)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 4, False),), ())
    assert scheduler.next_step() == Step(2, (Entry(1, 4, 2, True),), ())
    assert scheduler.next_step() is None
    scheduler.drawn(1)
    assert scheduler.next_step() == Step(3, (Entry(1, 6, 1, True),), ())
    scheduler.close(1)
    assert scheduler.next_step() == Step(4, (), (1,))
    assert scheduler.next_step() is None


def test_tokens_before_prompts_and_closes_with_the_next_step():
    scheduler = Scheduler(chunk=4, sessions=3)
    scheduler.open(1, 2)
    scheduler.next_step()
    scheduler.drawn(1)
    scheduler.open(2, 9)
    scheduler.open(3, 1)
    assert scheduler.next_step() == Step(2, (Entry(1, 2, 1, True), Entry(3, 0, 1, True), Entry(2, 0, 2, False)), ())
    scheduler.drawn(3)
    scheduler.close(1)
    assert scheduler.next_step() == Step(3, (Entry(3, 1, 1, True), Entry(2, 2, 3, False)), (1,))


def test_a_session_waits_until_one_closes():
    scheduler = Scheduler(chunk=8, sessions=1)
    scheduler.open(1, 1)
    scheduler.open(2, 1)
    scheduler.open(3, 1)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 1, True),), ())
    assert scheduler.next_step() is None
    assert scheduler.queued == 2
    scheduler.close(2)
    scheduler.close(1)
    assert scheduler.next_step() == Step(2, (Entry(3, 0, 1, True),), (1,))


def test_what_a_session_begins_with_is_asked_as_it_is_admitted():
    found = {1: 0, 2: 4, 3: 2}
    asked = []
    scheduler = Scheduler(chunk=4, sessions=2, begin=lambda session: asked.append(session) or found[session])
    for session in (1, 2, 3):
        scheduler.open(session, 6)
    assert (asked, scheduler.held(2)) == ([], 0)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 4, False),), ())
    assert (asked, scheduler.held(1), scheduler.held(2)) == ([1, 2], 4, 4)  # 2 had no room, and has its beginning
    assert scheduler.next_step() == Step(2, (Entry(1, 4, 2, True), Entry(2, 4, 2, True)), ())
    scheduler.close(1)
    assert scheduler.held(1) == 0
    assert scheduler.next_step() == Step(3, (Entry(3, 2, 4, True),), (1,))
    assert asked == [1, 2, 3]


def test_a_full_queue_refuses():
    scheduler = Scheduler(chunk=8, sessions=1)
    for session in range(1 + SESSIONS_QUEUED):
        scheduler.open(session, 1)
    with pytest.raises(Exhausted, match="--sessions"):
        scheduler.open(99, 1)


@given(st.data())
def test_every_row_runs_once_in_order(data):
    chunk, sessions = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    scheduler = Scheduler(chunk=chunk, sessions=sessions)
    wanted = {one: data.draw(st.tuples(st.integers(1, 20), st.integers(1, 6))) for one in range(6)}
    left = {one: answer for one, (_, answer) in wanted.items()}
    held = dict.fromkeys(wanted, 0)
    for one, (prompt, _) in wanted.items():
        scheduler.open(one, prompt)
    for _ in range(1000):
        step = scheduler.next_step()
        if step is None:
            break
        assert step.rows <= chunk
        assert step.entries or step.closed
        assert len({entry.session for entry in step.entries}) == len(step.entries) <= sessions
        for entry in step.entries:
            assert entry.start == held[entry.session]
            held[entry.session] += entry.count
            known = wanted[entry.session][0] + wanted[entry.session][1] - left[entry.session]
            assert entry.draws == (held[entry.session] == known)
            if entry.draws:
                left[entry.session] -= 1
                if left[entry.session]:
                    scheduler.drawn(entry.session)
                else:
                    scheduler.close(entry.session)
    assert not any(left.values())
    assert all(held[one] == prompt + answer - 1 for one, (prompt, answer) in wanted.items())
