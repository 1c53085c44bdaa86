"""The sampler against transformers' warpers, a dumb reference, softmax and itself under other splits."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ganglion.agent.lead import candidates, sampler
from ganglion.agent.lead.draw import Draw
from ganglion.proto import lane_pb2
from ganglion.wire.errors import InvalidRequest, ProtocolViolation
from ganglion.wire.sampling import noise
from ganglion.wire.sampling.adjusting import VocabShare
from ganglion.wire.sampling.parameters import Sampling, parse_sampling

GROUP_ROWS = 40


def split(vocab: int, cuts: tuple[int, ...]) -> list[VocabShare]:
    """Shares that end at the groups `cuts`; the last group is shorter when the vocabulary says so."""
    edges = [0, *(cut * GROUP_ROWS for cut in cuts), vocab]
    return [VocabShare(a, b - a, GROUP_ROWS) for a, b in pairwise(edges)]


def ask(sampling: Sampling, position: int, asked: int) -> Draw:
    kind = (sampling.temperature, sampling.seed, position, sampling.top_logprobs, sampling.mass)
    return Draw(asked, *kind)


def draw(logits: np.ndarray, shares: list[VocabShare], sampling: Sampling, position: int, wire: bool = True):
    """A draw as the lead and its shares make it; returns what was drawn and how often more was asked for."""
    asked, rounds = sampling.candidates, 0
    while True:
        question = ask(sampling, position, asked)
        answers = []
        for share in shares:
            reply = candidates.answer(logits[share.first : share.first + share.count], share, question)
            if wire:
                message = lane_pb2.Candidates.FromString(candidates.to_message(reply, question).SerializeToString())
                reply = candidates.from_message(message, share, question)
            answers.append(reply)
        found = sampler.draw_token(answers, sampling, position)
        if isinstance(found, sampler.Drawn):
            return found, rounds
        assert found.candidates > asked
        asked, rounds = found.candidates, rounds + 1


def dumb_kept(logits: np.ndarray, sampling: Sampling) -> list[int]:
    """The filters, written as their definitions, over the whole vocabulary."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = sorted(range(logits.size), key=lambda i: (-scaled[i], i))
    if sampling.top_k:
        level = scaled[order[min(sampling.top_k, logits.size) - 1]]
        order = [i for i in order if scaled[i] >= level]
    if sampling.top_p < 1.0:
        weights = np.exp(scaled[order] - scaled[order[0]])
        above = np.concatenate(([0.0], np.cumsum(weights)[:-1])) / weights.sum()
        order = [i for i, mass in zip(order, above, strict=True) if mass < sampling.top_p]
    if sampling.min_p:
        order = [i for i in order if math.exp(scaled[i] - scaled[order[0]]) >= sampling.min_p]
    return order


def dumb_draw(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    kept = sorted(dumb_kept(logits, sampling)) if sampling.temperature else list(range(logits.size))
    if not sampling.temperature:
        return int(logits.argmax())
    scores = logits[kept].astype(np.float64) / sampling.temperature
    scores = scores + noise.noise(sampling.seed, position, np.array(kept, np.uint32))
    return kept[int(scores.argmax())]


def dumb_hash(seed: int, position: int, token: int) -> int:
    def fmix(h: int) -> int:
        h ^= h >> 16
        h = h * 0x85EBCA6B % 2**32
        h ^= h >> 13
        h = h * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    first = fmix((fmix(fmix((seed % 2**32 + 0x9E3779B9) % 2**32) ^ seed >> 32) + position) % 2**32)
    second = fmix(first ^ 0x7F4A7C15)
    return fmix(fmix((token * 0x9E3779B1 + first) % 2**32) ^ second)


FILTERS = [
    Sampling(0.7, seed=3),
    Sampling(1.0, top_k=5, seed=4),
    Sampling(0.7, top_k=300, seed=4),
    Sampling(1.0, top_p=0.9, seed=5),
    Sampling(1.3, top_p=0.999, seed=6),
    Sampling(0.7, min_p=0.02, seed=7),
    Sampling(1.0, top_k=50, top_p=0.8, min_p=0.01, seed=2**63 + 5),
    Sampling(2.0, min_p=1e-9, top_p=0.9999, seed=8, top_logprobs=20),
    Sampling(0.0, top_k=4, top_logprobs=3),
]


def test_hash_is_the_documented_one():
    ids = np.array([0, 1, 2, 31_999, 128_255, 2**32 - 1], np.uint32)
    for seed, position in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 2**32 - 1), (2**32, 7)):
        assert noise.hashes(seed, position, ids).tolist() == [dumb_hash(seed, position, int(i)) for i in ids]
    assert noise.hashes(42, 7, np.array([0, 1, 2], np.uint32)).tolist() == HASHES_42_7


# A browser must find the same figures.
HASHES_42_7 = [369689546, 1914260815, 1727797067]


def test_uniform_is_strictly_inside():
    extremes = noise.from_hashes(np.array([0, 2**32 - 1], np.uint32))
    assert np.isfinite(extremes).all()
    assert extremes.tolist() == [noise.NOISE_MIN, noise.NOISE_MAX]


def test_hash_at_least_never_loses():
    for bound in np.linspace(-4.0, 23.0, 200):
        least = noise.hash_at_least(float(bound))
        if least:
            assert noise.from_hashes(np.array([least - 1], np.uint32))[0] < bound


@pytest.mark.parametrize("sampling", FILTERS)
def test_any_split_draws_what_the_dumb_reference_draws(sampling):
    rng = np.random.default_rng(1)
    vocab = 1003
    for position in range(12):
        logits = (rng.standard_normal(vocab) * rng.choice([0.1, 1.0, 4.0])).astype(np.float32)
        if position % 3 == 0:
            logits = np.round(logits)  # ties
        expected = dumb_draw(logits, sampling, position)
        found = [draw(logits, split(vocab, cuts), sampling, position)[0] for cuts in ((), (1, 24), (3, 4, 17), (12,))]
        assert found[0].token == expected
        assert all(one == found[0] for one in found)  # log-probabilities too, bit for bit


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_pruning_is_exact(temperature):
    rng = np.random.default_rng(2)
    for position in range(60):
        logits = (rng.standard_normal(3000) * rng.choice([0.01, 1.0, 6.0])).astype(np.float32)
        found, _ = draw(logits, split(3000, ()), Sampling(temperature, seed=9), position)
        assert found.token == dumb_draw(logits, Sampling(temperature, seed=9), position)


@pytest.mark.parametrize("sampling", [one for one in FILTERS if one.filtered])
def test_kept_set_is_transformers(sampling):
    rng = np.random.default_rng(3)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    for _ in range(10):
        logits = (rng.standard_normal(997) * 2).astype(np.float32)
        warped = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits).double()[None])[0]
        kept = set(torch.isfinite(warped).nonzero().flatten().tolist())
        shares = split(997, (3, 20))
        question = ask(sampling, 0, 1000)
        answers = [candidates.answer(logits[s.first : s.first + s.count], s, question) for s in shares]
        merged = sampler._Merged.of(answers)
        count = sampler._filter(merged, answers, sampling)
        assert set(merged.ids[:count].tolist()) == kept == set(dumb_kept(logits, sampling))


@pytest.mark.parametrize("sampling", FILTERS)
def test_ranks_begin_with_the_draw_and_are_the_dumb_ones_for_any_split(sampling):
    rng = np.random.default_rng(5)
    for position in range(20):
        logits = rng.normal(0, 2, 270).astype(np.float32).round(1)  # with ties
        kept, scores = np.arange(270, dtype=np.uint32), logits.astype(np.float64)
        if sampling.temperature:
            kept = np.array(sorted(dumb_kept(logits, sampling)), np.uint32)
            scores = scores[kept] / sampling.temperature + noise.noise(sampling.seed, position, kept)
        best = np.argsort(-scores, kind="stable")[:4]
        for cuts in ((), (2, 5)):
            shares = split(270, cuts)
            for most in (1, 4):
                question = ask(sampling, position, 270)
                rows = [logits[one.first : one.first + one.count] for one in shares]
                answers = [candidates.answer(row, one, question) for row, one in zip(rows, shares, strict=True)]
                found = sampler.rank_tokens(answers, sampling, position, most)
                assert [token for token, _ in found] == kept[best[:most]].tolist()
                assert [score for _, score in found] == pytest.approx(scores[best[:most]].tolist())
                drawn, _ = draw(logits, shares, sampling, position)
                assert found[0][0] == drawn.token


def test_more_is_asked_when_the_mass_is_short():
    logits = np.linspace(0.0, 1.0, 4000, dtype=np.float32)
    sampling = Sampling(1.0, top_p=0.95, seed=1)
    found, rounds = draw(logits, split(4000, (30,)), sampling, 0)
    assert rounds > 0
    assert found.token == dumb_draw(logits, sampling, 0)


def test_draws_follow_softmax():
    logits = np.array([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5], np.float32)
    weights = np.exp(logits.astype(np.float64) / 0.8)
    expected = 20_000 * weights / weights.sum()
    counts = np.zeros(7)
    for position in range(20_000):
        reply = candidates.answer(logits, VocabShare(0, 7, 7), Draw(0, 0.8, 77, position))
        counts[reply.best_id] += 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 22.46  # 6 degrees of freedom, p = 0.001
    assert ((counts - expected[::-1]) ** 2 / expected[::-1]).sum() > 1000  # and the test can fail


def test_numeric_error_is_reported():
    for poison in (np.nan, np.inf, -np.inf):
        logits = np.zeros(50, np.float32)
        logits[7] = poison
        assert candidates.answer(logits, VocabShare(0, 50, 50), Draw(0, 0.0, 0, 0)).numeric_error


def test_logprobs_are_of_the_raw_distribution():
    logits = np.random.default_rng(5).standard_normal(500).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    found, _ = draw(logits, split(500, (4,)), Sampling(0.5, top_k=3, seed=2, top_logprobs=5), 3)
    assert found.logprob == pytest.approx(float(expected[found.token]), abs=1e-12)
    assert [one.token for one in found.top] == expected.topk(5).indices.tolist()
    assert [one.logprob for one in found.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-12)


def test_top_indices_against_sorted():
    rng = np.random.default_rng(6)
    for count in (1, 7, 99, 100, 500):
        logits = np.round(rng.standard_normal(100) * 2).astype(np.float32)
        expected = sorted(range(100), key=lambda i: (-logits[i], i))[:count]
        assert candidates.top_indices(logits, count).tolist() == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.ids.pop(),
        lambda m: m.log_sum_exp.append(1.0),
        lambda m: m.ids.__setitem__(0, 4000),
        lambda m: m.logits.__setitem__(0, math.nan),
        lambda m: m.logits.__setitem__(0, -50.0),
        lambda m: m.ids.__setitem__(1, m.ids[0]),
        lambda m: setattr(m, "best_id", 90),
        lambda m: setattr(m, "best_score", math.inf),
        lambda m: m.scaled_log_sum_exp.pop(),
        lambda m: m.scaled_log_sum_exp.__setitem__(0, -math.inf),
    ],
)
def test_a_bad_answer_is_refused(damage):
    share, question = VocabShare(0, 80, GROUP_ROWS), Draw(5, 0.7, 1, 2, top_logprobs=2, mass=True)
    message = candidates.to_message(candidates.answer(np.arange(80, dtype=np.float32), share, question), question)
    candidates.from_message(message, share, question)
    damage(message)
    with pytest.raises(ProtocolViolation):
        candidates.from_message(message, share, question)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", 1e-9),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", math.nan),
        ("top_logprobs", 21),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", 1e9),
        ("presence_penalty", 2.5),
        ("frequency_penalty", math.nan),
        ("frequency_penalty", -2.1),
    ],
)
def test_sampling_out_of_range_is_refused_by_name(field, value):
    message = lane_pb2.Sampling(temperature=1.0, top_p=1.0, top_logprobs=-1)
    assert parse_sampling(message, 283) == Sampling(1.0)
    setattr(message, field, value)
    with pytest.raises(InvalidRequest) as caught:
        parse_sampling(message, 283)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("biases", "words"),
    [
        ([(283, 1.0)], "283"),
        ([(i, 1.0) for i in range(1025)], "at most 1024"),
        ([(4, 101.0)], "101"),
        ([(4, math.nan)], "nan"),
        ([(4, 1.0), (4, 2.0)], "more than once"),
    ],
)
def test_a_bias_out_of_range_is_refused_by_name(biases, words):
    message = lane_pb2.Sampling(temperature=1.0, top_p=1.0, top_logprobs=-1)
    message.logit_bias.extend(lane_pb2.TokenBias(id=token, bias=bias) for token, bias in biases)
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse_sampling(message, 283)
    assert caught.value.param == "logit_bias"
