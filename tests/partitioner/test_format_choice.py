"""The choice of a format: from figures alone, against a plain account of a request, and from checkpoints."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from ganglion.partitioner.cost import Device
from ganglion.partitioner.format_choice import (
    WORKLOADS,
    Figures,
    choose_format,
    figures_of,
    step_s,
    workload_of,
)
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import DeviceProfile, FormatRate, NumericClass

GIB = 1 << 30
CLASSES = {
    "int4": NumericClass(format="int4", block=32, exact=True),
    "int8": NumericClass(format="int8", block=0, exact=True),
    "mixed": NumericClass(format="int4", block=32, exact=True, prompt="int8"),
}
MODEL = Figures(  # about Llama-3.2-1B
    layer_numbers=973_000_000,
    active_numbers=973_000_000,
    head_numbers=263_000_000,
    embedding_bytes=525_000_000,
    kv_token_bytes=65_536,
    classes=CLASSES,  # type: ignore[arg-type]
)
# Two cores with VNNI, as measured: a step of int4 grows with its rows from the second on, one of int8 hardly.
INT4 = FormatRate(decode_bytes_per_s=17e9, batch_bytes_per_s=4.8e9, prefill_flop_per_s=2.4e11)
INT8 = FormatRate(decode_bytes_per_s=24e9, batch_bytes_per_s=20e9, prefill_flop_per_s=1.2e12)


def device(name: str = "desk", *, gib: float = 8, **rates: FormatRate) -> Device:
    profile = DeviceProfile(
        host_id=name,
        hostname="h",
        system="Linux",
        kernel_family="k",
        cores=2,
        threads=2,
        memory_bytes=64 * GIB,
        memory_budget_bytes=int(gib * GIB),
        disk_free_bytes=GIB,
        disk_read_bytes_per_s=1e9,
        memory_bytes_per_s=28e9,
        rates={} if "none" in rates else {"int4-32": rates.get("int4", INT4), "int8": rates.get("int8", INT8)},
        providers=("CPUExecutionProvider",),
        version="0",
    )
    return Device(name[0] * 26, name, "owner", profile)


def test_a_chat_is_mixed_where_both_fit_else_what_fits():
    found = choose_format(MODEL, [device()], WORKLOADS["chat"])
    assert found.format == "mixed"
    assert found.reason == "prompts 5.0 times faster in int8, 2.7 GiB of 8.0 GiB on desk"
    tight = choose_format(MODEL, [device(gib=2.5)], WORKLOADS["chat"])
    assert tight.format == "int8"  # a little slower to decode, and five times as fast for the prompt
    assert "mixed needs 2.7 GiB and desk has 2.5 GiB; one at a time, 1.3 times as fast as int4" in tight.reason
    tighter = choose_format(MODEL, [device(gib=1.9)], WORKLOADS["chat"])
    assert tighter.format == "int4"
    assert "int8 needs" in tighter.reason
    assert "mixed needs" in tighter.reason


def test_many_streams_are_int8_and_a_draft_is_int4():
    batch = choose_format(MODEL, [device()], WORKLOADS["batch"])
    assert batch.format == "int8"
    assert "16 at once" in batch.reason
    assert "times as fast as int4" in batch.reason
    draft = choose_format(MODEL, [device()], WORKLOADS["draft"])
    assert draft.format == "int4"
    assert "int8 would take" in draft.reason


def test_what_verifies_drafted_tokens_is_int8():
    found = choose_format(MODEL, [device()], WORKLOADS["verify"])
    assert found.format == "int8"
    assert "one at a time in steps of 9 rows" in found.reason
    assert "times as fast as mixed" in found.reason
    tight = choose_format(MODEL, [device(gib=1.9)], WORKLOADS["verify"])
    assert (tight.format, "int8 needs" in tight.reason) == ("int4", True)


def test_measured_figures_decide():
    """Where int8 is no faster for prompts nothing is held twice; where it decodes as fast, it does all."""
    slow = device(int8=msgspec.structs.replace(INT8, prefill_flop_per_s=2.5e11))
    assert choose_format(MODEL, [slow], WORKLOADS["chat"]).format == "int4"
    fast = device(int8=msgspec.structs.replace(INT8, decode_bytes_per_s=60e9))
    assert choose_format(MODEL, [fast], WORKLOADS["chat"]).format == "int8"
    assert choose_format(MODEL, [device("old", none=INT4)], WORKLOADS["chat"]).reason == "no device is measured yet"
    assert choose_format(MODEL, [], WORKLOADS["chat"]).format == "int4"


def test_the_device_that_holds_it_counts():
    small_and_fast = device("quick", gib=2.2, int4=msgspec.structs.replace(INT4, decode_bytes_per_s=20e9))
    found = choose_format(MODEL, [device(), small_and_fast], WORKLOADS["chat"])
    assert (found.format, found.reason.endswith("on desk")) == ("mixed", True)
    assert choose_format(MODEL, [device(gib=1)], WORKLOADS["chat"]).reason.startswith("no device holds the model alone")


def test_a_step_is_what_was_measured_and_between_in_proportion():
    profile = device().profile
    bytes_, numbers = 1_000_000_000, 900_000_000
    one, sixteen = bytes_ / INT4.decode_bytes_per_s, bytes_ / INT4.batch_bytes_per_s
    many = 128 * 2 * numbers / INT4.prefill_flop_per_s
    kind = CLASSES["int4"]
    for rows, expected in ((1, one), (16, sixteen), (128, many), (8.5, (one + sixteen) / 2), (256, 2 * many)):
        assert math.isclose(step_s(profile, kind, bytes_, numbers, rows), expected)
    unmeasured = msgspec.structs.replace(profile, rates={})
    assert step_s(unmeasured, kind, bytes_, numbers, 3) == pytest.approx(3 * bytes_ / 14e9)


def test_figures_of_checkpoints(models: Any) -> None:
    path = models.checkpoint("llama-kv2")
    found = figures_of(path, fast=False, small_bytes=0)
    manifest = models.cut("llama-kv2", "fp32").manifest
    matrices = [
        sum(piece.size for part in parts for slot in part.slots for piece in slot.pieces if slot.join != "whole") // 4
        for parts in ([one for layer in manifest.layers for one in layer.segments], [manifest.head])
    ]
    assert found.layer_numbers == found.active_numbers == pytest.approx(matrices[0], rel=0.15)  # padding of groups
    assert found.head_numbers == pytest.approx(matrices[1], rel=0.15)
    assert set(found.classes) == {"int4", "int8", "mixed"}
    small = figures_of(path, fast=False, small_bytes=1 << 30)
    assert choose_format(small, [], WORKLOADS["chat"]).format == "fp32"
    with pytest.raises(InvalidRequest, match="--for 'talk'"):
        workload_of("talk")
