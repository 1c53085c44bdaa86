"""The candidate "expert": its plans, its prediction, what it is refused for, and other modes over whole experts."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from ganglion.partitioner import expert_placement_programme as programme
from ganglion.partitioner.expert_placement_routes import CountedRoutes, sets_of
from ganglion.partitioner.placement import Device, LinkFigures, place
from ganglion.wire.errors import InvalidDocument, InvalidRequest
from ganglion.wire.nouns import (
    DeviceProfile,
    Embedding,
    FormatRate,
    Geometry,
    Layer,
    Manifest,
    NumericClass,
    PieceRef,
    PlanOptions,
    PlanReport,
    Range,
    RopeTable,
    Segment,
    Slot,
)
from ganglion.wire.shares import check_experts

MB = 1 << 20
EXPERTS, CHOSEN, LAYERS = 16, 2, 3
EMPTY = Range(0, 0)
NOBODY = np.zeros((0, CHOSEN), np.int64)


def slot(name: str, sizes: list[int], join: str = "rows") -> Slot:
    return Slot(name=name, join=join, rows=1, pieces=tuple(PieceRef("0" * 64, size) for size in sizes))


def mixture(*, whole: bool = True, expert_bytes: int = 8 * MB) -> Manifest:
    """The first layer is dense; whole: cut by experts, else by columns."""
    heads = Segment(kind="attention", axis="heads", groups=4, slots=(slot("qkv", [MB // 4] * 4),))
    dense = Segment(kind="mlp", axis="columns", groups=4, slots=(slot("up", [MB] * 4),))
    count = EXPERTS if whole else 4
    experts = Segment(
        kind="mixture",
        axis="experts" if whole else "columns",
        groups=count,
        slots=(slot("router", [MB], "whole"), slot("experts_in", [expert_bytes * EXPERTS // count] * count)),
        experts=CHOSEN,
        active=CHOSEN / EXPERTS,
    )
    return Manifest(
        format_version=3,
        name="mix",
        family="qwen3_moe",
        source_digest="1" * 64,
        numeric_class=NumericClass(format="int4", block=32, exact=True),
        opset=21,
        geometry=Geometry(
            hidden=512, layers=LAYERS, heads=8, kv_heads=4, head_dim=64, intermediate=512, vocab=1000, context=512,
            head_groups=4, column_groups=4, vocab_groups=4, vocab_group_rows=250,
        ),
        layers=(Layer(segments=(heads, dense)), *[Layer(segments=(heads, experts))] * (LAYERS - 1)),
        head=Segment(kind="head", axis="columns", groups=4, slots=(slot("out", [MB] * 4),)),
        embedding=Embedding(dtype="bfloat16", pieces=(PieceRef("0" * 64, MB),) * 4),
        ropes={"default": (RopeTable(context=512, cos=PieceRef("0" * 64, 100), sin=PieceRef("0" * 64, 100)),)},
        handover="sum",
        graphs={},
        tokenizer={},
        bos_id=None,
        eos_ids=(),
        parameters=1,
    )  # fmt: skip


def device(number: int, *, memory: int, gb_per_s: float = 1.0, label: str = "owner") -> Device:
    rate = FormatRate(decode_bytes_per_s=gb_per_s * 1e9, prefill_flop_per_s=1e11)
    profile = DeviceProfile(
        host_id=f"host{number}", hostname="h", system="Linux", kernel_family="k", cores=4, threads=4,
        memory_bytes=2 * memory, memory_budget_bytes=memory, disk_free_bytes=MB, disk_read_bytes_per_s=1e9,
        memory_bytes_per_s=1e10, rates={"int4-32": rate}, providers=("CPUExecutionProvider",), version="0",
    )  # fmt: skip
    return Device("abcdefghijklm"[number] * 26, f"dev-{number}", label, profile)


def links(devices: list[Device], rtt_s: float = 1e-4) -> dict[tuple[str, str], LinkFigures]:
    pairs = itertools.permutations([one.node_id for one in devices], 2)
    return {pair: LinkFigures(True, rtt_s, 1e9) for pair in pairs}


def candidate(report: PlanReport, mode: str):
    return next(one for one in report.candidates if one.mode == mode)


def routes(seed: int = 0, tokens: int = 2000) -> CountedRoutes:
    """Tokens choose two experts of one of four clusters, another clustering in every layer."""
    random = np.random.default_rng(seed)
    layers = [sets_of(NOBODY, 0)]
    for _ in range(LAYERS - 1):
        place = random.permutation(EXPERTS).reshape(4, 4)
        chosen = np.stack([random.choice(place[random.integers(4)], CHOSEN, replace=False) for _ in range(tokens)])
        layers.append(sets_of(chosen, EXPERTS))
    return CountedRoutes(tokens, tuple(layers))


BIG = 2048 * MB
SMALL = 480 * MB  # holds the rest of the model, and about half of its experts


def test_the_lead_has_all_else_and_every_expert_has_a_place():
    devices = [device(number, memory=BIG) for number in range(3)]
    report = place(mixture(), devices, links(devices), PlanOptions(mode="expert"))
    plan = report.plan
    assert plan is not None
    (stage,) = plan.stages
    check_experts(mixture(), stage)
    assert stage.topology == "star"
    lead, *holders = stage.shares
    assert (lead.heads, lead.columns, lead.vocab) == (Range(0, 4), Range(0, 4), Range(0, 4))
    assert all((one.heads, one.columns, one.vocab) == (EMPTY, EMPTY, EMPTY) for one in holders)
    assert all(one.experts[0] == () and all(one.experts[1:]) for one in stage.shares)
    chosen = report.candidates[0]
    assert chosen.mode == "expert"
    assert "no routes of this model were reported yet" in chosen.reason
    assert "devices touched by a token in a layer" in chosen.reason
    assert "dev-1 " in chosen.reason.split("experts: ")[1]


def test_it_is_chosen_where_nothing_else_fits_and_not_where_one_device_does():
    model = mixture()
    devices = [device(0, memory=SMALL), device(1, memory=SMALL)]
    report = place(model, devices, links(devices), PlanOptions())
    assert report.plan is not None
    assert report.plan.stages[0].shares[0].experts
    assert not candidate(report, "single").feasible
    for name, used in report.candidates[0].memory_bytes.items():
        assert used <= report.candidates[0].available_bytes[name]
    rich = [device(0, memory=BIG), device(1, memory=BIG)]
    alone = place(model, rich, links(rich, 50e-3), PlanOptions())
    assert alone.candidates[0].mode == "single"
    assert alone.plan is not None
    assert alone.plan.stages[0].shares[0].experts == ((), tuple(range(16)), tuple(range(16)))
    assert candidate(alone, "expert").feasible  # and says why it lost
    assert "against" in candidate(alone, "expert").reason


def test_every_stage_of_a_pipeline_has_its_experts_and_tensor_is_refused():
    devices = [device(0, memory=BIG), device(1, memory=BIG)]
    split = place(mixture(), devices, links(devices), PlanOptions(mode="pipeline")).plan
    assert split is not None
    for stage in split.stages:
        check_experts(mixture(), stage)
    tensor = place(mixture(), devices, links(devices), PlanOptions(mode="tensor"))
    assert tensor.plan is None
    assert "cut it with --experts columns" in tensor.candidates[0].reason


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (mixture(whole=False), PlanOptions(mode="expert"), "cut it with --experts whole"),
        (mixture(), PlanOptions(mode="expert", topology="mesh"), "leave --topology out"),
        (mixture(expert_bytes=256 * MB), PlanOptions(mode="expert"), "raise a memory budget, add a device"),
    ],
)
def test_what_stands_in_the_way_is_said(model, options, reason):
    devices = [device(0, memory=BIG), device(1, memory=BIG)]
    report = place(model, devices, links(devices), options)
    assert report.plan is None
    assert reason in report.candidates[0].reason
    dense = msgspec.structs.replace(model, layers=model.layers[:1])
    assert "it is no mixture" in place(dense, devices, links(devices), PlanOptions(mode="expert")).candidates[0].reason


def test_a_model_cut_by_columns_has_no_candidate_for_experts_unless_it_was_asked_for():
    devices = [device(0, memory=BIG), device(1, memory=BIG)]
    report = place(mixture(whole=False), devices, links(devices), PlanOptions())
    assert {one.mode for one in report.candidates} == {"single", "tensor", "pipeline"}


def test_counted_routes_spare_messages_and_shares_divide_the_load():
    devices = [device(number, memory=SMALL) for number in range(4)]
    asked = PlanOptions(mode="expert")
    asked = msgspec.structs.replace(asked, devices=tuple(one.name for one in devices))
    light, far = mixture(expert_bytes=MB), links(devices, 20e-3)
    blind = place(light, devices, far, asked).candidates[0]
    told = place(light, devices, far, asked, None, routes()).candidates[0]
    assert "experts placed by the routes of 2000 tokens" in told.reason
    assert told.ms_per_token < blind.ms_per_token

    def touched(reason: str) -> float:
        return float(reason.split(" devices touched")[0].split()[-1])

    assert touched(told.reason) < 1.3 < touched(blind.reason)  # clusters of four on four devices
    near = place(mixture(), devices, links(devices), asked, None, routes()).candidates[0]
    assert "a token's experts lie apart" in near.reason  # a link is quicker than an expert
    assert touched(near.reason) > touched(told.reason)
    shares = PlanOptions(mode="expert", devices=tuple(one.name for one in devices[:2]), shares=(3, 1))
    plan = place(mixture(), devices, links(devices), shares).plan
    assert plan is not None
    held = [sum(map(len, share.experts)) for share in plan.stages[0].shares]
    assert held[0] > 2 * held[1]


def test_the_same_devices_in_any_order_give_the_same_plan_and_without_highs_it_is_said(monkeypatch):
    devices = [device(number, memory=SMALL) for number in range(3)]

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(programme, "import_module", missing)
    counted = routes()
    light, far = mixture(expert_bytes=MB), links(devices, 20e-3)
    one = place(light, devices, far, PlanOptions(mode="expert"), None, counted)
    other = place(light, devices[::-1], far, PlanOptions(mode="expert"), None, counted)
    assert one == other
    assert "pip install 'ganglion-ai[partitioner]'" in one.candidates[0].reason


def test_a_plan_that_answers_wait_for_takes_no_programme(monkeypatch, capfd):
    devices = [device(number, memory=BIG) for number in range(3)]
    counted = routes()
    light, far = mixture(expert_bytes=MB), links(devices, 20e-3)
    args = (light, devices, far, PlanOptions(mode="expert"), None, counted)
    settled = place(*args)
    assert capfd.readouterr() == ("", "")  # HiGHS says nothing either
    monkeypatch.setattr(programme, "load_highs", lambda: pytest.fail("HiGHS was loaded"))
    hurried = place(*args, soon=True)
    assert hurried.plan is not None
    assert "placed by descent, since answers wait for it" in hurried.candidates[0].reason
    assert hurried == place(*args, soon=True)
    assert settled.candidates[0].ms_per_token <= hurried.candidates[0].ms_per_token * 1.0001


def test_of_which_layers_routes_are_known_is_said():
    devices = [device(number, memory=BIG) for number in range(2)]
    dense, first, _ = routes().layers
    counted = CountedRoutes(600, (dense, first, sets_of(NOBODY, EXPERTS)))
    report = place(mixture(), devices, links(devices), PlanOptions(mode="expert"), None, counted)
    assert "placed by the routes of 600 tokens, known of 1 of 2 layers" in report.candidates[0].reason


def test_routes_of_another_model_are_refused():
    devices = [device(0, memory=BIG), device(1, memory=BIG)]
    wrong = CountedRoutes(600, (sets_of(np.zeros((0, 2), np.int64), 0), *[sets_of(np.array([[0, 1]]), 8)] * 2))
    with pytest.raises(InvalidDocument, match="layer 1 has 16 experts, they name 8"):
        place(mixture(), devices, links(devices), PlanOptions(mode="expert"), None, wrong)


class TestPaging:
    """What does not fit into memory stays on disk, where a person said so or nothing fits otherwise."""

    def test_nothing_is_paged_where_all_fits(self) -> None:
        report = place(mixture(), [device(0, memory=BIG), device(1, memory=BIG)], {}, PlanOptions())
        assert all(not share.expert_cache_bytes for one in report.candidates for share in shares_of(one))
        assert "on disk" not in report.candidates[0].reason

    @pytest.mark.parametrize("mode", ["single", "pipeline", "expert"])
    def test_a_budget_is_kept_and_told(self, mode: str) -> None:
        devices = [device(0, memory=BIG), device(1, memory=BIG)]
        budget = 40 * MB
        options = PlanOptions(mode=mode, expert_memory_bytes=budget)
        report = place(mixture(), devices, links(devices), options)
        assert report.plan is not None
        for stage in report.plan.stages:
            check_experts(mixture(), stage)
        best, without = report.candidates[0], place(mixture(), devices, links(devices), PlanOptions(mode=mode))
        assert [share.expert_cache_bytes for share in shares_of(best)] == [budget] * len(report.plan.devices)
        for share in shares_of(best):
            held = sum(map(len, share.experts)) * 8 * MB
            assert f"{(held - budget) / 1e6:.1f} of {held / 1e6:.1f} MB of experts on disk" in best.reason
        assert "ms a token to read at 1000 MB/s" in best.reason
        assert "(assumed)" in best.reason
        assert best.ms_per_token > without.candidates[0].ms_per_token
        assert all(used <= best.available_bytes[name] for name, used in best.memory_bytes.items())

    def test_a_budget_for_all_of_them_changes_nothing(self) -> None:
        devices = [device(0, memory=BIG)]
        options = PlanOptions(expert_memory_bytes=BIG)
        assert place(mixture(), devices, {}, options).plan == place(mixture(), devices, {}, PlanOptions()).plan

    def test_it_is_the_last_way_out_and_takes_what_is_left(self) -> None:
        report = place(mixture(), [device(0, memory=540 * MB)], {}, PlanOptions())
        assert report.plan is not None
        best = report.candidates[0]
        assert "of experts on disk" in best.reason
        assert any(share.expert_cache_bytes > 60 * MB for share in shares_of(best))
        assert all(used <= best.available_bytes[name] for name, used in best.memory_bytes.items())

    def test_the_slower_resident_plan_goes_first(self) -> None:
        devices = [device(0, memory=SMALL), device(1, memory=BIG, gb_per_s=0.05)]
        report = place(mixture(), devices, links(devices), PlanOptions())
        assert all(not share.expert_cache_bytes for one in report.candidates for share in shares_of(one))

    def test_a_model_without_whole_experts_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="cut a mixture with --experts whole"):
            place(mixture(whole=False), [device(0, memory=BIG)], {}, PlanOptions(expert_memory_bytes=MB))

    def test_too_little_for_the_rest_names_the_way_out(self) -> None:
        report = place(mixture(), [device(0, memory=240 * MB)], {}, PlanOptions())
        assert report.plan is None
        assert "--expert-memory" in report.candidates[0].reason


def shares_of(one):
    return [share for stage in one.plan.stages for share in stage.shares] if one.plan is not None else []
