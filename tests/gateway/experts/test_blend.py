"""The blend's draw against a dumb, dense one: the same tokens, however little of the distributions was told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from dense_mixture import draw_dense, exact_sum

from ganglion.gateway.experts.blend import Asking, Chosen, next_token
from ganglion.gateway.experts.mixture import Mixture, Row, learn, read_row
from ganglion.proto import lane_pb2
from ganglion.wire.errors import ProtocolViolation
from ganglion.wire.sampling.adjusting import NO_ADJUSTMENTS, Adjustments
from ganglion.wire.sampling.parameters import Sampling

VOCAB = 300


def told(logits: np.ndarray, candidates: int, position: int) -> lane_pb2.Scored:
    order = np.lexsort((np.arange(logits.size), -logits))[:candidates]
    return lane_pb2.Scored(
        position=position, ids=order.tolist(), logits=logits[order].tolist(), log_sum_exp=exact_sum(logits)
    )


def answered(logits: np.ndarray, ids: np.ndarray | None, position: int) -> lane_pb2.Scored:
    return lane_pb2.Scored(
        position=position,
        ids=() if ids is None else ids.tolist(),
        logits=(logits if ids is None else logits[ids]).tolist(),
        log_sum_exp=exact_sum(logits),
        asked=True,
    )


def blended(
    rows: Sequence[np.ndarray],
    weights: Sequence[float],
    sampling: Sampling,
    adjustments: Adjustments = NO_ADJUSTMENTS,
    *,
    candidates: int = 8,
    position: int = 5,
) -> tuple[Chosen, list[Asking]]:
    """The token, and what was asked for it."""
    known: list[Row] = [
        read_row(told(row, candidates, position), position=position, vocab=row.size, candidates=candidates)
        for row in rows
    ]
    asked: list[Asking] = []
    while True:
        found = next_token(Mixture(known, weights), sampling, adjustments, position)
        if isinstance(found, Chosen):
            return found, asked
        asked.append(found)
        assert len(asked) <= 3
        assert any(ids is None or ids.size for ids in found.ids)
        for at, (row, ids) in enumerate(zip(rows, found.ids, strict=True)):
            if ids is None or ids.size:
                known[at] = learn(known[at], answered(row, ids, position), position=position, asked=ids)


def f32(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)


def random_rows(rng: np.random.Generator, kind: str, count: int) -> list[np.ndarray]:
    if kind == "alike":
        base = rng.normal(size=VOCAB) * 3
        return [f32(base + rng.normal(size=VOCAB) * 0.5) for _ in range(count)]
    if kind == "apart":  # nobody lists what another likes
        rows = [rng.normal(size=VOCAB) for _ in range(count)]
        for at, row in enumerate(rows):
            row[at * 20 : at * 20 + 12] += 8.0
        return [f32(row) for row in rows]
    if kind == "middling":  # best in the mixture is what is best for nobody
        rows = [rng.normal(size=VOCAB) * 0.1 for _ in range(count)]
        for at, row in enumerate(rows):
            row[at * 20 : at * 20 + 10] += 5.0
            row[250:255] += 4.9
        return [f32(row) for row in rows]
    if kind == "flat":
        return [np.zeros(VOCAB, np.float32) + np.float32(at) for at in range(count)]
    if kind == "ties":
        return [f32(np.round(rng.normal(size=VOCAB) * 2)) for _ in range(count)]
    if kind == "certain":
        rows = [rng.normal(size=VOCAB) for _ in range(count)]
        for row in rows:
            row[int(rng.integers(VOCAB))] += 40.0
        return [f32(row) for row in rows]
    if kind == "steep":
        return [f32(rng.normal(size=VOCAB) * 300 - 1000) for _ in range(count)]
    assert kind == "shorter"
    return [f32(rng.normal(size=VOCAB - 30 * at) * 2) for at in range(count)]


KINDS = ("alike", "apart", "middling", "flat", "ties", "certain", "steep", "shorter")
SAMPLINGS = {
    "greedy": Sampling(top_logprobs=3),
    "0.7": Sampling(temperature=0.7),
    "1": Sampling(temperature=1.0, top_logprobs=0),
    "1.8": Sampling(temperature=1.8),
    "top-p": Sampling(temperature=1.0, top_p=0.9),
    "0.7 top-p": Sampling(temperature=0.7, top_p=0.9),
    "1.5 top-p": Sampling(temperature=1.5, top_p=0.8),
    "top-k": Sampling(temperature=1.0, top_k=5),
    "top-k all": Sampling(temperature=1.0, top_k=290, top_p=0.99),
    "min-p": Sampling(temperature=0.8, min_p=0.05),
    "all filters": Sampling(temperature=1.2, top_k=20, top_p=0.95, min_p=0.02),
    "top-p min-p": Sampling(temperature=1.0, top_p=0.9, min_p=0.1),
}


def near_edges(rows, weights, sampling, adjustments, position) -> bool:
    """Whether another order of additions may decide otherwise: the dumb one differs from itself by 1e-9."""
    moved = Sampling(
        sampling.temperature, sampling.top_k, sampling.top_p * (1 - 1e-9), sampling.min_p * (1 - 1e-9), sampling.seed
    )
    other = Sampling(
        sampling.temperature,
        sampling.top_k,
        min(1.0, sampling.top_p * (1 + 1e-9)),
        sampling.min_p * (1 + 1e-9),
        sampling.seed,
    )
    found = {draw_dense(rows, weights, one, adjustments, position=position)[0] for one in (moved, other)}
    return len(found) > 1


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_token_is_that_of_the_dense_mixture(kind: str, sampling: Sampling) -> None:
    rng, near, asks = np.random.default_rng(11), 0, 0
    for trial in range(24):
        count = 1 + trial % 3
        rows = random_rows(rng, kind, count)
        weights = rng.dirichlet(np.ones(count))
        used = Sampling(
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.min_p,
            seed=trial,
            top_logprobs=sampling.top_logprobs,
            repetition_penalty=1.3,
        )
        adjustments = NO_ADJUSTMENTS
        if trial % 2:
            chosen = rng.choice(VOCAB, 6, replace=False)
            adjustments = Adjustments.of(
                [(int(one), float(rng.normal() * 3), bool(at % 2), 0.5 * (at % 3)) for at, one in enumerate(chosen)]
            )
            adjustments = adjustments.chosen(adjustments.ids < min(row.size for row in rows))
        candidates = (1, 8, 40)[trial % 3]
        found, asked = blended(rows, weights, used, adjustments, candidates=candidates, position=trial)
        token, logprob = draw_dense(rows, weights, used, adjustments, position=trial)
        asks += len(asked)
        if found.token != token:
            assert found.near or near_edges(rows, weights, used, adjustments, trial), (trial, count, found, token)
            near += 1
            continue
        assert found.logprob == pytest.approx(logprob, abs=1e-9)
        if used.top_logprobs > 0:
            assert [one for _, one in found.top] == sorted((one for _, one in found.top), reverse=True)
            assert len(found.top) == 3
    # Where logits are equal by design the additions' order decides; elsewhere nothing is near.
    assert near <= (24 if kind in ("flat", "ties") else 0)


def test_nothing_is_asked_where_the_lists_decide() -> None:
    rng = np.random.default_rng(3)
    rows = random_rows(rng, "alike", 2)
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(temperature=1.0, top_p=0.5)):
        _, asked = blended(rows, (0.5, 0.5), sampling, candidates=40)
        assert asked == []


def test_what_may_win_is_asked_for_and_no_more() -> None:
    """Each expert lists what the other does not: its own best is asked of the other, and of nobody else's."""
    rows = [np.zeros(VOCAB, np.float32), np.zeros(VOCAB, np.float32)]
    rows[0][7], rows[1][9], rows[0][100], rows[1][100] = 3.0, 3.0, 2.9, 2.9
    found, asked = blended(rows, (0.5, 0.5), Sampling(), candidates=1)
    assert found.token == 100  # nobody's first
    assert [ids is None for ids in asked[-1].ids] == [True, True]
    rows[0][7] = 9.0
    found, asked = blended(rows, (0.5, 0.5), Sampling(), candidates=3)
    assert found.token == 7
    assert [[ids.tolist() for ids in one.ids if ids is not None] for one in asked] == [[[9], [7]]]


def test_one_expert_is_decided_by_its_own_float32() -> None:
    row = np.zeros(VOCAB, np.float32)
    row[5] = np.nextafter(np.float32(4.0), np.float32(5.0))
    row[3] = np.float32(4.0)
    assert blended([row], (1.0,), Sampling())[0].token == 5
    adjustments = Adjustments.of([(5, 0.0, True, 0.0), (3, 0.0, True, 0.0)])
    penalized = Sampling(repetition_penalty=1.3)
    expected = (np.float32(4.0) / np.float32(1.3), row[5] / np.float32(1.3))
    token = 5 if expected[1] > expected[0] else 3  # equal in float32: the lower id
    assert blended([row], (1.0,), penalized, adjustments)[0].token == token


def test_near_ties_are_counted() -> None:
    rows = [np.zeros(VOCAB, np.float32) for _ in range(2)]
    rows[0][4] = rows[1][4] = rows[0][90] = rows[1][90] = 5.0
    found, _ = blended(rows, (0.3, 0.7), Sampling())
    assert (found.token, found.near) == (4, True)
    rows[0][90] = 5.1
    found, _ = blended(rows, (0.3, 0.7), Sampling())
    assert (found.token, found.near) == (90, False)


def scored(**changes: object) -> lane_pb2.Scored:
    row = f32(np.random.default_rng(0).normal(size=VOCAB))
    message = told(row, 8, 5)
    for name, value in changes.items():
        if name in ("ids", "logits"):
            del getattr(message, name)[:]
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"position": 6}, "position 6, expected one of 5"),
        ({"asked": True}, "expected"),
        ({"logits": [math.nan] * 8}, "not all of its figures are finite"),
        ({"log_sum_exp": math.inf}, "finite"),
        ({"logits": [1.0] * 7}, "7 logits of 8"),
        ({"ids": [1, 2, 3, 4, 5, 6, 7, 300]}, "up to 300"),
        ({"ids": [1, 2, 3, 4, 5, 6, 7, 7]}, "more than once"),
        ({"ids": []}, "0 ids"),
        ({"log_sum_exp": 0.5}, "add up to"),
    ],
    ids=str,
)
def test_nonsense_is_refused(changes: dict[str, object], words: str) -> None:
    read_row(scored(), position=5, vocab=VOCAB, candidates=8)
    with pytest.raises(ProtocolViolation, match=words):
        read_row(scored(**changes), position=5, vocab=VOCAB, candidates=8)


def test_an_answer_that_does_not_go_with_what_was_told_is_refused() -> None:
    row = f32(np.random.default_rng(0).normal(size=VOCAB))
    known = read_row(told(row, 8, 5), position=5, vocab=VOCAB, candidates=8)
    ids = np.setdiff1d(np.arange(20), known.ids)
    good = answered(row, ids, 5)
    assert learn(known, good, position=5, asked=ids).ids.size == 8 + ids.size
    for change, words in (
        (lambda one: one.ids.__setitem__(0, 250), "not the"),
        (lambda one: one.logits.__setitem__(0, math.nan), "finite"),
        (lambda one: one.logits.__setitem__(0, 50.0), "does not go with"),
        (lambda one: setattr(one, "position", 4), "position"),
        (lambda one: setattr(one, "asked", False), "not the answer"),
        (lambda one: setattr(one, "log_sum_exp", 1.0), "not the answer"),
    ):
        bad = lane_pb2.Scored()
        bad.CopyFrom(good)
        change(bad)
        with pytest.raises(ProtocolViolation, match=words):
            learn(known, bad, position=5, asked=ids)
    whole = learn(known, answered(row, None, 5), position=5, asked=None)
    assert (whole.complete, whole.edge) == (True, -math.inf)
    bad = answered(row + 1, None, 5)
    bad.log_sum_exp = known.log_sum_exp
    with pytest.raises(ProtocolViolation, match="does not go with"):
        learn(known, bad, position=5, asked=None)
