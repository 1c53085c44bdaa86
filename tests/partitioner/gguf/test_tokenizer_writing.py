"""A tokenizer written with its model: our reader gives it back, and what llama.cpp is told splits text as it does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_llama
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ganglion.models import demo_path
from ganglion.partitioner.checkpoint import Checkpoint, MadeFile, open_checkpoint
from ganglion.partitioner.gguf.header import open_gguf
from ganglion.partitioner.gguf.metadata import Metadata
from ganglion.partitioner.gguf.tokenizer_writing import AUTO
from ganglion.partitioner.gguf.tokenizers import SPLITS, Splits, tokenizer_files
from ganglion.partitioner.gguf.writing import write_gguf
from ganglion.wire.errors import InvalidDocument, NotFound, Unsupported

SAMPLES = (
    'class Reader:\n    """Reads."""\n\n    def read(self, n=10):\n        return self.data[:n]\n',
    "for i in range(128):\n    print(i, i * 2.5)\n",
    "<|endoftext|><|user|>Sort a list, please<|end|><|assistant|>",
    "größer als 12 Bäume, 你好",
)


def made(path: Path, splits: Splits) -> Checkpoint:
    """A checkpoint whose tokenizer splits text so."""
    parts: list[Any] = [pre_tokenizers.Split(Regex(one), "isolated") for one in splits.expressions]
    parts += [pre_tokenizers.Digits(individual_digits=True)] if splits.digits else []
    parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits.words)]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splits.whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    if splits.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])  # type: ignore[call-arg]
    tokenizer.train_from_iterator(SAMPLES * 4, trainer)
    tokenizer.add_tokens(["<think>"])
    checkpoint = open_checkpoint(make_llama(path, seed=3, hidden_size=64, vocab_size=320))
    files = {
        "tokenizer.json": MadeFile(lambda: tokenizer.to_str().encode()),
        "tokenizer_config.json": MadeFile(lambda: json.dumps({"eos_token": {"content": "<|end|>"}}).encode()),
    }
    return replace(checkpoint, tokenizer=files)


def read_without_the_copy(path: Path) -> Tokenizer:
    """The tokenizer of the file's own vocabulary, as llama.cpp has it."""
    values = dict(open_gguf(path).metadata)
    del values["tokenizer.huggingface.json"]
    return Tokenizer.from_str(tokenizer_files(Metadata(path, values, "llama"))["tokenizer.json"]().decode())


@pytest.mark.parametrize(
    "pre", ["llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "gpt-2", "olmo", "smollm", "superbpe"]
)
def test_splits_are_found_by_themselves(tmp_path: Path, pre: str) -> None:
    checkpoint = made(tmp_path / "m", SPLITS[pre])
    path = write_gguf(checkpoint, tmp_path / "m.gguf", "F16", tokenizer=AUTO)
    metadata = Metadata(path, open_gguf(path).metadata, "llama")
    assert SPLITS[metadata.text("tokenizer.ggml.pre")] in {SPLITS[pre], replace(SPLITS[pre], begins=False)}
    ours = Tokenizer.from_str(checkpoint.tokenizer["tokenizer.json"].read_bytes().decode())
    theirs = read_without_the_copy(path)
    for text in (*SAMPLES, "a <think> b<|end|>"):
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).ids
    assert metadata.whole("tokenizer.ggml.eos_token_id", least=0) == ours.token_to_id("<|end|>")
    types = metadata.wholes("tokenizer.ggml.token_type")
    assert [types[ours.token_to_id(name)] for name in ("a", "<|end|>", "<think>")] == [1, 3, 4]
    assert len(types) == 320
    assert types[-1] == 5


def test_the_demo_model(tmp_path: Path) -> None:
    """Its splits have no name; the nearest gives the same ids but where a merge reaches over one of its splits."""
    checkpoint = open_checkpoint(demo_path("demo"))
    with pytest.raises(Unsupported, match="no name for how this tokenizer splits"):
        write_gguf(checkpoint, tmp_path / "m.gguf", "F16", tokenizer=AUTO)
    assert not any(tmp_path.iterdir())
    path = write_gguf(checkpoint, tmp_path / "m.gguf", "F16", tokenizer="superbpe")
    back = open_checkpoint(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read, kept = (json.loads(one.tokenizer[name].read_bytes()) for one in (back, checkpoint))
        assert read == kept if name == "tokenizer.json" else read["chat_template"] == kept["chat_template"]
    assert (back.bos_id, back.eos_ids) == (checkpoint.bos_id, checkpoint.eos_ids)
    ours = Tokenizer.from_file(str(demo_path("demo") / "tokenizer.json"))
    theirs = read_without_the_copy(path)
    for text in SAMPLES:
        assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).ids
    fields = GGUFReader(path).fields  # another reader than ours
    assert fields["tokenizer.ggml.pre"].contents() == "superbpe"
    assert fields["tokenizer.ggml.merges"].contents()[0] == "Ġ Ġ"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_what_is_not_written(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_path("demo"))
    path = tmp_path / "m.gguf"
    with pytest.raises(NotFound, match=r"has no tokenizer\.json"):
        write_gguf(replace(checkpoint, tokenizer={}), path, "F16", tokenizer=AUTO)
    with pytest.raises(Unsupported, match=r"tokenizer.ggml.pre 'nothing'"):
        write_gguf(checkpoint, path, "F16", tokenizer="nothing")
    for stored, error in ((b"[]", InvalidDocument), (b"{", InvalidDocument), (b"{}", InvalidDocument)):
        files = {"tokenizer.json": MadeFile(lambda stored=stored: stored)}  # type: ignore[misc]
        with pytest.raises(error, match=r"tokenizer.json"):
            write_gguf(replace(checkpoint, tokenizer=files), path, "F16", tokenizer=AUTO)
    other = {"model": {"type": "Unigram"}, "decoder": None}
    files = {"tokenizer.json": MadeFile(lambda: json.dumps(other).encode())}
    with pytest.raises(Unsupported, match="Unigram; byte-level BPE"):
        write_gguf(replace(checkpoint, tokenizer=files), path, "F16", tokenizer=AUTO)
    assert not any(tmp_path.iterdir())
