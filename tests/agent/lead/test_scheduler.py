"""The scheduler and the pace as pure cores: transcripts of small cases, invariants over random ones, no clock."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.lead import pace as pace_module
from ganglion.agent.lead import scheduler as scheduler_module
from ganglion.agent.lead.pace import LEAST_ROWS, STALL_FACTOR, Pace
from ganglion.agent.lead.scheduler import FIRST_SLOT as SLOT
from ganglion.agent.lead.scheduler import Entry, Scheduler, Step
from ganglion.wire.errors import Exhausted
from ganglion.wire.limits import SESSIONS_QUEUED, TREE_BRANCHES


def test_a_prompt_in_chunks_then_tokens():
    scheduler = Scheduler(chunk=4, sessions=2, kv_tokens=4096)
    scheduler.open(1, 6)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 4, 0),))
    assert scheduler.next_step() == Step(2, (Entry(1, 4, 2, 1),))
    assert scheduler.next_step() is None
    scheduler.drawn(1)
    assert scheduler.next_step() == Step(3, (Entry(1, 6, 1, 1),), decoding=1)
    scheduler.close(1)
    assert scheduler.next_step() == Step(4, (), (1,))
    assert scheduler.next_step() is None


def test_tokens_before_prompts_and_closes_with_the_next_step():
    scheduler = Scheduler(chunk=4, sessions=3, kv_tokens=4096)
    scheduler.open(1, 2)
    scheduler.next_step()
    scheduler.drawn(1)
    scheduler.open(2, 9)
    scheduler.open(3, 1)
    assert scheduler.next_step() == Step(2, (Entry(1, 2, 1, 1), Entry(2, 0, 3, 0)), decoding=1)
    scheduler.close(1)
    assert scheduler.next_step() == Step(3, (Entry(2, 3, 4, 0),), (1,))
    assert scheduler.next_step() == Step(4, (Entry(2, 7, 2, 1), Entry(3, 0, 1, 1)))


def test_a_session_waits_until_one_closes():
    scheduler = Scheduler(chunk=8, sessions=1, kv_tokens=4096)
    scheduler.open(1, 1)
    scheduler.open(2, 1)
    scheduler.open(3, 1)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 1, 1),))
    assert scheduler.next_step() is None
    assert scheduler.queued == 2
    scheduler.close(2)
    scheduler.close(1)
    assert scheduler.next_step() == Step(2, (Entry(3, 0, 1, 1),), (1,))


def test_what_a_session_begins_with_is_asked_as_it_is_admitted():
    found = {1: 0, 2: 4, 3: 2}
    asked = []
    scheduler = Scheduler(
        chunk=4, sessions=2, kv_tokens=4096, begin=lambda session: asked.append(session) or found[session]
    )
    for session in (1, 2, 3):
        scheduler.open(session, 6)
    assert (asked, scheduler.held(2)) == ([], 0)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 4, 0),))
    assert (asked, scheduler.held(1), scheduler.held(2)) == ([1, 2], 4, 4)  # 2 had no room, and has its beginning
    assert scheduler.next_step() == Step(2, (Entry(1, 4, 2, 1), Entry(2, 4, 2, 1)))
    scheduler.close(1)
    assert scheduler.held(1) == 0
    assert scheduler.next_step() == Step(3, (Entry(3, 2, 4, 1),), (1,))
    assert asked == [1, 2, 3]


def test_a_full_queue_refuses():
    scheduler = Scheduler(chunk=8, sessions=1, kv_tokens=4096)
    for session in range(1 + SESSIONS_QUEUED):
        scheduler.open(session, 1)
    with pytest.raises(Exhausted, match="--sessions"):
        scheduler.open(99, 1)


def test_where_somebody_else_says_what_follows_a_session_rests_until_it_is_said():
    scheduler = Scheduler(chunk=4, sessions=2, kv_tokens=4096)
    scheduler.open(1, 2)
    scheduler.open(2, 1)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 2, 1), Entry(2, 0, 1, 1)))
    assert scheduler.next_step() is None
    scheduler.chosen(1, 1)
    assert scheduler.next_step() == Step(2, (Entry(1, 2, 1, 1),), decoding=1)
    scheduler.chosen(1, 6)  # only the row of the last one draws
    assert scheduler.next_step() == Step(3, (Entry(1, 3, 4, 0),))
    assert scheduler.next_step() == Step(4, (Entry(1, 7, 2, 1),))
    assert scheduler.next_step() is None


def test_what_follows_may_be_said_of_a_session_that_was_put_back():
    scheduler = Scheduler(chunk=512, sessions=2, kv_tokens=1024)
    scheduler.open(1, 500)
    scheduler.open(2, 2)
    steps = [scheduler.next_step(), scheduler.next_step()]
    assert [len(step.entries) for step in steps if step] == [2]
    for _ in range(12):
        scheduler.drawn(1)
        steps.append(scheduler.next_step())
    assert [step.put_back for step in steps if step and step.put_back] == [(2,)]
    assert scheduler.active == {1}
    scheduler.chosen(2, 3)
    scheduler.close(1)
    assert scheduler.next_step().entries == (Entry(2, 0, 5, 1),)


def test_where_formats_mix_steps_of_both_roles_take_turns():
    scheduler = Scheduler(chunk=4, sessions=3, kv_tokens=4096, mixed=True)
    scheduler.open(1, 2, "a")
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 2, 1),), role="prompt")
    scheduler.drawn(1)
    scheduler.open(2, 9, "b")
    scheduler.open(3, 1, "c")
    assert scheduler.next_step() == Step(2, (Entry(1, 2, 1, 1),), decoding=1, role="generated")
    scheduler.drawn(1)
    assert scheduler.next_step(3) == Step(3, (Entry(2, 0, 3, 0),), role="prompt")  # 1 waits for it
    assert scheduler.next_step() == Step(4, (Entry(1, 3, 1, 1),), decoding=1, role="generated")
    scheduler.drawn(1)
    assert scheduler.next_step() == Step(5, (Entry(3, 0, 1, 1), Entry(2, 3, 3, 0)), role="prompt")
    scheduler.drawn(3)
    step = Step(6, (Entry(1, 4, 1, 1), Entry(3, 1, 1, 1)), decoding=2, role="generated")
    assert scheduler.next_step() == step
    scheduler.close(1)
    scheduler.close(3)
    assert scheduler.next_step(1) == Step(7, (Entry(2, 6, 3, 1),), (1, 3), role="prompt")  # nobody waits for it
    assert scheduler.next_step() is None


def test_what_was_drawn_is_replayed_in_its_role():
    scheduler = Scheduler(chunk=1024, sessions=4, kv_tokens=1024, mixed=True)
    scheduler.open(1, 510)
    scheduler.open(2, 300)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 510, 1), Entry(2, 0, 300, 1)), role="prompt")
    for _ in range(2):
        scheduler.drawn(1)
        scheduler.drawn(2)
        step = scheduler.next_step()
    assert step == Step(3, (Entry(1, 511, 1, 1),), put_back=(2,), decoding=1, role="generated")
    scheduler.close(1)
    assert scheduler.next_step() == Step(4, (Entry(2, 0, 300, 0),), (1,), role="prompt")
    assert scheduler.next_step() == Step(5, (Entry(2, 300, 2, 1),), role="generated")


def test_prompts_take_turns_by_client_and_so_do_admissions():
    scheduler = Scheduler(chunk=4, sessions=3, kv_tokens=4096)
    for session in range(1, 4):
        scheduler.open(session, 8, "greedy")
    scheduler.open(9, 8, "modest")
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 4, 0),))
    assert scheduler.active == {1, 2, 9}  # the modest one overtook the third of the greedy one
    assert [scheduler.next_step().entries[0].session for _ in range(3)] == [9, 1, 9]


def test_prompts_take_what_they_may_beside_running_streams():
    scheduler = Scheduler(chunk=64, sessions=2, kv_tokens=4096)
    scheduler.open(1, 2)
    scheduler.next_step(8)
    scheduler.drawn(1)
    scheduler.open(2, 100)
    assert scheduler.next_step(8) == Step(2, (Entry(1, 2, 1, 1), Entry(2, 0, 8, 0)), decoding=1)
    scheduler.close(1)
    assert scheduler.next_step(8) == Step(3, (Entry(2, 8, 64, 0),), (1,))  # nobody waits for it


def test_state_that_is_short_is_taken_from_the_session_admitted_last_and_its_tokens_run_anew():
    scheduler = Scheduler(chunk=1024, sessions=4, kv_tokens=1024)
    scheduler.open(1, 510)
    scheduler.open(2, 300)
    scheduler.open(3, 300)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 510, 1), Entry(2, 0, 300, 1)))
    assert scheduler.active == {1, 2}  # a third would not fit
    scheduler.drawn(1)
    scheduler.drawn(2)
    assert scheduler.next_step() == Step(2, (Entry(1, 510, 1, 1), Entry(2, 300, 1, 1)), decoding=2)
    scheduler.drawn(1)
    scheduler.drawn(2)
    assert scheduler.next_step() == Step(3, (Entry(1, 511, 1, 1),), put_back=(2,), decoding=1)
    assert scheduler.queued == 2
    scheduler.close(1)
    # First in line, with the prompt and both of its tokens; the one after it has waited all along.
    assert scheduler.next_step() == Step(4, (Entry(2, 0, 302, 1), Entry(3, 0, 300, 1)), (1,))


def test_a_session_that_was_put_back_is_closed_wherever_it_is():
    scheduler = Scheduler(chunk=1024, sessions=4, kv_tokens=1024)
    scheduler.open(1, 511)
    scheduler.open(2, 300)
    scheduler.next_step()
    scheduler.drawn(1)
    scheduler.drawn(2)
    assert scheduler.next_step() == Step(2, (Entry(1, 511, 1, 1),), put_back=(2,), decoding=1)
    scheduler.close(2)
    scheduler.close(2)
    assert scheduler.next_step() == Step(3, (), (2,))


def test_a_branch_runs_in_a_slot_beside_the_window_and_gives_its_rows_to_the_chain():
    scheduler = Scheduler(chunk=16, sessions=1, kv_tokens=4096)
    scheduler.open(1, 10)
    assert scheduler.next_step() == Step(1, (Entry(1, 0, 10, 1),))
    scheduler.drawn(1)
    scheduler.window(1, 3, [(1, 2), (9, 1), (3, 4)])
    step = (Entry(1, 10, 4, 4), Entry(SLOT, 12, 2, 2, 1, 0, 0), Entry(SLOT + 1, 14, 4, 4, 1, 0, 2))
    assert scheduler.next_step() == Step(2, step, decoding=3)
    scheduler.drawn(1, 4, SLOT)  # one of the chain, two of the branch, and one that nobody drafted
    assert scheduler.held(1) == 12
    scheduler.window(1, 1, [(0, 1)])
    step = (Entry(1, 14, 2, 2, SLOT, 12), Entry(SLOT, 15, 1, 1, 1, 14, 0))  # what it shares with the chain stays
    assert scheduler.next_step() == Step(3, step, decoding=2)
    scheduler.drawn(1)
    assert scheduler.next_step() == Step(4, (Entry(1, 15, 1, 1),), decoding=1)
    scheduler.close(1)
    assert scheduler.next_step() == Step(5, (), (1, SLOT, SLOT + 1))


def test_slots_are_given_up_before_anybody_is_put_back():
    scheduler = Scheduler(chunk=64, sessions=2, kv_tokens=1536)
    scheduler.open(1, 20)
    scheduler.next_step()
    scheduler.drawn(1)
    branches = [(0, 1), (0, 2), (1, 1)]
    scheduler.window(1, 1, branches)
    step = (Entry(1, 20, 2, 2), Entry(SLOT, 21, 1, 1, 1, 0, 0), Entry(SLOT + 1, 21, 2, 2, 1, 0, 1))
    assert scheduler.next_step() == Step(2, step, decoding=3)  # a third one would not fit
    scheduler.drawn(1, 3, SLOT + 1)
    scheduler.open(2, 5)
    scheduler.window(1, 1, branches)
    step = (Entry(1, 23, 2, 2, SLOT + 1, 21), Entry(SLOT + 1, 24, 1, 1, 1, 23, 0), Entry(2, 0, 5, 1))
    assert scheduler.next_step() == Step(3, step, (SLOT,), decoding=2)


def test_rows_of_a_branch_are_run_anew_where_there_is_no_room_to_take_them():
    scheduler = Scheduler(chunk=600, sessions=2, kv_tokens=1024)
    scheduler.open(1, 507)
    scheduler.next_step()
    scheduler.drawn(1)
    scheduler.window(1, 0, [(0, 3)])
    assert scheduler.next_step() == Step(2, (Entry(1, 507, 1, 1), Entry(SLOT, 508, 3, 3, 1, 0, 0)), decoding=2)
    scheduler.drawn(1, 4, SLOT)
    assert scheduler.next_step() == Step(3, (Entry(1, 508, 4, 1),), (SLOT,))


class Ledger:
    """What devices hold, counted without any cleverness: rows by what ran in them, which must be what was drawn.

    truth: what each of a session's rows has to hold, as far as it was drawn.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.rows: dict[int, list[object]] = {}
        self.most: dict[int, int] = {}
        self.truth: dict[int, list[object]] = {}

    def run(self, step: Step) -> None:
        for session in (*step.closed, *step.put_back):
            self.rows.pop(session, None)
            self.most.pop(session, None)
        for entry in step.entries:
            rows = self.rows.setdefault(entry.session, [])
            if entry.take_from is not None:
                taken = self.rows[entry.take_from]
                assert entry.take_first <= min(entry.start, len(rows))
                assert entry.start <= len(taken)
                rows[entry.take_first :] = taken[entry.take_first : entry.start]
            assert entry.start <= len(rows)
            del rows[entry.start :]
            if entry.branch is None:
                known = self.truth[entry.session]
                assert rows == known[: entry.start]
                rows += known[entry.start : entry.start + entry.count]
            else:
                assert rows == self.rows[entry.take_from][: entry.start]
            rows += [object() for _ in range(entry.start + entry.count - len(rows))]
            self.most[entry.session] = max(self.most.get(entry.session, 0), len(rows))
        capacities = []
        for held in self.most.values():
            capacity = 512
            while capacity < held + held % 2:
                capacity *= 2
            capacities.append(capacity)
        assert sum(capacities) <= self.tokens

    def drawn(self, session: int, tokens: int, slot: int | None) -> None:
        truth, rows = self.truth[session], self.rows[session if slot is None else slot]
        truth += [*rows[len(truth) : len(truth) + tokens - 1], object()]


@settings(deadline=None)
@given(st.data())
def test_every_token_is_drawn_once_in_order_within_the_memory(data):
    chunk, sessions = data.draw(st.sampled_from([1, 3, 64, 700])), data.draw(st.integers(1, 4))
    long, mixed = data.draw(st.booleans()) and chunk > 3, data.draw(st.booleans())
    memory = data.draw(st.sampled_from([1024, 1536, 4096]))
    scheduler = Scheduler(chunk=chunk, sessions=sessions, kv_tokens=memory, mixed=mixed)
    ledger = Ledger(memory)
    prompts = st.integers(1, 900) if long else st.integers(1, 20)
    wanted = {one: data.draw(st.tuples(prompts, st.integers(1, 100 if long else 6))) for one in range(6)}
    drawn = dict.fromkeys(wanted, 0)
    drafts, right = data.draw(st.booleans()), dict.fromkeys(wanted, 0)  # rows that hold, of each
    branching = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=6)
    for one, (prompt, _) in wanted.items():
        answered = 0 if one % 3 else min(2, wanted[one][1] - 1)
        drawn[one] += answered
        ledger.truth[one] = [object() for _ in range(prompt + answered)]
        scheduler.open(one, prompt, client=str(one % 2), answered=answered)
    for _ in range(5000):
        prompt_rows = data.draw(st.sampled_from([None, 1, 8])) if not long else None
        windows: dict[int, int | None] = {}
        branches: dict[int, list[tuple[int, int]]] = {}
        if drafts:
            windows = {one: data.draw(st.sampled_from([None, 0, 1, 5, 70])) for one in scheduler.decoding()}
            for one, window in windows.items():
                branches[one] = data.draw(branching)
                scheduler.window(one, window, branches[one])
        step = scheduler.next_step(prompt_rows)
        if step is None:
            if windows:  # all of them wait for drafts
                continue
            break
        assert step.rows <= chunk
        assert step.entries or step.closed or step.put_back
        mains = [entry for entry in step.entries if entry.branch is None]
        slots = [entry for entry in step.entries if entry.branch is not None]
        assert len({entry.session for entry in step.entries}) == len(step.entries)
        assert len(mains) <= sessions
        if step.decoding and prompt_rows is not None:
            assert step.prompt_rows <= prompt_rows
        assert all(windows.get(entry.session, 0) is not None for entry in mains)
        ledger.run(step)
        assert len([one for one in ledger.rows if one < SLOT]) <= sessions
        assert len([one for one in ledger.rows if one >= SLOT]) <= sessions * TREE_BRANCHES
        right |= dict.fromkeys(step.put_back, 0)
        starts = {entry.session: entry for entry in mains}
        for entry in slots:
            at, most = branches[entry.take_from][entry.branch]
            main = starts[entry.take_from]
            assert entry.draws == entry.count <= most
            assert entry.start == main.start + 1 + at <= main.start + main.count
        for entry in mains:
            known = wanted[entry.session][0] + drawn[entry.session]
            if entry.start != right[entry.session]:  # the rows of a branch were lost
                assert entry.draws == (entry.start + entry.count == known)
                assert entry.start < right[entry.session] < known
            right[entry.session] = entry.start + entry.count
            prompt = wanted[entry.session][0]
            alike = entry.start + entry.count <= prompt if entry.start < prompt else step.role == "generated"
            assert alike and (step.role == "prompt") == (entry.start < prompt) if mixed else step.role == "any"
            assert entry.draws == max(0, entry.start + entry.count - known + 1) <= 1 + (windows.get(entry.session) or 0)
            if entry.draws:
                paths = [(None, 0, entry.draws)]
                paths += [
                    (one.session, one.start - entry.start - 1, one.count)
                    for one in slots
                    if one.take_from == entry.session
                ]
                slot, before, most = data.draw(st.sampled_from(paths)) if len(paths) > 1 else paths[0]
                tokens = before + data.draw(st.integers(1 + (slot is not None), most + (slot is not None)))
                if slot is None and entry.draws == 1:
                    tokens = 1
                ledger.drawn(entry.session, tokens, slot)
                right[entry.session] = known + tokens - 1
                drawn[entry.session] = min(drawn[entry.session] + tokens, wanted[entry.session][1])
                if drawn[entry.session] < wanted[entry.session][1]:
                    scheduler.drawn(entry.session, tokens, slot)
                    assert scheduler.held(entry.session) <= len(ledger.rows[entry.session])
                    held = scheduler.held(entry.session)
                    assert ledger.rows[entry.session][:held] == ledger.truth[entry.session][:held]
                else:
                    scheduler.close(entry.session)
    assert drawn == {one: answer for one, (_, answer) in wanted.items()}
    assert not ledger.rows


def test_the_pace_bounds_what_a_running_stream_waits():
    pace = Pace()
    assert pace.prompt_rows(256) == LEAST_ROWS  # nothing is known yet
    pace.measured(0, 256, 2.56)
    for _ in range(30):
        pace.measured(8, 0, 0.06)
    assert pace.prompt_rows(256) == LEAST_ROWS
    for _ in range(50):  # what a row really adds: 3 ms
        rows = pace.prompt_rows(256)
        pace.measured(8, rows, 0.06 + 0.003 * rows)
    assert 0.06 + 0.003 * pace.prompt_rows(256) <= STALL_FACTOR * 0.06
    assert pace.prompt_rows(256) >= 18
    assert pace.prompt_rows(4) == 4


@pytest.mark.parametrize("module", [scheduler_module, pace_module])
def test_the_cores_read_no_clock_and_do_no_io(module):
    """What they import, directly or not, is of ours pure too; neither names a clock, a file, a socket or a loop."""
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {
        name.split(".")[0] if not name.startswith("ganglion") else name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    pure = {"ganglion.agent.roles", "ganglion.wire.errors", "ganglion.wire.limits", "ganglion.wire.nouns"}
    assert imported <= {"__future__", "dataclasses", "typing", "collections"} | pure
    called = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not called & {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))
