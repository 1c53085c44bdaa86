"""`--format auto` and `--for`: what is asked of the planner, and what a person is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import make_llama
from mixture_shapes import SHAPES, make_mixture

from ganglion.cli import choosing, describing
from ganglion.cli.choosing import alive_devices, decide
from ganglion.cli.deploying import Wish, cut
from ganglion.cli.shelf import find_cut
from ganglion.cli.sourcing import Source
from ganglion.proto import admin_pb2, identity_pb2
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import DeviceProfile, FormatRate, NumericClass, to_json

OPTIONS: dict[str, Any] = {
    "fast": False, "mode": "auto", "devices": "", "shares": "", "topology": "auto", "payload": "auto",
    "context": 0, "sessions": 0, "prefix_tokens": None, "private": False,
}  # fmt: skip


def state(name: str, *, alive: str = "alive", faster: float = 4.0, label: Any = None) -> admin_pb2.DeviceState:
    rates = {
        "int4-32": FormatRate(decode_bytes_per_s=2e9, prefill_flop_per_s=1e11, batch_bytes_per_s=1e9),
        "int8": FormatRate(decode_bytes_per_s=2e9, prefill_flop_per_s=faster * 1e11, batch_bytes_per_s=2e9),
    }
    profile = DeviceProfile(
        host_id=name, hostname="h", system="Linux", kernel_family="k", cores=2, threads=2, memory_bytes=1 << 34,
        memory_budget_bytes=1 << 33, disk_free_bytes=1, disk_read_bytes_per_s=1, memory_bytes_per_s=4e9, rates=rates,
        providers=(), version="0",
    )  # fmt: skip
    known = label or identity_pb2.TRUST_LABEL_OWNER
    return admin_pb2.DeviceState(node_id=name[0] * 26, name=name, state=alive, profile=to_json(profile), label=known)


def line(*states: admin_pb2.DeviceState) -> Any:
    async def fleet() -> admin_pb2.Fleetwide:
        return admin_pb2.Fleetwide(devices=states)

    return SimpleNamespace(fleet=fleet)


async def test_the_format_is_chosen_and_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(choosing, "SMALL_CHECKPOINT_BYTES", 0)
    source = Source(make_llama(tmp_path / "model"), "tiny", "x")
    wish = Wish.of(weights=None, workload="chat", **OPTIONS)
    found = await decide(line(state("desk"), state("gone", alive="dead", faster=99)), wish, source)
    assert (found.weights, found.accepts_class(NumericClass(format="int4", block=32, exact=True, prompt="int8"))) == (
        "mixed",
        True,
    )
    assert not found.accepts_class(NumericClass(format="int4", block=32, exact=True))
    said = capsys.readouterr().err
    assert "format: mixed: prompts 4.0 times faster in int8" in said
    assert found.reason in said
    slow = await decide(line(state("desk", faster=1.0)), wish, source)
    assert slow.weights == "int4"
    assert (await decide(line(), Wish.of(weights="int8", **OPTIONS), source)).weights == "int8"
    assert (await decide(line(), wish, None)).weights is None


def test_private_leaves_out_what_is_not_the_owners() -> None:
    states = [
        state("desk"),
        state("friend", label=identity_pb2.TRUST_LABEL_FRIEND),
        admin_pb2.DeviceState(state="alive"),
    ]
    assert [one.name for one in alive_devices(states, private=False)] == ["desk", "friend"]
    assert [one.name for one in alive_devices(states, private=True)] == ["desk"]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--for batch chooses the format, but --format int4"):
        Wish.of(weights="int4", workload="batch", **OPTIONS)
    with pytest.raises(InvalidRequest, match="auto chooses by what was measured"):
        cut(tmp_path, tmp_path, Source(tmp_path, "x", "x"), wish=Wish.weights_only("auto", fast=False))


def test_how_experts_are_cut_is_part_of_the_cut(tmp_path: Path) -> None:
    checkpoint = make_mixture(tmp_path / "model", SHAPES["olmoe"])
    source = Source(checkpoint, "small", "x")
    (tmp_path / "agents" / "desk" / "store").mkdir(parents=True)
    home = tmp_path / "agents" / "desk"
    columns, whole, again = (
        cut(tmp_path, home, source, wish=Wish.weights_only("fp32", fast=False, experts=experts))
        for experts in (None, "whole", "whole")
    )
    assert whole == again != columns
    assert [{one.axis for layer in each.layers for one in layer.segments} for each in (columns, whole)] == [
        {"heads", "columns"},
        {"heads", "experts"},
    ]
    asked = Wish.of(weights="fp32", **OPTIONS | {"mode": "expert"})
    assert (asked.experts, asked.accepts_cut(whole), asked.accepts_cut(columns)) == ("whole", True, False)
    assert Wish.of(weights="fp32", experts="columns", **OPTIONS).accepts_cut(columns)
    assert Wish.of(weights="fp32", **OPTIONS).accepts_cut(whole)
    splits = [describing.cut_document(each, None)["splits"] for each in find_cut(tmp_path, "small")]
    assert {"expert": 9, "pipeline": 2} in splits
    with pytest.raises(InvalidRequest, match="--mode expert runs whole experts, but --experts columns"):
        Wish.of(weights="fp32", experts="columns", **OPTIONS | {"mode": "expert"})
    with pytest.raises(InvalidRequest, match="--experts 'rows': it is columns or whole"):
        Wish.of(weights=None, experts="rows", **OPTIONS)
    dense = Source(make_llama(tmp_path / "dense"), "dense", "x")
    with pytest.raises(InvalidRequest, match="llama has no experts to cut whole; leave --experts out"):
        cut(tmp_path, home, dense, wish=Wish.weights_only("fp32", fast=False, experts="whole"))
