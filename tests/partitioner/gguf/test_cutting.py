"""Cut GGUF files: blocks that fit the class are taken over; logits are those of the stored numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import make_llama, make_qwen3
from gguf import GGMLQuantizationType as Kind
from reference_runner import Runner, cut_evenly
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import Manifest

RELATIVE = 1e-4  # largest difference of a logit, over the largest logit
# Where the K types, which the gguf package only reads, have their float16 scales.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
TYPES = (
    Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, Kind.MXFP4, *SCALES,
)  # fmt: skip


def cut(source: Path, sink: DirectorySink, weight_format: str) -> Manifest:
    chosen = numeric_class(source, weight_format, fast=weight_format != "fp32")  # type: ignore[arg-type]
    return partition(source, sink, name="model", numeric_class=chosen)


def written(folder: Path, path: Path, write: Callable[..., Path], kind: Kind) -> Path:
    return write(path, AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors"), kind)


def pieces(manifest: Manifest, sink: DirectorySink, layer: int, slot: str, dtype: Any) -> np.ndarray:
    found = [one for segment in manifest.layers[layer].segments for one in segment.slots if one.name == slot]
    return np.concatenate([np.frombuffer(sink.file(ref.digest).read_bytes(), dtype) for ref in found[0].pieces])


@pytest.mark.parametrize(("weight_format", "kind"), [("int4", Kind.Q4_0), ("int8", Kind.Q8_0)])
def test_blocks_are_taken_over(weight_format, kind, tmp_path, write_gguf_model):
    folder = make_llama(tmp_path / "model", head_dim=32, hidden_size=128, intermediate_size=256)
    path = written(folder, tmp_path / "model.gguf", write_gguf_model, kind)
    sink = DirectorySink(tmp_path / "pieces")
    manifest = cut(path, sink, weight_format)
    gate = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"].numpy()
    blocks = gguf.quants.quantize(gate, kind).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32).reshape(-1)
    values = (blocks[:, 2:].view(np.int8).astype(np.int16) + 128).astype(np.uint8)
    if kind == Kind.Q4_0:
        nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
        values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    assert np.array_equal(pieces(manifest, sink, 1, "gate_scales", np.float32), scales)
    assert np.array_equal(pieces(manifest, sink, 1, "gate", np.uint8), values.reshape(-1))


def stored(weights: np.ndarray, kind: Kind) -> np.ndarray:
    """A matrix in `kind`: quantized, or of a K type random blocks of about its size."""
    if kind not in SCALES:
        return gguf.quants.quantize(weights, kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(weights.size).integers(0, 256, (weights.size // block, block_bytes), np.uint8)
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = np.array([1], np.float16).view(np.uint8)
    spread = gguf.quants.dequantize(blocks, kind).std() / weights.std()
    for at in SCALES[kind]:
        blocks[:, at : at + 2] = np.array([1 / spread], np.float16).view(np.uint8)
    return blocks.reshape(len(weights), -1)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_logits_of_every_type(kind, tmp_path, write_gguf_model, monkeypatch):
    """The cut file against transformers with the numbers that the gguf package reads from it."""
    folder = make_qwen3(
        tmp_path / "model", head_dim=64, hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=64
    )
    path, made = tmp_path / "model.gguf", gguf.quants.quantize
    monkeypatch.setattr(
        gguf.quants, "quantize", lambda weights, kind: stored(weights, kind) if kind in SCALES else made(weights, kind)
    )
    written(folder, path, write_gguf_model, kind)
    monkeypatch.undo()
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 1)
    read = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(np.array(read[names.get_name(name, try_suffixes=(".weight",))])))
    sink = DirectorySink(tmp_path / "pieces")
    manifest = cut(path, sink, "fp32")
    ids = np.random.default_rng(7).integers(0, 64, 12).tolist()
    logits, _ = Runner(manifest, sink, tmp_path / "run", cut_evenly(manifest, (1, 2))).forward(ids)
    expected = reference(torch.tensor([ids])).logits[0].detach().numpy()
    assert np.abs(logits - expected).max() < RELATIVE * np.abs(expected).max()
