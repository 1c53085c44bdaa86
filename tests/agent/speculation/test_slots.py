"""The table of slots against the slots themselves, and prompt lookup."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.agent.speculation.guesser import Lookup
from ganglion.agent.speculation.guessing import NO_GUESS, Ask
from ganglion.agent.speculation.slots import Placed, SlotTable
from ganglion.wire.sampling.parameters import Sampling

PROMPT = [7, 8, 9]


def test_a_branch_goes_to_another_slot_with_a_copy():
    table = SlotTable([3, 5], len(PROMPT))
    assert table.place([()]) == [Placed(3)]
    assert table.place([(1,)]) == [Placed(3)]
    assert table.place([(1, 2), (4,)]) == [Placed(3), Placed(5, 3, 3)]
    assert table.place([(4, 1)]) == [Placed(5)]
    table.committed([1])
    assert table.place([(2, 3)]) == [Placed(3)]


def test_slots_come_and_go():
    table = SlotTable([1], 0)
    assert table.give_up() is None
    table.add(2)
    table.place([(5,)])
    given_up = table.give_up()
    assert {given_up, *table.slots} == {1, 2}


@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_few_rows_run_and_none_is_believed_held_that_is_not(rng, count):
    """Random trees and outcomes, beside slots that hold real sequences."""
    ids, table = list(PROMPT), SlotTable(range(count), len(PROMPT))
    slots: dict[int, list[int]] = {slot: [] for slot in range(count)}
    known: list[tuple[int, ...]] = [()]
    for _ in range(12):
        paths = rng.sample(known, min(len(known), rng.randrange(1, count + 1)))
        placed = table.place(paths)
        assert len({one.slot for one in placed}) == len(paths)
        for one in placed:
            if one.source is not None:
                slots[one.slot] = slots[one.source][: one.tokens]
        for one, path in zip(placed, paths, strict=True):
            slots[one.slot] = [*ids, *path]
            known += [(*path, token) for token in rng.sample(range(4), 2)]
        if rng.random() < 0.4:
            tokens = list(rng.choice(known))[:3] or [rng.randrange(4)]
            table.committed(tokens)
            ids += tokens
            known = [path[len(tokens) :] for path in known if list(path[: len(tokens)]) == tokens] or [()]
        for held in table._held:
            believed = [*ids[: held.settled], *(held.tail if held.settled == len(ids) else ())]
            assert slots[held.slot][: len(believed)] == believed


# Prompt lookup.


def asks(*texts: list[int]) -> list[Ask]:
    return [Ask(slot, text, Sampling(), top=3) for slot, text in enumerate(texts)]


def test_what_followed_the_longest_suffix_comes_first():
    first, second, third = Lookup().step(asks([1, 2, 3, 9, 5, 3, 8, 1, 2, 3], [4, 5, 6], [6]))
    assert first.tokens == (9, 8)
    assert first.scores[0] > 3.0 > first.scores[1] > 1.0
    assert (second, third) == (NO_GUESS, NO_GUESS)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4))
def test_lookup_against_a_dumb_one(text, top):
    (guess,) = Lookup().step([Ask(0, text, Sampling(), top=top)])
    found: list[int] = []
    for length in (3, 2, 1):
        if length >= len(text):
            continue
        suffix = text[-length:]
        ends = [at for at in range(length, len(text)) if text[at - length : at] == suffix]
        for at in ends[::-1][: 4 * top]:
            if text[at] not in found:
                found.append(text[at])
    assert list(guess.tokens) == found[:top]
    assert list(guess.scores) == sorted(guess.scores, reverse=True)
    if len(guess.scores) > 1:
        assert guess.scores[0] > guess.scores[1]


def test_a_guess_is_never_asked_of_the_future():
    rng = random.Random(1)
    text = [rng.randrange(5) for _ in range(60)]
    (guess,) = Lookup().step([Ask(0, text, Sampling(), top=1)])
    assert guess.tokens[0] in text
    with pytest.raises(IndexError):
        guess.tokens[1]
