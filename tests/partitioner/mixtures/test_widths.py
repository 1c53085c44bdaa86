"""Whole experts of two formats in a layer: each gives the bits of its format, wherever it lies; what rules may say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from reference_runner import Runner, apart, cut_evenly

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.quantize import Rules, parse_format
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import Manifest

# Of layer 0 some experts, of the last all of them: by tensor, by pattern, in stacks and beside shared ones.
RULES = {
    "olmoe": ("model.layers.0.mlp.experts.[146].*", "model.layers.1.mlp.experts.*"),
    "gpt-oss": ("model.layers.0.mlp.experts.[02].*", "model.layers.1.mlp.experts.*"),
    "deepseek-lite": ("model.layers.1.mlp.experts.[03].*", "model.layers.1.mlp.shared_experts.*"),
}


class Widths:
    """A model cut whole in int4, in int8, and with the experts of `RULES` in int8 beside int4."""

    def __init__(self, name: str, mixtures, folder) -> None:
        self.pieces = DirectorySink(folder / "pieces")
        self.folder, self.opened, path = folder, 0, mixtures.checkpoint(name)
        rules = Rules(tuple((pattern, parse_format("int8-32")) for pattern in RULES[name]))
        self.mixed, self.narrow, self.wide = (
            partition(
                path,
                self.pieces,
                name=name,
                numeric_class=numeric_class(path, weights, rules=some, experts="whole"),
                rules=some,
                experts="whole",
            )
            for weights, some in (("int4", rules), ("int4", Rules()), ("int8", Rules()))
        )

    def runner(self, manifest: Manifest, devices: int = 1) -> Runner:
        self.opened += 1
        cuts = apart(manifest, devices) if devices > 1 else cut_evenly(manifest, (1,))
        return Runner(manifest, self.pieces, self.folder / f"r{self.opened}", cuts)


@pytest.fixture(scope="module", params=RULES)
def widths(request, mixtures, tmp_path_factory) -> Widths:
    return Widths(request.param, mixtures, tmp_path_factory.mktemp(request.param))


def given(runner: Runner, layer: int, rows: np.ndarray, place: Sequence[int]) -> np.ndarray:
    session = runner.sessions[0, layer, len(runner.manifest.layers[layer].segments) - 1][1]
    return session.run(["given"], {"rows": rows, "index": np.array(place, np.int64)})[0]


def test_every_expert_gives_the_bits_of_its_own_format(widths):
    mixed, narrow, wide = (widths.runner(one) for one in (widths.mixed, widths.narrow, widths.wide))
    noise, told = np.random.default_rng(5), set()
    for layer, entry in enumerate(widths.mixed.layers):
        segment = entry.segments[-1]
        if segment.axis != "experts":
            continue
        marks = [0.0] * segment.groups
        for slot in segment.slots:
            if slot.join == "marks":
                marks = [float(expert in slot.groups) for expert in range(segment.groups)]
        told |= set(marks)
        for count in (1, 2, 40):
            rows = noise.standard_normal((count, widths.mixed.geometry.hidden)).astype(np.float32)
            place = noise.integers(0, segment.groups, count)
            found = given(mixed, layer, rows, place)
            by_format = [given(one, layer, rows, place) for one in (narrow, wide)]
            expected = np.where(np.array(marks)[place, None] > 0, by_format[1], by_format[0])
            assert np.array_equal(found, expected)
            for row in range(min(count, 4)):
                assert np.array_equal(given(mixed, layer, rows[row : row + 1], place[row : row + 1])[0], found[row])
    assert told == {0.0, 1.0}


def test_logits_do_not_depend_on_where_experts_lie(widths, mixtures):
    ids = mixtures.ids(widths.mixed.name)[:30]
    first, _ = widths.runner(widths.mixed).forward(ids)
    assert np.array_equal(widths.runner(widths.mixed, 3).forward(ids, [17, 1, 12])[0], first)
    narrow, wide = (widths.runner(one).forward(ids)[0] for one in (widths.narrow, widths.wide))
    assert not np.array_equal(first, narrow)
    assert not np.array_equal(first, wide)
