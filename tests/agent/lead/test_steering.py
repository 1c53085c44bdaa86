"""Bias, penalties and masks over any split, against transformers' processors and a dumb draw over whole logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ganglion.agent.lead import candidates, sampler
from ganglion.agent.lead.draw import Draw, read_draw, write_draw
from ganglion.agent.lead.steering import Steering
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.sampling import noise
from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjusting, Adjustments, VocabShare
from ganglion.wire.sampling.parameters import Sampling
from ganglion.wire.sampling.penalties import Penalties

VOCAB, GROUP_ROWS = 101, 8
SPLITS = ((), (3, 4), (1, 11))
FILTERS = [
    Sampling(0.0),
    Sampling(0.7),
    Sampling(30.0),
    Sampling(1.0, top_k=3),
    Sampling(1.3, top_p=0.7),
    Sampling(1.0, top_p=0.9999),
    Sampling(0.8, min_p=0.2),
    Sampling(1.0, top_k=40, top_p=0.8, min_p=0.01),
]


class Masks:
    """In the place of a grammar's constraint: any masks at all."""

    def __init__(self, masks: Sequence[np.ndarray]) -> None:
        self._masks = list(masks)

    @property
    def allowed(self) -> np.ndarray:
        return self._masks[0]

    def take(self, _token: int) -> bool:
        self._masks.pop(0)
        return not self._masks

    def ahead(self, tokens: Sequence[int]) -> list[np.ndarray]:
        found = []
        for before, token, after in zip(self._masks, tokens, self._masks[1:], strict=False):
            if not before[token]:
                break
            found.append(after)
        return found


class Fleet:
    """A lead and its shares: questions and answers pass as bytes, and every share holds what it was told."""

    def __init__(self, cuts: tuple[int, ...], steering: Steering) -> None:
        edges = [0, *(cut * GROUP_ROWS for cut in cuts), VOCAB]
        self.shares = {rank: VocabShare(a, b - a, GROUP_ROWS) for rank, (a, b) in enumerate(pairwise(edges))}
        self.steering = steering
        self.held = dict.fromkeys(self.shares, NO_ADJUSTMENTS)
        self.told = 0

    def draw(self, logits: np.ndarray, sampling: Sampling, position: int) -> sampler.Drawn:
        return self.answer(self.steering.ask(self.shares)[0], logits, sampling, position)

    def draw_window(
        self, rows: Sequence[np.ndarray], sampling: Sampling, position: int, window: Sequence[int]
    ) -> list[sampler.Drawn]:
        """What each row draws when the tokens of the window came before it."""
        asked = self.steering.ask(self.shares, window)
        return [self.answer(one, rows[at], sampling, position + at) for at, one in enumerate(asked)]

    def answer(self, asked_of_row: Any, logits: np.ndarray, sampling: Sampling, position: int) -> sampler.Drawn:
        kind = (sampling.temperature, sampling.seed, position, sampling.top_logprobs, sampling.mass)
        asked, heard = {}, {}
        for rank, (adjusting, newer) in asked_of_row.items():
            asked[rank] = Draw(min(4, sampling.candidates), *kind, adjusting)  # few, so that more are asked for
            message = lane_pb2.Draw()
            write_draw(asked[rank], newer, self.shares[rank], message)
            self.told = len(message.adjustments.gaps)
            message = lane_pb2.Draw.FromString(message.SerializeToString())
            heard[rank] = read_draw(message, self.shares[rank], self.held[rank])
            if heard[rank].adjusting is not None:
                self.held[rank] = heard[rank].adjusting.adjustments
        while True:
            answers = []
            for rank, share in self.shares.items():
                reply = candidates.answer(logits[share.first : share.first + share.count], share, heard[rank])
                sent = candidates.to_message(reply, heard[rank]).SerializeToString()
                answers.append(candidates.from_message(lane_pb2.Candidates.FromString(sent), share, asked[rank]))
            found = sampler.draw_token(answers, sampling, position)
            if isinstance(found, sampler.Drawn):
                return found
            assert found.candidates > asked[0].candidates
            asked = {rank: replace(one, candidates=found.candidates) for rank, one in asked.items()}
            heard = {rank: replace(one, candidates=found.candidates) for rank, one in heard.items()}


def processed(logits: np.ndarray, sampling: Sampling, prompt: list[int], given_: list[int], mask: np.ndarray | None):
    """The adjusted logits of the whole vocabulary, by transformers' processors where they exist."""
    scores, seen = torch.from_numpy(logits)[None], torch.tensor([prompt + given_])
    if sampling.logit_bias:
        scores = SequenceBiasLogitsProcessor({(i,): b for i, b in sampling.logit_bias})(seen, scores)
    if sampling.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(seen, scores)
    adjusted = scores[0].numpy().copy()
    for token in set(given_):
        subtract = sampling.presence_penalty + sampling.frequency_penalty * given_.count(token)
        adjusted[token] -= np.float32(subtract)
    if mask is not None:
        adjusted[~mask] = -np.inf
    return adjusted


def dumb_draw(adjusted: np.ndarray, sampling: Sampling, position: int) -> int:
    """The filters, written as their definitions over the tokens that may be drawn, then the noise."""
    order = sorted(np.flatnonzero(np.isfinite(adjusted)).tolist(), key=lambda i: (-adjusted[i], i))
    if not sampling.temperature:
        return order[0]
    scaled = adjusted.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        level = scaled[order[min(sampling.top_k, len(order)) - 1]]
        order = [i for i in order if scaled[i] >= level]
    if sampling.top_p < 1.0:
        weights = np.exp(scaled[order] - scaled[order[0]])
        above = np.concatenate(([0.0], np.cumsum(weights)[:-1])) / weights.sum()
        order = [i for i, mass in zip(order, above, strict=True) if mass < sampling.top_p]
    if sampling.min_p:
        order = [i for i in order if math.exp(scaled[i] - scaled[order[0]]) >= sampling.min_p]
    kept = sorted(order)
    scores = scaled[kept] + noise.noise(sampling.seed, position, np.array(kept, np.uint32))
    return kept[int(scores.argmax())]


tokens = st.integers(0, VOCAB - 1)
biases = st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 0.1, 3.0, 100.0]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    filters=st.sampled_from(FILTERS),
    repetition=st.sampled_from([1.0, 1.3, 0.6, 50.0]),
    presence=st.sampled_from([0.0, 1.2, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -0.7]),
    bias=biases,
    prompt=st.lists(tokens, min_size=1, max_size=30),
    density=st.sampled_from([None, 1, 3, 60]),
    top_logprobs=st.sampled_from([-1, 0, 4]),
    ties=st.booleans(),
)
def test_every_split_draws_what_the_reference_draws(
    seed, filters, repetition, presence, frequency, bias, prompt, density, top_logprobs, ties
):
    rng, steps = np.random.default_rng(seed), 5
    sampling = replace(
        filters,
        seed=seed,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
        top_logprobs=top_logprobs,
    )
    base = rng.standard_normal(VOCAB) * rng.choice([0.1, 3.0])  # steps are alike, so that tokens come again
    rows = (base + rng.standard_normal((steps, VOCAB)) * 0.2).astype(np.float32)
    rows = np.round(rows) if ties else rows
    masks = None
    if density is not None:
        masks = np.zeros((steps, VOCAB), np.bool_)
        for mask in masks:
            mask[rng.choice(VOCAB, density, replace=False)] = True
    found = []
    for cuts in SPLITS:
        fleet = Fleet(cuts, Steering(sampling, prompt, Masks(masks) if masks is not None else None))
        answer: list[sampler.Drawn] = []
        for step, logits in enumerate(rows):
            answer.append(fleet.draw(logits, sampling, len(prompt) + step))
            fleet.steering.drawn(answer[-1].token)
        found.append(answer)
    given_: list[int] = []
    for step, (logits, drawn) in enumerate(zip(rows, found[0], strict=True)):
        adjusted = processed(logits, sampling, prompt, given_, masks[step] if masks is not None else None)
        assert drawn.token == dumb_draw(adjusted, sampling, len(prompt) + step)
        if sampling.top_logprobs >= 0:
            raw = torch.log_softmax(torch.from_numpy(logits).double(), 0)
            assert drawn.logprob == pytest.approx(float(raw[drawn.token]), abs=1e-12)
            likeliest = sorted(range(VOCAB), key=lambda i: (-logits[i], i))[: sampling.top_logprobs]
            assert [one.token for one in drawn.top] == likeliest
        given_.append(drawn.token)
    assert all(other == found[0] for other in found)  # log-probabilities too, bit for bit


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    filters=st.sampled_from(FILTERS),
    repetition=st.sampled_from([1.0, 1.3]),
    presence=st.sampled_from([0.0, 0.7]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 2.5]), max_size=4),
    masked=st.booleans(),
    good=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_a_window_draws_what_its_tokens_draw_one_by_one(seed, filters, repetition, presence, bias, masked, good):
    """Some drafted tokens are right, some are not: what follows a wrong one is asked in vain, and leaves nothing."""
    rng, steps, prompt = np.random.default_rng(seed), 12, [3, 5, 5]
    sampling = replace(
        filters,
        seed=seed,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=presence / 2,
        logit_bias=tuple(bias.items()),
    )
    rows = (rng.standard_normal(VOCAB) + rng.standard_normal((steps, VOCAB)) * 0.2).astype(np.float32)
    masks = rng.random((steps + 1, VOCAB)) < 0.3 if masked else None
    if masks is not None:
        masks[:, 7] = True
    expected = []
    alone = Fleet((), Steering(sampling, prompt, Masks(masks) if masked else None))
    for step, logits in enumerate(rows):
        expected.append(alone.draw(logits, sampling, len(prompt) + step))
        alone.steering.drawn(expected[-1].token)
    for cuts in SPLITS:
        fleet, at, found = Fleet(cuts, Steering(sampling, prompt, Masks(masks) if masked else None)), 0, []
        while at < steps:
            window = [
                expected[one].token if good[one] else int(rng.integers(VOCAB))
                for one in range(at, min(at + int(rng.integers(0, 5)), steps - 1))
            ]
            window = list(fleet.steering.cut(window))
            drawn = fleet.draw_window(rows[at:], sampling, len(prompt) + at, window)
            assert len(drawn) == len(window) + 1
            accepted = 0
            while accepted < len(window) and drawn[accepted].token == window[accepted]:
                accepted += 1
            for one in drawn[: accepted + 1]:
                fleet.steering.drawn(one.token)
            found += drawn[: accepted + 1]
            at += accepted + 1
        assert found == expected


@pytest.mark.parametrize("sampling", [one for one in FILTERS if one.temperature])
def test_the_kept_set_is_that_of_transformers(sampling):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    rng = np.random.default_rng(4)
    sampling = replace(sampling, repetition_penalty=1.4)
    for density in (1, 2, 20, 90):
        logits = (rng.standard_normal(VOCAB) * 2).astype(np.float32)
        mask = np.zeros(VOCAB, np.bool_)
        mask[rng.choice(VOCAB, density, replace=False)] = True
        adjusted = processed(logits, sampling, [1, 2, 3], [], mask)
        warped = warpers(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(adjusted).double()[None])[0]
        kept = set(torch.isfinite(warped).nonzero().flatten().tolist())
        kind = (sampling.temperature, 0, 0, -1, sampling.mass)
        for cuts in SPLITS:
            steering, edges = (
                Steering(sampling, [1, 2, 3], Masks([mask])),
                [0, *(cut * GROUP_ROWS for cut in cuts), VOCAB],
            )
            shares = {rank: VocabShare(a, b - a, GROUP_ROWS) for rank, (a, b) in enumerate(pairwise(edges))}
            answers = [
                candidates.answer(logits[one.first : one.first + one.count], one, Draw(VOCAB, *kind, asked))
                for one, (asked, _) in zip(shares.values(), steering.ask(shares)[0].values(), strict=True)
            ]
            merged = sampler._Merged.of(answers)
            count = sampler._filter(merged, answers, sampling) if sampling.filtered else density
            assert set(merged.ids[:count].tolist()) == kept


@pytest.mark.parametrize("sampling", FILTERS)
@pytest.mark.parametrize("allowed", [[0], [VOCAB - 1], [40, 41], list(range(24, 32)), list(range(88, VOCAB))], ids=str)
def test_nothing_but_the_mask_is_drawn_even_from_one_share(sampling, allowed):
    mask = np.zeros(VOCAB, np.bool_)
    mask[allowed] = True
    logits = np.where(mask, -50.0, 50.0).astype(np.float32)  # the allowed are the least likely
    for cuts in SPLITS:
        fleet = Fleet(cuts, Steering(sampling, [1], Masks([mask])))
        assert {fleet.draw(logits, replace(sampling, seed=seed), 1).token for seed in range(5)} <= set(allowed)


def test_draws_from_a_mask_follow_its_softmax():
    rng = np.random.default_rng(0)
    logits, mask = rng.standard_normal(VOCAB).astype(np.float32), np.zeros(VOCAB, np.bool_)
    mask[[3, 30, 31, 60, 90, 100]] = True
    share = VocabShare(0, VOCAB, GROUP_ROWS)
    adjusting = Adjusting(1.0, NO_ADJUSTMENTS, mask)
    weights = np.where(mask, np.exp(logits.astype(np.float64) / 0.8), 0.0)
    expected, counts = 8_000 * weights / weights.sum(), np.zeros(VOCAB)
    for position in range(8_000):
        counts[candidates.answer(logits, share, Draw(0, 0.8, 77, position, adjusting=adjusting)).best_id] += 1
    assert counts[~mask].sum() == 0
    chi_square = float(((counts - expected)[mask] ** 2 / expected[mask]).sum())
    assert chi_square < 20.52  # 5 degrees of freedom, p = 0.001


def test_what_every_penalty_counts():
    sampling = Sampling(
        0.0, repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((7, 1.5), (4, -1.0))
    )
    penalties = Penalties(sampling, [4, 3, 3])

    def rows() -> list[tuple[int, float, bool, float]]:
        return list(zip(*(one.tolist() for one in dataclasses.astuple(penalties.take())), strict=True))

    assert rows() == [(3, 0.0, True, 0.0), (4, -1.0, True, 0.0), (7, 1.5, False, 0.0)]
    for token in (7, 7, 3):
        penalties.drawn(token)
    assert rows() == [(3, 0.0, True, 0.75), (7, 1.5, True, 1.0)]
    penalties.drawn(7)
    assert rows() == [(7, 1.5, True, 1.25)]
    assert rows() == []


def test_a_share_is_told_what_changed_and_nothing_else():
    sampling = Sampling(0.0, repetition_penalty=1.2, frequency_penalty=0.5, logit_bias=((7, 1.0),))
    fleet = Fleet((), Steering(sampling, [1, 2, 3, 2], None))
    told = []
    for step in range(3):
        drawn = fleet.draw(np.zeros(VOCAB, np.float32) + np.eye(VOCAB, dtype=np.float32)[9] * 90, sampling, step)
        fleet.steering.drawn(drawn.token)
        told.append(fleet.told)
    assert told == [4, 1, 1]
    assert fleet.held[0].ids.tolist() == [1, 2, 3, 7, 9]
    assert Steering(Sampling(0.0, presence_penalty=1.0), [5] * 40, None).ask(fleet.shares)[0][0][0] is None


def test_an_overflow_is_a_numeric_error():
    share = VocabShare(0, 3, 3)
    adjusting = Adjusting(1e3, Adjustments.of([(1, 0.0, True, 0.0)]), None)
    reply = candidates.answer(np.array([0, -3e38, 1], np.float32), share, Draw(0, 0.0, 0, 0, adjusting=adjusting))
    assert reply.numeric_error


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m.adjustments.gaps.__setitem__(1, 0),
        lambda m: m.adjustments.gaps.__setitem__(1, 11),
        lambda m: m.adjustments.gaps.__setitem__(0, 2**32 - 1),
        lambda m: m.adjustments.gaps.extend([1] * 10),
        lambda m: m.adjustments.gaps.append(1),
        lambda m: m.adjustments.bias.__setitem__(0, math.nan),
        lambda m: m.adjustments.bias.pop(),
        lambda m: m.adjustments.subtract.__setitem__(1, math.inf),
        lambda m: setattr(m.adjustments, "repeated", b"\x04"),
        lambda m: setattr(m.adjustments, "repeated", b"\x01\x00"),
        lambda m: setattr(m, "allowed", b"\x01"),
        lambda m: setattr(m, "allowed", b"\x01\x00\x00"),
        lambda m: setattr(m, "allowed", b"\x00\x10"),
        lambda m: setattr(m, "repetition_penalty", math.nan),
        lambda m: setattr(m, "repetition_penalty", -1.0),
        lambda m: setattr(m, "temperature", -1.0),
        lambda m: setattr(m, "temperature", math.nan),
    ],
)
def test_a_bad_question_is_refused(damage):
    share = VocabShare(8, 12, GROUP_ROWS)
    mask = np.arange(12) % 3 == 0
    adjusting = Adjusting(1.5, Adjustments.of([(11, 1.0, True, 0.0), (9, 0.0, False, 0.5)]), mask)
    message = lane_pb2.Draw()
    write_draw(Draw(5, 0.7, 1, 2, 3, True, adjusting), adjusting.adjustments, share, message)
    again = read_draw(message, share, NO_ADJUSTMENTS)
    assert replace(again, adjusting=None) == Draw(5, 0.7, 1, 2, 3, True)
    for one in dataclasses.fields(Adjustments):
        sent, read = (getattr(these, one.name) for these in (adjusting.adjustments, again.adjusting.adjustments))
        assert sent.dtype == read.dtype
        assert sent.tolist() == read.tolist()
    assert (again.adjusting.allowed == mask).all()
    with pytest.raises(ProtocolViolation):
        read_draw(message, None, NO_ADJUSTMENTS)  # a device without a share of the vocabulary
    damage(message)
    with pytest.raises(ProtocolViolation):
        read_draw(message, share, NO_ADJUSTMENTS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: setattr(m, "best_id", 1),
        lambda m: m.ids.__setitem__(0, 1),
        lambda m: m.ids.append(0),
        lambda m: m.raw_logits.pop(),
        lambda m: m.raw_logits.__setitem__(0, math.inf),
        lambda m: m.top_ids.pop(),
        lambda m: m.top_ids.__setitem__(0, 90),
        lambda m: m.top_logits.__setitem__(0, -90.0),
        lambda m: m.log_sum_exp.__setitem__(0, -math.inf),
        lambda m: m.scaled_log_sum_exp.__setitem__(0, math.nan),
    ],
)
def test_a_bad_answer_to_an_adjusted_draw_is_refused(damage):
    share, mask = VocabShare(0, 80, GROUP_ROWS), np.arange(80) % 2 == 0
    question = Draw(5, 0.7, 1, 2, 2, True, Adjusting(1.0, NO_ADJUSTMENTS, mask))
    message = candidates.to_message(candidates.answer(np.arange(80, dtype=np.float32), share, question), question)
    assert list(message.top_ids) == [79, 78]
    assert list(message.ids) == [78, 76, 74, 72, 70]
    candidates.from_message(message, share, question)
    damage(message)
    with pytest.raises(ProtocolViolation):
        candidates.from_message(message, share, question)
