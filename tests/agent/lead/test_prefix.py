"""What is kept of prompts, as a pure core: against a dumb reference, and against devices that copy as they are told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.agent.lead.prefix import Chain, PrefixCache, PrefixIndex, root_of
from ganglion.wire.nouns import PREFIX_BLOCK_TOKENS as BLOCK

ROOTS = [root_of(b"gateway", tenant) for tenant in (b"", b"one", b"two")]
Path = tuple[int, ...]  # a root's place and the symbols of the blocks that follow it


def tokens_of(path: Path, rest: int = 0) -> list[int]:
    """A block of each symbol after the root, then a part of a block."""
    return [symbol for symbol in path[1:] for _ in range(BLOCK)] + [9] * rest


paths = st.builds(lambda root, blocks: (root, *blocks), st.integers(0, 2), st.lists(st.integers(0, 1), max_size=5))


@dataclass
class Dumb:
    """Every kept path with the time of its last use; what has no child and was used longest ago goes."""

    capacity: int
    used: dict[Path, int] = field(default_factory=dict)
    now: int = 0

    def find(self, path: Path) -> int:
        self.now += 1
        found = 0
        while found < len(path) - 1 and path[: found + 2] in self.used:
            found += 1
            self.used[path[: found + 1]] = self.now
        return found

    def keep(self, path: Path) -> None:
        path = path[: self.capacity + 1]
        self.find(path)
        for stop in range(2, len(path) + 1):
            if path[:stop] not in self.used and len(self.used) == self.capacity:
                leaves = [one for one in self.used if not any(other[:-1] == one for other in self.used)]
                others = [one for one in leaves if path[: len(one)] != one]
                del self.used[min(others, key=self.used.__getitem__)]
            self.used[path[:stop]] = self.now


@given(st.integers(1, 7), st.lists(st.tuples(st.booleans(), paths), max_size=40))
def test_what_is_kept_is_what_the_dumb_reference_keeps(capacity, calls):
    index, dumb = PrefixIndex(capacity), Dumb(capacity)
    numbers: dict[Path, int] = {}
    for keeps, path in calls:
        keys = Chain(ROOTS[path[0]]).keys(tokens_of(path), len(path) - 1)
        if keeps:
            first, given_out = index.keep(keys)
            dumb.keep(path)
            numbers = {one: number for one, number in numbers.items() if one in dumb.used}
            numbers |= {path[: 2 + first + at]: number for at, number in enumerate(given_out)}
        else:
            found = index.find(keys)
            assert found == [numbers[path[: 2 + at]] for at in range(dumb.find(path))]
        assert set(numbers) == set(dumb.used)
        assert len(index) == len(numbers) <= capacity
        assert len(set(numbers.values())) == len(numbers)
        assert all(0 <= number < capacity for number in numbers.values())
        assert all(one[:-1] in numbers for one in numbers if len(one) > 2)  # no block without its parent


@dataclass
class Device:
    """Blocks and sessions, as the state of which tokens they are."""

    blocks: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    sessions: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)

    def prepare(self, keeps, closed, begins) -> None:
        for keep in keeps:
            for at, number in enumerate(keep.blocks, keep.first):
                self.blocks[number] = self.sessions[keep.session][at * BLOCK : (at + 1) * BLOCK]
                assert len(self.blocks[number]) == BLOCK
        for session in closed:
            self.sessions.pop(session, None)
        for begin in begins:
            assert begin.session not in self.sessions
            self.sessions[begin.session] = [row for number in begin.blocks for row in self.blocks[number]]


@given(st.data())
def test_a_session_begins_with_the_state_of_its_own_tokens(data):
    """Sessions that come, run, end and are cancelled at any time; a position's state names every token up to it."""
    capacity = data.draw(st.integers(0, 6))
    cache, device = PrefixCache(capacity * BLOCK), Device()
    running: dict[int, tuple[Path, list[int], int]] = {}  # its root and blocks, its tokens, how many were run
    closed: list[int] = []
    for number in range(data.draw(st.integers(0, 25))):
        if not running or (len(running) < 3 and data.draw(st.booleans())):
            path = data.draw(paths)
            prompt = tokens_of(path, data.draw(st.integers(0, 2))) or [9]
            cache.open(number, ROOTS[path[0]], len(prompt))
            held = cache.begin(number, prompt)
            assert held % BLOCK == 0
            assert held < len(prompt)
            running[number] = path, prompt, held
        keeps, begins = cache.take()
        device.prepare(keeps, closed, begins)
        closed = []
        for session, (path, tokens, held) in list(running.items()):
            rows = device.sessions.setdefault(session, [])
            assert rows == [(path[0], *tokens[: at + 1]) for at in range(held)]  # of this tenant and of these tokens
            fate = data.draw(st.sampled_from(["run", "draw", "close", "distrust"]))
            stop = len(tokens) if fate == "draw" else min(len(tokens), held + data.draw(st.integers(0, 2 * BLOCK)))
            rows += [(path[0], *tokens[: at + 1]) for at in range(held, stop)]
            running[session] = path, tokens, stop
            if fate == "draw":
                tokens.extend([data.draw(st.integers(0, 1))] * data.draw(st.sampled_from([1, BLOCK])))
                cache.ran(session, tokens, stop)
            elif fate != "run":
                if fate == "distrust":
                    cache.distrust(session)
                cache.ran(session, tokens, stop)
                cache.close(session)
                closed.append(session)
                del running[session]
    assert len(device.blocks) <= capacity
    assert all(0 <= block < capacity for block in device.blocks)


def test_a_chat_goes_on_where_it_was():
    cache = PrefixCache(8 * BLOCK)
    chat = list(range(3 * BLOCK + 5))
    cache.open(1, ROOTS[0], 1)
    assert cache.begin(1, chat) == 0
    cache.ran(1, chat, len(chat))
    assert [(one.first, one.blocks) for one in cache.take()[0]] == [(0, (0, 1, 2))]
    chat += [7] * BLOCK  # the answer, of which the last token is drawn and not run
    cache.ran(1, chat, len(chat) - 1)
    cache.close(1)
    assert [(one.first, one.blocks) for one in cache.take()[0]] == [(3, (3,))]
    cache.open(2, ROOTS[0], 1)
    assert cache.begin(2, [*chat, 5, 6, 7]) == 4 * BLOCK
    assert [one.blocks for one in cache.take()[1]] == [(0, 1, 2, 3)]
    for session, prompt, found in ((3, chat[: 3 * BLOCK], 2), (4, [*chat[:BLOCK], 0, *chat[BLOCK + 1 :]], 1)):
        cache.open(session, ROOTS[0], 1)
        assert cache.begin(session, prompt) == found * BLOCK
    cache.open(5, ROOTS[1], 1)
    assert cache.begin(5, chat) == 0


def test_numbers_that_are_not_finite_leave_nothing():
    cache = PrefixCache(4 * BLOCK)
    for session in (1, 2):
        cache.open(session, ROOTS[0], 1)
        assert cache.begin(session, [3] * 70) == 0
        cache.ran(session, [3] * 70, 70)
        cache.distrust(session)
        cache.ran(session, [3] * 70, 70)
        cache.close(session)
    assert [one.session for one in cache.take()[0]] == [1, 2]


@pytest.mark.parametrize("other", [(b"ab", b"c"), (b"a", b"bc", b""), (b"abc",), (), (b"", b"a", b"bc")])
def test_roots_differ_with_every_border(other):
    assert root_of(b"a", b"bc") != root_of(*other)


def test_where_formats_go_by_role_blocks_are_found_by_roles_too():
    cache = PrefixCache(8 * BLOCK, by_role=True)
    tokens = list(range(3 * BLOCK + 1))
    cache.open(1, ROOTS[0], BLOCK + 5)  # the second block has rows of both, the third was drawn
    cache.begin(1, tokens[: BLOCK + 5])
    cache.ran(1, tokens, 3 * BLOCK)
    cache.open(2, ROOTS[0], len(tokens))
    assert cache.begin(2, tokens) == BLOCK  # the next turn of a chat: all of it is a prompt now
    cache.open(3, ROOTS[0], BLOCK + 5)
    assert cache.begin(3, tokens) == 3 * BLOCK  # the same session, run anew
