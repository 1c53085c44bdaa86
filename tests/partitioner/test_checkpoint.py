"""Bad checkpoints get a clear error: the file, the figure, what is supported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ganglion.partitioner.checkpoint import open_checkpoint
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.safetensors import open_safetensors
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Corrupt, InvalidDocument, NotFound, Unsupported


def write(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(start: int, stop: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


BAD: dict[str, tuple[Any, bytes, dict[str, Any], type[Exception], str]] = {
    "header of 2^60 bytes": ({}, b"", {"length": 1 << 60}, InvalidDocument, "header of 1152921504606846976 bytes"),
    "header over the limit": ({}, b"", {"length": 101 << 20}, InvalidDocument, "at most 104857600"),
    "header past the end": ({}, b"", {"length": 500}, Corrupt, "header of 500 bytes in a file of 10"),
    "not JSON": (b"{oops", b"", {}, Corrupt, "not JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", {}, Corrupt, "not JSON"),
    "deep JSON": (b"[" * 100_000, b"", {}, Corrupt, "not JSON"),
    "a list": (b"[]", b"", {}, InvalidDocument, "not an object"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4), {}, InvalidDocument, "names 'a' twice",
    ),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), {}, Corrupt, "an overlap before tensor b"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), {}, Corrupt, "a hole before tensor b"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), {}, Corrupt, "a hole before tensor a"),
    "bytes of no tensor": ({"a": entry(0, 4)}, bytes(9), {}, Corrupt, "5 bytes after the last tensor"),
    "truncated": ({"a": entry(0, 400)}, bytes(399), {}, Corrupt, "ends at byte 400 of 399"),
    "size against shape": ({"a": entry(0, 8, [3])}, bytes(8), {}, Corrupt, r"F32\[3\] needs 12 bytes, it has 8"),
    "huge shape": ({"a": entry(0, 8, [2**62, 2**62])}, bytes(8), {}, InvalidDocument, "elements"),
    "negative shape": ({"a": entry(0, 8, [-2])}, bytes(8), {}, InvalidDocument, "shape"),
    "boolean shape": ({"a": entry(0, 4, [True])}, bytes(4), {}, InvalidDocument, "shape"),
    "reversed offsets": ({"a": entry(8, 4, [1])}, bytes(8), {}, InvalidDocument, "before its start"),
    "unknown dtype": ({"a": entry(0, 8, [2], "F5")}, bytes(8), {}, Unsupported, "F5"),
    "unknown field": ({"a": entry(0, 4) | {"x": 1}}, bytes(4), {}, InvalidDocument, "not described by"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_safetensors_files(case, tmp_path):
    header, data, options, error, said = BAD[case]
    path = write(tmp_path / "bad.safetensors", header, data, **options)
    with pytest.raises(error, match=said) as caught:
        open_safetensors(path)
    assert "bad.safetensors" in str(caught.value)


def test_short_file(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    with pytest.raises(Corrupt, match="3 bytes"):
        open_safetensors(tmp_path / "bad.safetensors")


def test_reads_what_safetensors_reads(models):
    from safetensors.torch import load_file

    path = models.checkpoint("llama-kv4-biases") / "model.safetensors"
    expected = load_file(path)
    tensors = open_safetensors(path).tensors
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.rows(0, tensor.shape[0]), expected[name].float().numpy())
        if len(tensor.shape) == 2:
            assert np.array_equal(tensor.columns(3, 17), expected[name].float().numpy()[:, 3:17])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stacks_of_matrices(dtype, tmp_path):
    numbers = torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    save_file({"experts": numbers}, tmp_path / "x.safetensors")
    stack = open_safetensors(tmp_path / "x.safetensors").tensors["experts"]
    expected = numbers.float().numpy()
    assert (stack.stored, stack.elements, stack.stored_bytes) == (dtype, 180, numbers.nbytes)
    assert stack.packing is None
    assert np.array_equal(stack.rows(1, 3), expected[1:3])
    for index in range(3):
        part = stack.part(index)
        assert part.shape == (6, 10)
        assert part.stored_bytes == numbers.nbytes // 3
        assert np.array_equal(part.rows(2, 5), expected[index, 2:5])
        assert np.array_equal(part.columns(1, 9), expected[index][:, 1:9])
        assert part.raw_rows(0, 6) == numbers[index].contiguous().view(torch.uint8).numpy().tobytes()
    with pytest.raises(Unsupported, match="not in blocks"):
        stack.packed_rows(0, 1)


@pytest.fixture
def folder(models, tmp_path) -> Path:
    return shutil.copytree(models.checkpoint("llama-kv2"), tmp_path / "model")


@pytest.fixture
def sharded(models, tmp_path) -> Path:
    return shutil.copytree(models.checkpoint("llama-kv3-llama31"), tmp_path / "model")


def edit(folder: Path, file: str = "config.json", /, **fields: Any) -> None:
    described = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({k: v for k, v in (described | fields).items() if v != "absent"}))


def cut(folder: Path) -> None:
    chosen = numeric_class(folder, "fp32")
    partition(folder, DirectorySink(folder.parent / "pieces"), name="x", numeric_class=chosen)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            Unsupported,
            "MambaForCausalLM.*LlamaForCausalLM, .*Qwen3ForCausalLM",
        ),
        ({"architectures": "absent", "model_type": "rwkv"}, Unsupported, "model_type 'rwkv'"),
        ({"hidden_act": "relu2"}, Unsupported, "relu2"),
        ({"quantization_config": {"bits": 4}}, Unsupported, "already quantized.*gptq, awq, compressed-tensors, mxfp4"),
        ({"head_dim": 20}, Unsupported, "head dimension 20; multiples of 16"),
        ({"num_key_value_heads": 3}, InvalidDocument, "4 heads do not divide into 3"),
        ({"hidden_size": "absent"}, InvalidDocument, "hidden_size is missing"),
        ({"hidden_size": "64"}, InvalidDocument, "hidden_size is '64', an integer"),
        ({"num_hidden_layers": 0}, InvalidDocument, "num_hidden_layers is '0'"),
        ({"num_hidden_layers": 3}, Corrupt, "model.layers.2.* is missing"),
        ({"intermediate_size": 173}, Corrupt, r"has shape \[172, 64\], config.json says \[173, 64\]"),
        ({"rms_norm_eps": "NaN"}, InvalidDocument, "rms_norm_eps"),
        ({"eos_token_id": "x"}, InvalidDocument, "eos_token_id"),
    ],
)
def test_bad_configurations(fields, error, said, folder):
    edit(folder, **fields)
    with pytest.raises(error, match=said):
        cut(folder)
    assert not list((folder.parent / "pieces").rglob("*")), "nothing is cut before everything is known to be there"


def test_folders_that_are_no_checkpoints(folder, tmp_path):
    with pytest.raises(NotFound, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(InvalidDocument, match="not a folder"):
        open_checkpoint(folder / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match=r"no config\.json"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "empty" / "model.gguf").touch()
    with pytest.raises(NotFound, match=r"name the \.gguf file itself"):
        open_checkpoint(tmp_path / "empty")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"pickled \(pytorch_model\.bin\)"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(NotFound, match=r"neither model\.safetensors nor"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InvalidDocument, match=r"config\.json: not JSON"):
        open_checkpoint(folder)


def test_truncated_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Corrupt, match=r"model\.safetensors: tensor .* ends at byte"):
        cut(folder)


def test_numbers_that_are_not_finite(folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-8:-4] = np.float32(np.nan).tobytes()
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(Corrupt, match="not finite"):
        cut(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "weights.bin"])
def test_an_index_that_leaves_the_folder(file, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = file
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidDocument, match="weight_map names the file"):
        open_checkpoint(sharded)


def test_an_index_that_is_wrong(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert len(open_checkpoint(sharded).tensors) == len(index["weight_map"])
    tensor = next(t for t, f in index["weight_map"].items() if f == files[0])
    moved = index | {"weight_map": index["weight_map"] | {tensor: files[1]}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(moved))
    with pytest.raises(Corrupt, match="says that it holds"):
        open_checkpoint(sharded)
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(sharded / files[0], sharded / files[1])
    with pytest.raises(Corrupt, match=r"does not|also in another file"):
        open_checkpoint(sharded)
    (sharded / files[1]).unlink()
    with pytest.raises(Corrupt, match=f"{files[1]}: the index names this file and it is missing"):
        open_checkpoint(sharded)


def test_links_out_of_the_folder_and_the_hugging_face_cache(folder, tmp_path):
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(InvalidDocument, match="outside the checkpoint's folder"):
        open_checkpoint(folder)
    cache = tmp_path / "models--someone--model"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "model.safetensors").unlink()
    outside.rename(folder / "model.safetensors")
    for file in folder.iterdir():
        file.rename(cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert open_checkpoint(snapshot).tensors
