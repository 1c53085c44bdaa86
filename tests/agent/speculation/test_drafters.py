"""What drafters propose: the model's own text, look-up against a dumb scan; and that no drafter changes a text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ganglion.agent.speculation.branching import Branch
from ganglion.agent.speculation.drafters import Branching, Drafter, ModelDrafter, NGram, Propose
from ganglion.agent.speculation.early import early_layers
from ganglion.agent.speculation.engine import Ask
from ganglion.wire.sampling.parameters import Sampling

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33]
GREEDY = Sampling()
WARM = Sampling(temperature=0.8, seed=5)


class Adversary:
    """Guesses at random, any length up to what is wanted."""

    name = "adversary"

    def __init__(self) -> None:
        self._random = random.Random(3)

    def propose(self, asks: Sequence[Propose]) -> list[list[int]]:
        return [[self._random.randrange(283) for _ in range(self._random.randrange(ask.most + 1))] for ask in asks]

    def close(self, session: int) -> None:
        pass

    def token_s(self, batch: int) -> float:
        return 0.0


def test_a_model_proposes_its_own_text_for_every_session(model):
    cut = model("llama")
    drafter = ModelDrafter(cut.engine())
    asks = [
        Propose(7, PROMPT, 5, GREEDY),
        Propose(3, PROMPT[:4], 0, GREEDY),
        Propose(9, PROMPT[2:], 2, WARM),
        Propose(1, PROMPT[:6], 4, Sampling(temperature=1.0, top_k=9, seed=1)),
    ]
    expected = [cut.text(ask.ids, ask.most, ask.sampling) for ask in asks]
    assert drafter.propose(asks) == expected
    assert drafter.propose(asks) == expected
    grown = Propose(7, [*PROMPT, *expected[0][:2], 66], 3, GREEDY)  # two accepted, one corrected
    assert drafter.propose([grown]) == [cut.text(grown.ids, 3)]
    assert drafter.token_s(1) > 0.0
    assert drafter.token_s(4) >= drafter.token_s(1)


def test_a_model_says_where_it_was_least_certain(model):
    cut = model("llama")
    engine, drafter = cut.engine(), ModelDrafter(cut.engine())
    for sampling in (GREEDY, WARM):
        asks = [Propose(7, PROMPT, 6, sampling, beside=3), Propose(9, PROMPT, 6, sampling)]
        first, alone = drafter.propose(asks)
        assert first == alone
        expected = []
        for at in range(len(first)):
            (guess,) = engine.step([Ask(0, [*PROMPT, *first[:at]], sampling, top=2)])
            expected.append((guess.scores[0] - guess.scores[1], Branch(at, guess.tokens[1:])))
        expected.sort(key=lambda pair: pair[0])
        assert list(drafter.beside(7)) == [branch for _, branch in expected[:3]]
        assert not drafter.beside(9)
    drafter.close(7)
    assert not drafter.beside(7)
    assert isinstance(drafter, Branching)
    assert not isinstance(NGram(), Branching)


def test_sessions_beyond_the_slots_get_nothing_until_one_is_closed(model):
    cut = model("llama")
    engine = cut.engine(slots=2)
    drafter = ModelDrafter(engine)
    asks = [Propose(session, PROMPT, 1, GREEDY) for session in (1, 2, 3)]
    (token,) = cut.text(PROMPT, 1)
    assert drafter.propose(asks) == [[token], [token], []]
    drafter.close(3)
    assert drafter.propose(asks[2:]) == [[]]
    drafter.close(1)
    assert engine.kv_bytes > 0
    assert drafter.propose(asks[1:]) == [[token], [token]]
    for session in (2, 3, 3, 99):
        drafter.close(session)
    assert engine.kv_bytes == 0


def test_a_draft_ends_with_what_ends_an_answer_and_at_the_end_of_the_context(model):
    cut = model("llama")
    text = cut.text(PROMPT, 4)
    ending = msgspec.structs.replace(cut.manifest, eos_ids=(text[2],))
    assert ModelDrafter(cut.engine(ending)).propose([Propose(1, PROMPT, 4, GREEDY)]) == [
        text[: text.index(text[2]) + 1]
    ]
    short = ModelDrafter(cut.engine(context=len(PROMPT) + 2))
    assert short.propose([Propose(1, PROMPT, 4, GREEDY)]) == [text[:2]]


def dumb_lookup(ids: Sequence[int], most: int) -> list[int]:
    for length in (3, 2, 1):
        suffix = list(ids[-length:])
        for end in range(len(ids) - 1, length - 1, -1):
            if len(suffix) == length and list(ids[end - length : end]) == suffix:
                found = list(ids)
                for at in range(most):
                    found.append(found[end + at])
                return found[len(ids) :]
    return []


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=6), st.integers(0, 7))
def test_look_up_is_that_of_a_scan_as_the_text_grows(parts, most):
    drafter, ids = NGram(), []
    for part in parts:
        ids += part
        found = drafter.propose([Propose(1, ids, most, GREEDY), Propose(2, part, most, GREEDY)])
        assert found[0] == dumb_lookup(ids, most)
    drafter.close(1)
    assert drafter.propose([Propose(1, parts[0], most, GREEDY)]) == [dumb_lookup(parts[0], most)]


def test_a_text_that_is_another_is_indexed_anew():
    drafter = NGram()
    drafter.propose([Propose(1, [1, 2, 3, 1, 2], 3, GREEDY)])
    for ids in ([5, 6, 5], [4, 4, 4, 4, 4, 4], []):
        assert drafter.propose([Propose(1, ids, 3, GREEDY)]) == [dumb_lookup(ids, 3)]


def test_look_up_goes_through_what_is_new_once():
    """A long text costs its length once: later calls look at what they are given anew."""

    class Watched(list):
        slices = 0

        def __getitem__(self, key):
            Watched.slices += isinstance(key, slice)
            return super().__getitem__(key)

    drafter, rng = NGram(), random.Random(2)
    ids = Watched(rng.randrange(50) for _ in range(5000))
    drafter.propose([Propose(1, ids, 4, GREEDY)])
    Watched.slices = 0
    for _ in range(10):
        ids.append(rng.randrange(50))
        drafter.propose([Propose(1, ids, 4, GREEDY)])
    assert Watched.slices <= 10 * 6


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("kind", ["adversary", "ngram", "own", "early"])
def test_no_drafter_changes_a_text(model, kind, sampling):
    """A window is accepted as long as it is what the target draws anyway; then the target's token follows."""
    cut = model("llama")
    drafter: Drafter
    if kind == "adversary":
        drafter = Adversary()
    elif kind == "ngram":
        drafter = NGram()
    else:
        drafter = ModelDrafter(cut.engine(early_layers(cut.manifest, 2) if kind == "early" else None))
    expected, text, passes = cut.text(PROMPT, 12, sampling), list(PROMPT), 0
    while len(text) < len(PROMPT) + 12:
        (window,) = drafter.propose([Propose(1, text, 4, sampling)])
        assert len(window) <= 4
        passes += 1
        for token in [*window, -1]:
            drawn = cut.draw(text, sampling)
            text.append(drawn)
            if token != drawn:
                break
    assert text[len(PROMPT) :][:12] == expected
    assert (passes < 4) == (kind == "own")
