"""The probe: graphs as made, figures that make sense, a cache that a change of the machine breaks."""

from __future__ import annotations

import msgspec
import pytest

from ganglion.agent.probe import machine, make_graphs, profile
from ganglion.agent.probe.measure import Measured, disk_rate
from ganglion.agent.probe.shapes import GRAPHS, SHAPES
from ganglion.wire.errors import InvalidRequest, Unavailable
from ganglion.wire.home import Home
from ganglion.wire.limits import ADVERT_BYTES
from ganglion.wire.nouns import DeviceProfile, FormatRate, from_json, to_json


def measured(rate: float = 1e9) -> Measured:
    rates = {name: FormatRate(decode_bytes_per_s=rate, prefill_flop_per_s=1e10) for name in ("fp32", "int4-32")}
    return Measured(
        rates=rates, memory_bytes_per_s=rate, disk_read_bytes_per_s=1e9, providers=("CPUExecutionProvider",)
    )


def test_the_graphs_are_what_the_script_makes(capsys):
    assert make_graphs.main(["--check"]) == 0, capsys.readouterr().out
    assert {path.name for path in GRAPHS.iterdir()} == {shape.file for shape in SHAPES}


async def test_a_real_probe_measures_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "LARGE_BYTES", 1 << 60)  # the small products: quick, and what a phone would run
    home = Home(tmp_path)
    found = await profile.probe_device(home.path, store=home.store, threads=1)
    assert set(found.rates) == {"fp32", "int4-32", "int4-128", "int8", "int8-32"}
    for rate in found.rates.values():
        assert rate.decode_bytes_per_s > 1e7
        assert rate.prefill_flop_per_s > 1e8
        assert rate.batch_bytes_per_s > 1e6
    assert found.threads == 1
    assert 0 < found.memory_budget_bytes <= found.memory_bytes
    assert found.disk_read_bytes_per_s > 0
    body = to_json(found)
    assert from_json(DeviceProfile, body, limit_bytes=ADVERT_BYTES) == found
    assert sorted(path.name for path in home.store.iterdir()) == []


async def test_figures_are_kept_until_threads_change_or_a_fresh_probe_is_asked(tmp_path, monkeypatch):
    home, runs = Home(tmp_path), []

    async def fake(threads, size, store):
        runs.append(threads)
        return measured(len(runs) * 1e9)

    monkeypatch.setattr(profile, "_measure", fake)
    first = await profile.probe_device(home.path, store=home.store, threads=1)
    assert (await profile.probe_device(home.path, store=home.store, threads=1)).rates == first.rates
    assert runs == [1]
    await profile.probe_device(home.path, store=home.store, threads=1, fresh=True)
    assert len(runs) == 2
    (home.path / profile.CACHE_FILE).write_bytes(b"{broken")
    await profile.probe_device(home.path, store=home.store, threads=1)
    assert len(runs) == 3
    kept = msgspec.json.decode((home.path / profile.CACHE_FILE).read_bytes())
    kept["key"] = "of another machine"
    (home.path / profile.CACHE_FILE).write_bytes(msgspec.json.encode(kept))
    await profile.probe_device(home.path, store=home.store, threads=1)
    assert len(runs) == 4


async def test_figures_beyond_the_machine_are_refused(tmp_path):
    home = Home(tmp_path)
    with pytest.raises(InvalidRequest, match="threads: 5000 asked"):
        await profile.probe_device(home.path, store=home.store, threads=5000)
    with pytest.raises(InvalidRequest, match="budget of"):
        await profile.probe_device(home.path, store=home.store, memory_budget_bytes=1 << 60)


async def test_a_probe_that_fails_says_why(tmp_path, monkeypatch):
    home = Home(tmp_path)
    with pytest.raises(Unavailable, match="ended with code"):
        await profile._measure(10**12, "small", home.store)  # no pool has so many threads
    monkeypatch.setattr(profile, "PROBE_S", 0.01)
    with pytest.raises(Unavailable, match="did not finish"):
        await profile._measure(1, "small", home.store)


def test_a_container_limits_threads_and_memory(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text(str(1 << 30))
    (tmp_path / "memory.current").write_text(str(600 << 20))
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {100 << 20}\n")
    limits = machine.usable(0, tmp_path)
    assert limits.threads == 1
    assert limits.memory_bytes == 1 << 30
    assert limits.available_bytes == (1 << 30) - (500 << 20)
    free = machine.usable(0, tmp_path / "none")
    assert free.memory_bytes == free.machine_bytes > 0
    assert free.threads >= 1


def test_disk_rate_of_a_folder_that_takes_nothing_is_zero(tmp_path):
    assert disk_rate(tmp_path / "missing") == 0.0


def test_the_kernel_family_fits_its_field():
    assert machine.kernel_family().startswith("onnxruntime ")
    assert len(machine.kernel_family()) <= 128
    assert machine.host_id() == machine.host_id()
