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


def test_a_full_queue_refuses():
    scheduler = Scheduler(chunk=8, sessions=1)
    for session in range(1 + SESSIONS_QUEUED):
        scheduler.open(session, 1)
    with pytest.raises(Exhausted, match="--sessions"):
        scheduler.open(99, 1)


def test_where_formats_mix_steps_of_both_roles_take_turns():
    scheduler = Scheduler(chunk=4, sessions=3, mixed=True)
    scheduler.open(1, 2)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 2, True),), (), "prompt")
    scheduler.drawn(1)
    scheduler.open(2, 9)
    scheduler.open(3, 1)
    assert scheduler.next_step() == Step(2, (Entry(1, 2, 1, True),), (), "generated")
    scheduler.drawn(1)
    assert scheduler.next_step() == Step(3, (Entry(3, 0, 1, True), Entry(2, 0, 3, False)), (), "prompt")
    scheduler.drawn(3)
    assert scheduler.next_step() == Step(4, (Entry(1, 3, 1, True), Entry(3, 1, 1, True)), (), "generated")
    scheduler.close(1)
    scheduler.close(3)
    assert scheduler.next_step() == Step(5, (Entry(2, 3, 4, False),), (1, 3), "prompt")
    assert scheduler.next_step() == Step(6, (Entry(2, 7, 2, True),), (), "prompt")
    assert scheduler.next_step() is None


@given(st.data())
def test_every_row_runs_once_in_order(data):
    chunk, sessions, mixed = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 4), st.booleans()))
    scheduler = Scheduler(chunk=chunk, sessions=sessions, mixed=mixed)
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
            prompt = wanted[entry.session][0]
            alike = entry.start + entry.count <= prompt if entry.start < prompt else step.role == "generated"
            assert alike and (step.role == "prompt") == (entry.start < prompt) if mixed else step.role == "any"
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
