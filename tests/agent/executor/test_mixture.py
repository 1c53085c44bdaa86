"""Whole experts on one device, in batches and apart, against the dumb runner; routes; what plans may not say."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from reference_runner import Runner, cut_evenly
from torch_cuts import Cut, Run, cutter, tokens_of

from ganglion.agent.executor.choice import load_torch, parse_executor
from ganglion.agent.executor.executor import Executor
from ganglion.agent.executor.loader import load_shard
from ganglion.agent.executor.mixing import mix, mix_each
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.agent.store import needed_pieces
from ganglion.partitioner.classes import NO_RULES
from ganglion.partitioner.quantize import Rules, parse_format
from ganglion.wire.errors import Internal, InvalidDocument, ProtocolViolation
from ganglion.wire.nouns import Plan, Range, Stage
from ganglion.wire.shares import every_expert

FAMILIES = ["mixtral", "olmoe", "qwen3-moe", "gpt-oss", "deepseek-groups"]


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory):
    get = cutter(tmp_path_factory.mktemp)
    return lambda shape, weights="fp32", fast=False, rules=NO_RULES: get(shape, weights, fast, "whole", rules)


def dumb(cut: Cut) -> Runner:
    cut.opened += 1
    pieces = SimpleNamespace(file=cut.store.path_of)
    return Runner(cut.manifest, pieces, cut.folder / f"r{cut.opened}", cut_evenly(cut.manifest, (1,)))


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("shape", FAMILIES)
def test_any_chunking_and_any_batch_has_the_bits_of_rows_run_alone(cuts, shape, weights):
    cut = cuts(shape, weights)
    ids = tokens_of(cut, 40)
    expected, _ = dumb(cut).forward(ids)
    run = cut.run("ort")
    for session, chunks in enumerate(([40], [1] * 5 + [2, 33], [7, 1, 32])):
        assert np.array_equal(run.sequence(ids, chunks, session), expected)
    other = tokens_of(cut, 20, 1)
    alone = run.sequence(other, [20], 7)
    mixed = run.step([(8, 0, 13), (9, 0, 20)], [*ids[:13], *other])
    assert np.array_equal(mixed, np.concatenate((expected[:13], alone)))


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("shape", FAMILIES[:5])
def test_fast_classes_are_near(cuts, shape, weights):
    cut = cuts(shape, weights, True)
    ids = tokens_of(cut, 30)
    expected, _ = dumb(cut).forward(ids)
    found = cut.run("ort").sequence(ids, [13, 1, 16])
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def spread(cut: Cut, devices: int) -> Plan:
    """A lead with all but experts; they lie in turn on all devices, the last of each layer on two, none on a fourth."""
    plan = cut.plan((1, *[0] * (devices - 1)))
    every = every_expert(cut.manifest.layers)

    def held(rank: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted({*one[rank :: min(devices, 3)], *(one[-1:] if rank < 2 else ())})) for one in every)

    shares = tuple(
        msgspec.structs.replace(share, experts=held(rank) if rank < 3 else tuple(() for _ in every))
        for rank, share in enumerate(plan.stages[0].shares)
    )
    return msgspec.structs.replace(plan, stages=(msgspec.structs.replace(plan.stages[0], shares=shares),))


def loaded(cut: Cut, plan: Plan, kind: str = "ort", **more) -> list:
    """The executors of a plan's shares."""
    (stage,) = plan.stages
    found = []
    for share in stage.shares:
        cut.opened += 1
        if kind != "ort":
            options = {"open_piece": cut.store.open, "progress": lambda *_: None}
            found.append(load_torch(cut.manifest, plan, stage, share, parse_executor(kind), **options))
            continue
        opened = set()

        def open_piece(digest: str, seen: set[str] = opened) -> memoryview:
            seen.add(digest)
            return cut.store.open(digest)

        shard = load_shard(
            cut.manifest, stage, share, open_piece=open_piece, folder=cut.folder / f"s{cut.opened}",
            progress=lambda *_: None, **more,
        )  # fmt: skip
        found.append(Executor(cut.manifest, plan, shard, open_piece))
        if not more:
            own = {piece.digest for piece in needed_pieces(cut.manifest, plan, share.device)}
            aside = {one.digest for one in (*cut.manifest.embedding.pieces, *cut.manifest.tokenizer.values())}
            assert opened - aside == own - aside
    return found


def apart(cut: Cut, executors: list, ids: list[int], chunks: list[int]) -> np.ndarray:
    """Logits where rows travel to the experts' devices: an expert that lies on two gets some rows on each."""
    lead, start, found = executors[0], 0, []
    segments = [segment for layer in cut.manifest.layers for segment in layer.segments]
    noise = np.random.default_rng(4)
    for count in chunks:
        batch = lead.begin([(1, start, count)])
        cut.embedding.rows(ids[start : start + count], lead.residual(batch))
        for index, segment in enumerate(segments):
            if segment.axis != "experts":
                lead.run(batch, index)
                continue
            with pytest.raises(Internal, match="experts lie here: route its rows"):
                lead.run(batch, index)
            routed = lead.route(batch, index)
            row = np.repeat(np.arange(count), segment.experts)
            chosen, weights = routed.chosen.reshape(-1).copy(), routed.weights.reshape(-1).copy()
            rows, on = routed.rows.copy(), np.empty(len(row), int)
            for pair, expert in enumerate(chosen):
                on[pair] = noise.choice([at for at, one in enumerate(executors) if expert in one.held(index)])
            total = lead.leave(batch, index)
            for at in noise.permutation(len(executors)):
                pairs = noise.permutation(np.flatnonzero(on == at))
                place = np.searchsorted(executors[at].held(index), chosen[pairs])
                given = executors[at].experts(index, rows[row[pairs]], place)
                assert given.shape == (len(pairs), rows.shape[1])
                mix(given, row[pairs], weights[pairs], total)
        logits = [lead.logits(batch, range(at, min(at + 2, count))) for at in range(0, count, 2)]
        found.append(np.concatenate(logits))
        start += count
    return np.concatenate(found)[:, : cut.manifest.geometry.vocab]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("shape", FAMILIES)
def test_experts_on_several_devices_give_the_bits_of_one(cuts, shape, weights):
    cut = cuts(shape, weights)
    ids = tokens_of(cut, 30)
    expected, _ = dumb(cut).forward(ids)
    executors = loaded(cut, spread(cut, 4))
    assert np.array_equal(apart(cut, executors, ids, [17, 1, 12]), expected)
    holder = executors[1]
    assert (holder.kv_bytes, holder.sessions) == (0, 0)
    assert 0 < holder.weights_bytes < executors[0].weights_bytes


# Of every layer some experts, beside others in the class's own format; of gpt-oss's second layer all of them.
TWO_FORMATS = {
    "olmoe": ("model.layers.*.mlp.experts.[0146].*", "int8"),
    "gpt-oss": ("model.layers.[0-9].mlp.experts.[!1].*", "int8"),
    "deepseek-groups": ("model.layers.*.experts.*[05].*", "fp32"),
}


def two_formats(shape: str, block: int) -> Rules:
    pattern, form = TWO_FORMATS[shape]
    return Rules(((pattern, parse_format(f"{form}-{block}" if form == "int8" else form)),))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", TWO_FORMATS)
def test_experts_of_two_formats_lie_anywhere(cuts, shape, fast):
    cut = cuts(shape, "int4", fast, two_formats(shape, 16 if fast else 32))
    ids = tokens_of(cut, 30)
    expected, _ = dumb(cut).forward(ids)
    alone = cut.run("ort").sequence(ids, [17, 1, 12])
    there = apart(cut, loaded(cut, spread(cut, 4)), ids, [12, 1, 1, 16])
    near = 1e-2 * np.abs(expected).max()  # another last bit rounds a number to 8 bits otherwise, now and then
    for found in (alone, there):
        assert np.abs(found - expected).max() <= near if fast else np.array_equal(found, expected)
    torch = cut.run("torch:cpu:fp32").sequence(ids, [17, 1, 12])
    assert np.sqrt(((torch - expected) ** 2).mean() / (expected**2).mean()) <= 0.25


def test_what_is_sent_to_experts_that_do_not_lie_here_is_refused(cuts):
    cut = cuts("olmoe")
    lead, holder, *_ = loaded(cut, spread(cut, 4))
    index = 2
    assert holder.held(index) == (1, 4, 7, 8)
    hidden = cut.manifest.geometry.hidden
    for places in ([4], [-1, 0], [0, 0, 9]):
        with pytest.raises(ProtocolViolation, match="4 lie here"):
            holder.experts(index, np.zeros((len(places), hidden), np.float32), np.array(places))
    with pytest.raises(ProtocolViolation, match="2 rows for 1 places"):
        holder.experts(index, np.zeros((2, hidden), np.float32), np.array([0]))
    with pytest.raises(Internal, match="is not cut by experts"):
        holder.experts(0, np.zeros((1, hidden), np.float32), np.array([0]))
    assert not holder.experts(index, np.zeros((0, hidden), np.float32), np.zeros(0, np.int64)).size
    batch = lead.begin([(1, 0, 1)])
    with pytest.raises(Internal, match="is not cut by experts"):
        lead.route(batch, 0)


@pytest.mark.parametrize("kind", ["ort", "torch:cpu:fp32"])
def test_routes_are_told_layer_by_layer(cuts, kind):
    cut = cuts("deepseek-lite")
    ids = tokens_of(cut, 20)
    told: list[tuple[int, np.ndarray]] = []
    (executor,) = loaded(cut, cut.plan(), kind)
    executor.on_routes = lambda layer, chosen: told.append((layer, chosen.copy()))
    Run(cut, [executor]).sequence(ids, [15, 5])
    sparse = [number for number, layer in enumerate(cut.manifest.layers) if layer.segments[-1].axis == "experts"]
    assert [layer for layer, _ in told] == sparse * 2
    for _, chosen in told:
        assert chosen.shape[1] == 3 + 2
        assert (chosen[:, 3:] == [7, 8]).all()  # the shared ones
        assert all(len(set(row)) == 5 and max(row[:3]) < 7 for row in chosen.tolist())


def test_a_stage_of_a_pipeline_holds_the_experts_of_its_layers(cuts):
    cut = cuts("qwen3-moe")  # its second layer is dense
    ids = tokens_of(cut, 20)
    true = cut.run("ort").sequence(ids, (20,))
    every, plan = every_expert(cut.manifest.layers), cut.plan()
    assert [len(one) for one in every] == [8, 0, 8]
    (share,) = plan.stages[0].shares
    rows = None
    for first, last in ((0, 1), (1, 2), (2, 3)):
        stage = Stage(
            layers=Range(first, last),
            shares=(msgspec.structs.replace(share, experts=every_expert(cut.manifest.layers[first:last])),),
            topology="mesh",
        )
        (executor,) = loaded(cut, msgspec.structs.replace(plan, stages=(stage,)), prepacked=None)
        batch = executor.begin([(1, 0, 20)])
        if rows is None:
            cut.embedding.rows(ids, executor.residual(batch))
        else:
            executor.take(batch, rows)
        for index in range(executor.segments):
            executor.run(batch, index)
        rows = executor.hand_on(batch)
    logits = np.concatenate([executor.logits(batch, range(at, at + 2)) for at in range(0, 20, 2)])
    assert np.abs(logits[:, : true.shape[1]] - true).max() <= 1e-4 * np.abs(true).max()


@pytest.mark.parametrize("weights", ["fp32", "int4", "two"])
def test_prepacked_sets_of_experts_give_the_same_bits(cuts, weights):
    cut = cuts("gpt-oss", weights) if weights != "two" else cuts("gpt-oss", "int4", rules=two_formats("gpt-oss", 32))
    ids = tokens_of(cut, 20)
    expected = apart(cut, loaded(cut, spread(cut, 3)), ids, [20])
    for kept in (False, True):
        prepacked = Prepacked(cut.store, least_bytes=0)
        assert bool(cut.store.prepacked.used_bytes()) is kept
        assert np.array_equal(apart(cut, loaded(cut, spread(cut, 3), prepacked=prepacked), ids, [20]), expected)
        prepacked.keep()
        prepacked.close()
    cut.store.prepacked.shrink(1 << 40)


def test_plans_that_do_not_go_with_the_manifest_are_refused(cuts, tmp_path):
    cut = cuts("olmoe")
    plan = spread(cut, 3)
    (stage,) = plan.stages
    layers = cut.manifest.layers
    every = every_expert(layers)

    def change(rank: int, **facts) -> Stage:
        shares = list(stage.shares)
        shares[rank] = msgspec.structs.replace(shares[rank], **facts)
        return msgspec.structs.replace(stage, shares=tuple(shares))

    first, second = stage.shares[1].experts
    wrong = [
        (change(1, experts=(first, (*second[:-1], 9))), "names expert 9 of layer 1, it has 9"),
        (change(1, experts=(first,)), "names experts of 1 layers, the stage has 2"),
        (change(1, experts=()), "names experts of 0 layers"),
        (change(1, experts=(first[::-1], second)), "experts of layer 0 that do not rise"),
        (change(1, experts=((1, 1, 4), second)), "experts of layer 0 that do not rise"),
        (change(1, experts=(first, second[1:])), r"no share holds expert 1 of layer 1 \(1 of 9 are missing\)"),
        (change(1, columns=Range(0, 1)), "tensor parallelism runs a model that is cut with --experts columns"),
        (msgspec.structs.replace(stage, shares=stage.shares[:1]), "no share holds expert 1 of layer 0"),
    ]
    for number, (changed, words) in enumerate(wrong):
        with pytest.raises(InvalidDocument, match=words):
            needed_pieces(cut.manifest, msgspec.structs.replace(plan, stages=(changed,)), changed.shares[0].device)
        with pytest.raises(InvalidDocument, match=words):
            load_shard(
                cut.manifest, changed, changed.shares[0], open_piece=cut.store.open, folder=tmp_path / str(number),
                progress=lambda *_: None,
            )  # fmt: skip
    dense = msgspec.structs.replace(
        cut.manifest,
        layers=tuple(msgspec.structs.replace(one, segments=one.segments[:-1]) for one in layers),
    )
    whole = msgspec.structs.replace(stage, shares=(msgspec.structs.replace(stage.shares[0], experts=every),))
    with pytest.raises(InvalidDocument, match="names experts, by which olmoe is not cut"):
        needed_pieces(dense, msgspec.structs.replace(plan, stages=(whole,)), whole.shares[0].device)


@pytest.mark.parametrize("wide", [np.float64, np.float32])
def test_mixing_is_a_sum_of_rounded_products(wide):
    noise = np.random.default_rng(2)
    rows, each, hidden = 7, 4, 33
    given = noise.standard_normal((rows * each, hidden)).astype(np.float32)
    weights = noise.random((rows, each), np.float32)
    true = np.zeros((rows, hidden), wide)
    for row in range(rows):
        for place in range(each):
            for at in range(hidden):
                true[row, at] += np.float32(weights[row, place] * given[row * each + place, at])
    out = np.zeros_like(true)
    mix_each(given, weights, out)
    assert np.array_equal(out, true)
    row, order = np.repeat(np.arange(rows), each), noise.permutation(rows * each)
    again = np.ones_like(true)
    for part in np.split(order, [3, 11]):
        mix(given[part], row[part], weights.reshape(-1)[part], again)
    assert np.allclose(again, true + 1, rtol=0, atol=1e-6 if wide is np.float32 else 1e-12)
    mix(given[:0], row[:0], weights.reshape(-1)[:0], out)
    assert np.array_equal(out, true)


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("shape", FAMILIES[:5])
def test_torch_runs_whole_experts(cuts, shape, weights):
    cut = cuts(shape, weights, weights == "int4")
    ids = tokens_of(cut, 40)
    true = cut.run("ort").sequence(ids, (13, 1, 26))
    found = cut.run("torch:cpu:fp32").sequence(ids, (13, 1, 26))
    part = 1e-4 if weights == "fp32" else 0.25  # rows are rounded to 8 bits by the one, not by the other
    assert np.sqrt(((found - true) ** 2).mean() / (true**2).mean()) <= part
    spreaded = spread(cut, 3)
    both = [*loaded(cut, spreaded, "torch:cpu:fp32")[:2], loaded(cut, spreaded)[2]]
    assert np.sqrt(((apart(cut, both, ids, [13, 1, 26]) - true) ** 2).mean() / (true**2).mean()) <= part
