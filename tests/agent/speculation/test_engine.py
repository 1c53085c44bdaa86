"""The draft engine against a dumb lead of the same model: chains, rollbacks, copies, slots side by side, its limits."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ganglion.agent.executor.executor import Executor
from ganglion.agent.speculation.engine import Ask, DraftEngine, common_length
from ganglion.wire.errors import Internal
from ganglion.wire.sampling.noise import noise
from ganglion.wire.sampling.parameters import Sampling

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
GREEDY = Sampling()
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=0.7, seed=11),
    Sampling(temperature=1.0, top_k=7, seed=3),
    Sampling(temperature=0.7, top_p=0.8, seed=4),
    Sampling(temperature=5.0, top_p=0.999, seed=5),
    Sampling(temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, seed=6),
    Sampling(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2, seed=7),
    Sampling(temperature=0.0, logit_bias=((65, 100.0), (9999, 5.0)), frequency_penalty=1.5),
]


def chain(engine: DraftEngine, slot: int, ids: list[int], count: int, sampling: Sampling) -> list[int]:
    text = list(ids)
    for _ in range(count):
        (found,) = engine.step([Ask(slot, text, sampling, prompt=len(ids))])
        text.append(found.tokens[0])
    return text[len(ids) :]


@pytest.mark.parametrize(("shape", "weights"), [("llama", "fp32"), ("llama", "int4"), ("qwen3", "fp32")])
def test_a_chain_is_what_a_lead_of_the_drafter_draws(model, shape, weights):
    cut = model(shape, weights)
    engine = cut.engine()
    seen = set()
    for sampling in SAMPLINGS:
        found = chain(engine, 1, PROMPT, 6, sampling)
        known = Sampling(
            **{name: getattr(sampling, name) for name in Sampling.__slots__ if name != "logit_bias"},
            logit_bias=sampling.logit_bias[:1],
        )  # of ids that this drafter does not have nothing is known
        assert found == cut.text(PROMPT, 6, known), sampling
        seen.add(tuple(found))
    assert len(seen) > 4


def test_rollbacks_copies_and_slots_side_by_side_leave_no_trace(model):
    """Random asks and copies: every guess is the lead's, and no row runs that a slot holds."""
    cut, rng = model("llama"), random.Random(5)
    engine = cut.engine(chunk=8)
    texts = [list(PROMPT[: 3 + slot]) for slot in range(4)]
    held: list[list[int]] = [[] for _ in range(4)]
    for _ in range(40):
        if rng.random() < 0.3:
            source, target = rng.sample(range(4), 2)
            tokens = rng.randrange(len(held[source]) + 4)
            engine.copy(source, target, tokens)
            if held[target][: len(held[source][:tokens])] != held[source][:tokens]:
                held[target] = held[source][:tokens]
                texts[target] = [*held[target], *texts[target]][: max(1, len(held[target]))]
            continue
        asks = []
        for slot in rng.sample(range(4), rng.randrange(1, 5)):
            text = texts[slot]
            if rng.random() < 0.4:
                del text[rng.randrange(1, len(text) + 1) :]
            text += [rng.randrange(250) for _ in range(rng.choice((0, 1, 1, 2, 9)))]
            del text[30:]
            asks.append(Ask(slot, text, rng.choice(SAMPLINGS[:6])))
        guesses = engine.step(asks)
        rows = 0
        for ask, guess in zip(asks, guesses, strict=True):
            assert guess.tokens == (cut.draw(ask.tokens, ask.sampling),)
            rows += max(1, len(ask.tokens) - common_length(held[ask.slot], ask.tokens))
            held[ask.slot] = list(ask.tokens)
        assert engine.ran_rows == rows
        for slot in range(4):
            assert engine.held(slot, held[slot]) == len(held[slot])
    assert engine.ran_rows


def test_prompts_longer_than_a_pass_run_in_several(model, monkeypatch):
    cut = model("llama")
    engine = cut.engine(chunk=16)
    passes: list[list[int]] = []
    begin = Executor.begin

    def watched(self, entries, role="any"):
        passes.append([count for _, _, count in entries])
        return begin(self, entries, role)

    monkeypatch.setattr(Executor, "begin", watched)
    asks = [Ask(slot, (PROMPT * 3)[slot : slot + length], GREEDY) for slot, length in enumerate((40, 1, 25))]
    guesses = engine.step(asks)
    assert [guess.tokens[0] for guess in guesses] == [cut.draw(ask.tokens, GREEDY) for ask in asks]
    assert sum(map(sum, passes)) == 66
    assert all(sum(each) <= 16 for each in passes)
    assert len(passes[-1]) == 3  # one pass, and one of the head, for those that draw


def test_a_prompt_is_run_bit_by_bit_before_anything_is_asked(model):
    cut = model("llama")
    engine = cut.engine()
    asks = [Ask(0, PROMPT, GREEDY), Ask(1, PROMPT[:4], GREEDY)]
    left = [engine.lead_in(asks, rows) for rows in (5, 16, 16)]
    assert left == [len(PROMPT) - 1 + 3 - 5, 2, 0]
    assert engine.lead_in(asks, 16) == 0
    found = engine.step(asks)
    assert engine.ran_rows == 2
    assert [guess.tokens[0] for guess in found] == [cut.draw(ask.tokens, GREEDY) for ask in asks]


@pytest.mark.parametrize("sampling", SAMPLINGS[:6], ids=str)
def test_candidates_are_the_best_by_perturbed_score(model, sampling):
    cut = model("llama")
    engine = cut.engine()
    (guess,) = engine.step([Ask(0, PROMPT, sampling, top=5)])
    assert guess.tokens[0] == cut.draw(PROMPT, sampling)
    scores = cut.logits(PROMPT).astype(np.float64)
    if sampling.temperature:
        scores = scores / sampling.temperature
        kept = _dumb_filter(scores, sampling)
        ids = np.arange(scores.size, dtype=np.uint32)
        scores = np.where(kept, scores + noise(sampling.seed, len(PROMPT), ids), -np.inf)
    best = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > -np.inf][:5]
    assert list(guess.tokens) == best  # the likeliest 256 of 283 hold them all
    assert guess.scores == pytest.approx([scores[i] for i in best], rel=1e-9)
    again = engine.step([Ask(0, PROMPT, sampling)])[0]
    assert (again.tokens, again.scores) == (guess.tokens[:1], guess.scores[:1])


def _dumb_filter(scaled: np.ndarray, sampling: Sampling) -> np.ndarray:
    order = np.argsort(-scaled, kind="stable")
    kept = list(order[: sampling.top_k] if sampling.top_k else order)
    chances = np.exp(scaled[kept] - scaled[kept].max())
    chances /= chances.sum()
    before = np.cumsum(chances) - chances
    kept = [one for one, mass in zip(kept, before, strict=True) if mass < sampling.top_p]
    least = scaled.max() + np.log(sampling.min_p) if sampling.min_p else -np.inf
    found = np.zeros(scaled.size, bool)
    found[[one for one in kept if scaled[one] >= least]] = True
    return found


def test_what_a_drafter_cannot_tell_it_does_not_guess(model):
    cut = model("llama")
    engine = cut.engine(context=24)
    full = (PROMPT * 2)[:24]
    unknown = [*PROMPT, engine.vocab]
    found = engine.step([Ask(0, full, GREEDY), Ask(1, full[:23], GREEDY), Ask(2, unknown, GREEDY)])
    assert [guess.tokens for guess in found] == [(), (cut.draw(full[:23], GREEDY),), ()]
    assert engine.step([Ask(0, full, GREEDY)])[0].tokens == ()
    assert engine.step([Ask(0, full[:-1], GREEDY)])[0].tokens == found[1].tokens
    assert engine.step([]) == []
    assert cut.engine(context=10**6).context == cut.manifest.geometry.context


def test_asks_that_are_none_are_refused(model):
    engine = model("llama").engine()
    for asks in (
        [Ask(4, PROMPT, GREEDY)],
        [Ask(-1, PROMPT, GREEDY)],
        [Ask(0, [], GREEDY)],
        [Ask(0, PROMPT, GREEDY, top=0)],
        [Ask(0, PROMPT, GREEDY), Ask(0, PROMPT[:2], GREEDY)],
    ):
        with pytest.raises(Internal):
            engine.step(asks)
    for source, target in ((0, 4), (4, 0)):
        with pytest.raises(Internal):
            engine.copy(source, target, 1)


def test_memory_is_of_what_slots_hold(model):
    engine = model("llama").engine(slots=2, context=1024, chunk=128)
    grain = 512 * 2 * 4 * 4 * 16 * 3  # keys and values, float32, groups, head size, layers
    assert engine.kv_bytes == 0
    engine.step([Ask(0, PROMPT, GREEDY)])
    assert engine.kv_bytes == grain
    long = (PROMPT * 30)[:600]
    engine.step([Ask(0, long, GREEDY)])
    assert engine.kv_bytes == 2 * grain
    engine.copy(0, 1, 512)
    assert engine.kv_bytes == 3 * grain
    engine.copy(0, 1, 600)
    assert engine.kv_bytes == 4 * grain
    expected = engine.step([Ask(0, long, GREEDY)])[0]
    assert engine.step([Ask(1, long, GREEDY)]) == [expected]
    assert engine.ran_rows == 1
    engine.forget(0)
    engine.copy(0, 1, 5)  # of what is not held there is nothing
    assert engine.held(1, long) == 600
    engine.forget(1)
    engine.forget(1)
    assert engine.kv_bytes == 0


def test_a_pass_that_fails_leaves_its_slots_empty(model, monkeypatch):
    cut = model("llama")
    engine = cut.engine()
    engine.step([Ask(0, PROMPT, GREEDY), Ask(1, PROMPT, GREEDY)])
    run, calls = Executor.run, []

    def failing(self, batch, index):
        calls.append(index)
        if index == 3:
            raise RuntimeError("no more")
        return run(self, batch, index)

    longer = [*PROMPT, 7]
    with monkeypatch.context() as patched:
        patched.setattr(Executor, "run", failing)
        with pytest.raises(RuntimeError, match="no more"):
            engine.step([Ask(0, longer, GREEDY)])
    assert calls == [0, 1, 2, 3]
    assert (engine.held(0, PROMPT), engine.held(1, PROMPT)) == (0, len(PROMPT))
    assert engine.step([Ask(0, longer, GREEDY)])[0].tokens == (cut.draw(longer, GREEDY),)


def test_where_formats_mix_long_runs_go_through_the_format_of_prompts(model, monkeypatch):
    cut = model("llama", "mixed")
    engine = cut.engine(chunk=64)
    roles: list[tuple[str, int]] = []
    begin = Executor.begin

    def watched(self, entries, role="any"):
        roles.append((role, sum(count for _, _, count in entries)))
        return begin(self, entries, role)

    monkeypatch.setattr(Executor, "begin", watched)
    (found,) = engine.step([Ask(0, PROMPT, GREEDY)])
    assert roles == [("prompt", len(PROMPT) - 1), ("generated", 1)]
    logits = cut.logits(PROMPT, prompt=len(PROMPT) - 1)
    assert found.tokens == (int(logits.argmax()),)
    text = [*PROMPT, *found.tokens, 3]
    (found,) = engine.step([Ask(0, text, GREEDY)])
    assert roles[2:] == [("generated", 2)]
    assert found.tokens == (int(cut.logits(text, prompt=len(PROMPT) - 1).argmax()),)


def test_lengths_in_common_are_those_of_a_loop():
    rng = random.Random(1)
    for _ in range(300):
        held = [rng.randrange(2) for _ in range(rng.randrange(12))]
        tokens = [*held[: rng.randrange(13)], *(rng.randrange(2) for _ in range(rng.randrange(5)))]
        dumb = next((at for at, pair in enumerate(zip(held, tokens, strict=False)) if pair[0] != pair[1]), None)
        assert common_length(held, tuple(tokens)) == (min(len(held), len(tokens)) if dumb is None else dumb)
