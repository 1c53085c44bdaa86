"""What mixtures read: names of published checkpoints, experts in blocks and in MXFP4, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
from mixture_shapes import REFUSED, SHAPES
from safetensors.numpy import load_file, save_file

from ganglion.partitioner.checkpoint import open_checkpoint, read_config
from ganglion.partitioner.config import Config
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.expert_slots import cut_experts
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.experts import Mixture, Routing, named
from ganglion.partitioner.quantize import Recipe, dequantize, parse_format
from ganglion.partitioner.sink import DirectorySink
from ganglion.partitioner.views import Computed
from ganglion.partitioner.weights import Packed, Packing
from ganglion.wire.errors import Corrupt, InvalidDocument, Unsupported
from ganglion.wire.nouns import NumericClass

FORM = parse_format("int4-32")
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def cut(path, folder):
    sink = DirectorySink(folder)
    return partition(path, sink, name="m", numeric_class=numeric_class(path, "fp32"))


def test_checkpoints_have_the_names_of_published_ones(mixtures):
    """Cut from one tensor for each matrix of an expert (gpt-oss: stacks), as their makers published them."""
    names = {
        "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
        "olmoe": "model.layers.1.mlp.experts.8.up_proj.weight",
        "qwen3-moe": "model.layers.2.mlp.experts.7.down_proj.weight",
        "gpt-oss": "model.layers.1.mlp.experts.gate_up_proj",
        "deepseek-lite": "model.layers.1.mlp.shared_experts.gate_proj.weight",
    }
    for shape, name in names.items():
        assert name in load_file(mixtures.checkpoint(shape) / "model.safetensors")


def test_a_missing_expert_is_named(mixtures, tmp_path):
    path = shutil.copytree(mixtures.checkpoint("olmoe"), tmp_path / "m")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(Corrupt, match=r"tensor model.layers.1.mlp.experts.3.up_proj.weight is missing"):
        cut(path, tmp_path / "pieces")


def test_experts_in_mxfp4_are_cut_as_the_numbers_that_they_stand_for(mixtures, tmp_path):
    source = mixtures.checkpoint("gpt-oss-unbiased-tied")
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": 64}
    plain, packed = (shutil.copytree(source, tmp_path / name) for name in ("plain", "packed"))
    for folder, quantized in ((plain, {}), (packed, {"quantization_config": {"quant_method": "mxfp4"}})):
        (folder / "config.json").write_text(json.dumps(config | quantized))
    rng = np.random.default_rng(2)
    stacks = load_file(plain / "model.safetensors")
    blocks = dict(stacks)
    for layer in range(2):
        for part, inputs, outputs in (("gate_up_proj", 64, 128), ("down_proj", 64, 64)):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            codes = rng.integers(0, 16, (4, outputs, inputs // 32, 32), np.uint8)
            exponents = rng.integers(120, 128, (4, outputs, inputs // 32), np.uint8)
            numbers = FP4[codes & 7] * np.where(codes & 8, -1, 1) * 2.0 ** (exponents.astype(int) - 127)[..., None]
            stacks[name] = np.ascontiguousarray(numbers.reshape(4, outputs, inputs).swapaxes(1, 2), np.float32)
            stacks[f"{name}_bias"] = rng.standard_normal((4, outputs)).astype(np.float32)
            del blocks[name]
            blocks[f"{name}_bias"] = stacks[f"{name}_bias"]
            blocks[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
            blocks[f"{name}_scales"] = exponents
    save_file(stacks, plain / "model.safetensors")
    save_file(blocks, packed / "model.safetensors")
    assert cut(plain, tmp_path / "pieces").layers == cut(packed, tmp_path / "pieces").layers


@dataclass(frozen=True)
class InBlocks(Computed):
    """A source of int4 blocks of 32."""

    name: str
    values: np.ndarray
    scales: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.values), self.values.shape[1] * 32)

    @property
    def stored_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def packing(self) -> Packing:
        return Packing(4, 32)

    def packed_rows(self, start: int, stop: int) -> Packed:
        return Packed(self.values[start:stop], self.scales[start:stop])

    def packed_columns(self, start: int, stop: int) -> Packed:
        return Packed(self.values[:, start // 32 : -(-stop // 32)], self.scales[:, start // 32 : -(-stop // 32)])

    def rows(self, start: int, stop: int) -> np.ndarray:
        return dequantize(self.packed_rows(start, stop), FORM, self.shape[1])

    def columns(self, start: int, stop: int) -> np.ndarray:
        return self.rows(0, len(self.values))[:, start:stop]


def test_blocks_of_a_source_are_taken_over(mixtures):
    """Each expert's numbers are the source's, gate and up in turn, a shared one's and padding among them."""
    rng = np.random.default_rng(4)
    core = Mixture(
        routing=Routing(1),
        experts=2,
        hidden=64,
        intermediate=96,
        width=64,
        router="router",
        stored=named("experts.{expert}"),
        shared=2,
        stored_shared=named("shared"),
    )
    tensors = {}
    for name, shape in core.tensors().items():
        values = rng.integers(0, 256, (shape[0], shape[1] // 32, 16), np.uint8)
        tensors[name] = InBlocks(name, values, rng.random((shape[0], shape[1] // 32), np.float32))
    checkpoint = replace(open_checkpoint(mixtures.checkpoint("mixtral")), tensors=tensors)
    recipe = Recipe(NumericClass(format="int4", block=32, exact=True))

    def numbers(cut: dict[str, np.ndarray], slot: str, expert: int, inputs: int) -> np.ndarray:
        return dequantize(Packed(cut[slot][expert], cut[f"{slot}_scales"][expert]), FORM, inputs)

    for group in range(2):
        entering, leaving = cut_experts(core, checkpoint, recipe, group)
        start, stop = group * 64, min(group * 64 + 64, 96)
        for expert in range(4):
            at = f"experts.{expert}" if expert < 2 else "shared"
            first = 96 * (expert - 2) if expert > 2 else 0
            rows = numbers(entering, "experts_in", expert, 64)
            for turn, part in enumerate(("gate_proj", "up_proj")):
                expected = tensors[f"{at}.{part}.weight"].rows(first + start, first + stop)
                assert np.array_equal(rows[turn : 2 * (stop - start) : 2], expected)
                assert not rows[2 * (stop - start) :].any()
            columns = numbers(leaving, "experts_out", expert, 64)
            expected = tensors[f"{at}.down_proj.weight"].columns(first + start, first + stop)
            assert np.array_equal(columns[:, : stop - start], expected)
            assert not columns[:, stop - start :].any()


GROUPS = {"topk_method": "group_limited_greedy", "n_group": 7, "topk_group": 3}
MORE_REFUSED = [
    ("DeepseekV2", {"mlp_bias": True}, "experts with biases"),
    ("DeepseekV2", {"first_k_dense_replace": "one"}, "first_k_dense_replace is 'one'"),
    ("DeepseekV2", GROUPS | {"n_group": 5}, "7 experts do not divide into 5 groups"),
    ("DeepseekV2", GROUPS | {"topk_group": 2}, "3 experts are chosen of 2 groups of 1"),
    ("DeepseekV2", GROUPS | {"topk_group": 8}, "experts are chosen of 8 of 7 groups"),
]


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [*((family, *case) for family, cases in REFUSED.items() for case in cases), *MORE_REFUSED],
)
def test_configurations_that_are_refused(family, fields, words, mixtures):
    name = next(name for name, shape in SHAPES.items() if shape.family == family)
    config = read_config(mixtures.checkpoint(name))
    with pytest.raises((Unsupported, InvalidDocument), match=words):
        family_of(config).read(Config(config.fields | fields, config.where))
