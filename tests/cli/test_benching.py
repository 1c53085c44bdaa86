"""`bench` without a cluster: figures, energy from a fake /sys, what a run says, and options that are refused."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ganglion.cli.bench import deployed, energy, machine, measures, memory, report, rivals
from ganglion.cli.bench.asking import Prompts
from ganglion.cli.bench.figures import Spread, gaps, percentile, ratios
from ganglion.cli.bench.measures import Decoded, Sizes
from ganglion.cli.bench.rival_child import answer
from ganglion.cli.bench.running import Collected, Theirs, same_tokens
from ganglion.cli.deploying import Wish
from ganglion.proto import admin_pb2
from ganglion.wire.errors import InvalidRequest, NotFound, Unavailable
from ganglion.wire.nouns import NumericClass

# --- figures


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60), st.floats(0.01, 1))
def test_a_percentile_is_the_least_value_that_enough_are_not_above(values: list[float], share: float) -> None:
    found = percentile(values, share)
    enough = [one for one in values if sum(other <= one for other in values) >= share * len(values) - 1e-9]
    assert found == min(enough)


def test_spreads_and_ratios() -> None:
    ours, theirs = Spread.of([10.0, 30.0, 20.0]), Spread.of([5.0, 20.0, 40.0])
    assert ours.document == {"median": 20.0, "low": 10.0, "high": 30.0, "rounds": [10.0, 30.0, 20.0]}
    assert ratios(ours, theirs).rounds == (2.0, 1.5, 0.5)  # of each round, not of the medians
    assert ratios(ours, theirs).median == 1.5 != ours.median / theirs.median
    assert gaps([1.0, 1.5, 1.5, 3.0]) == [0.5, 0.0, 1.5]
    with pytest.raises(ValueError, match="no round"):
        Spread.of([])
    with pytest.raises(ValueError, match="argument"):
        ratios(ours, Spread.of([1.0]))


def test_prompts_are_exact_and_never_the_same() -> None:
    prompts, again = Prompts(300, 7, (5, 6)), Prompts(300, 7, (5, 6))
    made = [prompts.fresh(size) for size in (8, 128, 128)]
    assert [len(prompt) for prompt in made] == [8, 128, 128]
    assert made[1] != made[2]
    assert made[1][:16] != made[2][:16]
    assert not {5, 6} & {token for prompt in made for token in prompt}
    assert max(max(prompt) for prompt in made) < 300
    assert [again.fresh(size) for size in (8, 128, 128)] == made


# --- options


def test_options_that_are_refused_name_what_there_is(tmp_path: Path) -> None:
    assert measures.chosen("") == measures.MEASURES
    assert measures.chosen(" prefill,decode ") == ("decode", "prefill")
    with pytest.raises(InvalidRequest, match=r"'speed': the measures are decode, prefill"):
        measures.chosen("speed")
    with pytest.raises(InvalidRequest, match=r"'vllm': it is llama-cpp-python, transformers"):
        rivals.Wanted.of("vllm")
    with pytest.raises(InvalidRequest, match=r"name its folder, as in llama.cpp="):
        rivals.Wanted.of("llama.cpp")
    with pytest.raises(NotFound, match="there is no /nowhere"):
        rivals.Wanted.of("llama.cpp=/nowhere")
    assert rivals.Wanted.of(f"llama.cpp={tmp_path}") == rivals.Wanted("llama.cpp", tmp_path.resolve())
    with pytest.raises(NotFound, match="no llama-bench in"):
        rivals.program(tmp_path, "llama-bench")


def test_which_deployment_is_meant() -> None:
    a, b = (admin_pb2.DeploymentState(model=name) for name in "ab")
    assert deployed._only([a], Wish()) is a
    with pytest.raises(InvalidRequest, match="name one of a, b"):
        deployed._only([b, a], Wish())
    with pytest.raises(NotFound, match="nothing is deployed; name a model"):
        deployed._only([], Wish())
    with pytest.raises(InvalidRequest, match="name it, as in ganglion bench demo"):
        deployed._only([a], Wish(weights="int8"))


def test_what_a_context_does_not_hold_is_said_not_shortened_in_silence() -> None:
    full = Sizes.of(4096, tokens=64, quick=False)
    assert (full.prompts, full.arriving, full.turn, full.notes) == ((128, 512, 2048), 2048, 1000, ())
    small = Sizes.of(600, tokens=64, quick=False)
    assert (small.prompts, small.arriving, small.running, small.turn) == ((128, 512), 599, 592, 567)
    assert [note.split(":")[0] for note in small.notes] == ["prefill 2048", "arrivals", "second-turn"]
    with pytest.raises(InvalidRequest, match=r"--tokens.*--context"):
        Sizes.of(64, tokens=64, quick=True)


def test_a_competitor_that_is_not_here_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    wanted = [rivals.Wanted.of("transformers"), rivals.Wanted.of("llama-cpp-python")]
    found, missing = rivals.open_rivals(wanted, rivals.Converted(tmp_path, tmp_path), "Q4_0", 1, 64)
    assert found == []
    assert missing == [
        "transformers-bf16: not installed here (no module torch)",
        "transformers-fp32: not installed here (no module torch)",
        "llama-cpp-python: not installed here (no module llama_cpp)",
    ]


def test_as_many_bits_as_ours() -> None:
    assert [
        rivals.like(NumericClass(format=name, block=0, exact=True))  # type: ignore[arg-type]
        for name in ("int4", "int8", "fp16", "fp32")
    ] == ["Q4_0", "Q8_0", "F16", "F16"]
    assert (
        rivals.built_with("CPU : SSE3 = 1 | AVX512_VNNI = 1 | AMX_INT8 = 0 | REPACK = 1 | ")
        == "SSE3, AVX512_VNNI, REPACK"
    )


# --- what the machine says


def rapl(sys: Path, name: str, microjoules: int, span: int = 1_000_000) -> Path:
    domain = sys / "powercap" / name
    domain.mkdir(parents=True)
    (domain / "name").write_text("package-0\n" if name.count(":") == 1 else "core\n")
    (domain / "energy_uj").write_text(f"{microjoules}\n")
    (domain / "max_energy_range_uj").write_text(f"{span}\n")
    return domain


def test_energy_by_rapl_counts_packages_once_and_over_a_turn(tmp_path: Path) -> None:
    first = rapl(tmp_path, "intel-rapl:0", 100)
    second = rapl(tmp_path, "intel-rapl:1", 900_000)
    part = rapl(tmp_path, "intel-rapl:0:0", 5)  # of the first, and in it already
    meter = energy.Meter(tmp_path)
    assert meter.source.startswith("RAPL: package-0")
    meter.start()
    (first / "energy_uj").write_text("400100")
    (second / "energy_uj").write_text("100000")  # began again
    (part / "energy_uj").write_text("400005")
    assert meter.stop() == pytest.approx(0.4 + 0.2)


def test_energy_by_battery(tmp_path: Path) -> None:
    battery = tmp_path / "power_supply" / "BAT0"
    battery.mkdir(parents=True)
    for name, text in {
        "type": "Battery",
        "status": "Discharging",
        "current_now": "2000000",
        "voltage_now": "10000000",
    }.items():
        (battery / name).write_text(f"{text}\n")
    assert energy.battery_w(tmp_path) == pytest.approx(20.0)
    (battery / "power_now").write_text("15000000")
    meter = energy.Meter(tmp_path)
    assert meter.source == "battery (the whole machine)"
    meter.start()
    found = meter.stop()
    assert found is not None
    assert found > 0
    (battery / "status").write_text("Charging")
    assert energy.battery_w(tmp_path) is None


def test_energy_that_cannot_be_read_is_not_guessed(tmp_path: Path) -> None:
    meter = energy.Meter(tmp_path)
    meter.start()
    assert (meter.source, meter.stop()) == ("not readable here", None)


def test_machine_of_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 avx512_vnni sse\n"
    )
    found = machine.machine(tmp_path)
    assert (found["processor"], found["processor_family"], found["processor_model"]) == ("AMD EPYC", 25, 17)
    assert found["instructions"] == ["avx2", "avx512_vnni"]
    assert "AMD EPYC (family 25, model 17)" in machine.machine_line(found)
    assert machine.machine(tmp_path / "none")["instructions"] == []


def test_memory_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "smaps_rollup").write_text(
        "55-7f ---p 0 00:00 0 [rollup]\nRss:    2048 kB\nAnonymous:   512 kB\n"
    )
    assert memory.held(7, tmp_path) == {"resident_bytes": 2 << 20, "anonymous_bytes": 512 << 10}
    assert memory.held(8, tmp_path) is None


# --- competitors and the report


class Counting:
    """A model that counts upwards, on a clock of a second for each call."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}

    def begin(self, prompt: Any) -> int:
        return len(prompt)

    def step(self, token: int) -> int:
        return token + 1


def test_a_child_times_tokens_after_the_first() -> None:
    ticks = iter([0.0, 5.0, 6.0, 7.0, 8.0])
    said = answer(Counting(), {"op": "decode", "prompt": [1, 2], "tokens": 4}, lambda: next(ticks))
    assert said == {"ids": [2, 3, 4, 5], "ttft_s": 5.0, "tpot_s": 1.0}
    ticks = iter([0.0, 5.0])
    assert answer(Counting(), {"op": "prefill", "prompt": [1]}, lambda: next(ticks)) == {"seconds": 5.0}


class Known:
    about = rivals.About("other", "1", "Q4_0", 4.5, "AVX2", 2)


def test_ratios_are_of_rates_and_tokens_are_compared() -> None:
    ours, theirs = Collected(), Theirs(Known())  # type: ignore[arg-type]
    ours.decode = [Decoded(0.01, [1, 2, 3, 4]), Decoded(0.02, [5, 6, 7, 8])]
    theirs.found.decode = [Decoded(0.02, [1, 2, 9, 4]), Decoded(0.02, [5, 6, 7, 8])]
    ours.prefill_s = {128: [0.5, 0.5]}
    theirs.found.prefill_s = {128: [1.0, 0.25], 512: [1.0, 1.0]}
    found = report.against_document(type("Of", (), {"found": ours})(), theirs)
    assert found["decode"]["ratio"]["rounds"] == [2.0, 1.0]
    assert [row.get("ratio", {}).get("rounds") for row in found["prefill"]] == [[2.0, 0.5], None]
    assert found["same_tokens"] == {"equal": 6, "of": 8}
    assert same_tokens(ours, Collected(decode=[Decoded(0.1, None)])) is None
    json.dumps(found)


def test_the_document_of_nothing_and_its_rows() -> None:
    found = Collected()
    of = type("Of", (), {"document": {"sessions": 4}})()
    ours: Any = type("Ours", (), {"found": found, "name": "m", "deployed": of})()
    empty = report.ours_document(ours, [], energy.NONE)
    assert list(empty) == [
        "name", "deployment", "decode", "prefill", "concurrent", "arrivals", "second_turn", "account_ms",
        "wire_bytes_per_token", "energy", "memory",
    ]  # fmt: skip
    assert report.ours_rows(empty) == []
    values = [random.Random(1).random() for _ in range(3)]
    account = dict.fromkeys(measures.PARTS, 0.001) | {"wall_s": 0.006, "api_s": 0.002}
    found.decode = [Decoded(0.01 + one, [1, 2], 0.1, (0.01, 0.02), account, 20.0, 3.0) for one in values]
    full = report.ours_document(ours, [{"device": "d", "resident_bytes": None, "anonymous_bytes": None}], "RAPL")
    assert full["decode"]["ms_per_token"]["median"] == pytest.approx(1e3 * (0.01 + statistics.median(values)))
    assert full["account_ms"]["wall"] == pytest.approx(6)
    assert full["account_ms"]["api"] == pytest.approx(2)
    assert full["energy"]["joules_per_token"]["median"] == 1.5
    rows = {row[0].strip(): row for row in report.ours_rows(full)}
    assert rows["energy"][1:] == ["1.50 J/token", "1.50–1.50", "RAPL"]
    assert rows["memory, d"][1] == "not readable here"
    assert rows["on the lead's lanes"][1] == "20 bytes/token"


def test_a_child_that_dies_is_unavailable_with_its_last_words(tmp_path: Path) -> None:
    about = rivals.About("llama-cpp-python", "1", "F16", 16.0, "", 1)
    with pytest.raises(Unavailable, match="it ended: "):
        rivals.Child(about, tmp_path / "none.gguf", 64)
