"""Tokenizers written into a GGUF as llama.cpp's converter writes them, and read back: the same ids for any text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ganglion.partitioner.gguf.header import open_gguf
from ganglion.partitioner.gguf.metadata import Metadata
from ganglion.partitioner.gguf.tokenizers import SPLITS, tokenizer_files

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again; isn't it 1234567 times too OFTEN?",
    "def add(a, b):\n    return a + b  # 3.14159\n\n\n\tx = {'key': [1, 22, 333]}",
    "Größere Bäume wachsen in München; I'll say we've seen they're RUNNING'S course.",
    "数字 12 和 345 在北京，你好世界。 Привет, мир! नमस्ते दुनिया café naïve e\u0301",
    "  leading spaces   and    more     spaces\r\n\r\n windows  ",
    "aaaaaaaaaa abababab CamelCaseWords HTTPServer iPhone's ÉCOLE ﬁne",
]
TEXTS = st.text(
    st.sampled_from("abeoT SHE'stlmd 01923.,;!?\n\r\t  éßüПрив你好世नम\u0301\u200d😀ﬁÉ_{}[]/\\<>|▁\x00\xa0"),
    max_size=60,
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(split: str | None, *, digits: bool = False) -> Any:
    """A pre-tokenizer as the originals have it: an expression or GPT-2's own."""
    if split is not None:
        first = pre_tokenizers.Split(Regex(split), "isolated")
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words]) if digits else words


# pre -> pre-tokenizer, normalizer, ignore_merges
ORIGINALS: dict[str, tuple[Any, Any, bool]] = {
    "llama-bpe": (byte_level(LLAMA3), None, True),
    "dbrx": (byte_level(LLAMA3), None, False),
    "qwen2": (byte_level(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), normalizers.NFC(), False),
    "tekken": (byte_level(TEKKEN), None, True),
    "gpt-4o": (byte_level(GPT_4O), None, False),
    "gpt-2": (byte_level(None), None, False),
    "olmo": (byte_level(None), normalizers.NFC(), False),
    "smollm": (byte_level(None, digits=True), None, False),
    "refact": (byte_level(None, digits=True), None, False),
    "command-r": (byte_level(None, digits=True), normalizers.NFC(), False),
}


def original(pre: str) -> Tokenizer:
    """A byte-level tokenizer trained with the splits of `pre`, with three tokens added."""
    splits, normalizer, whole = ORIGINALS[pre]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = splits
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))  # type: ignore[call-arg]
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=learned["vocab"], merges=merges, ignore_merges=whole))
    tokenizer.pre_tokenizer = splits
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def files_of(path: Path, kind: str, write: Any) -> dict[str, bytes]:
    writer = gguf.GGUFWriter(path, kind)
    write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    made = tokenizer_files(Metadata(path, open_gguf(path).metadata, kind))
    return {name: make() for name, make in made.items()}


def write_byte_level(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str, holes: int = 2) -> None:
    """What the converter writes, the vocabulary padded to a model's rows."""
    model = json.loads(tokenizer.to_str())
    size = tokenizer.get_vocab_size()
    tokens, types = [], []
    added = {entry["id"]: entry["special"] for entry in model["added_tokens"]}
    for number in range(size + holes):
        token = tokenizer.id_to_token(number)
        tokens.append(f"[PAD{number}]" if token is None else token)
        special = added.get(number)
        types.append(5 if token is None else 1 if special is None else 3 if special else 4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in model["model"]["merges"]])
    writer.add_bos_token_id(size - 3)
    writer.add_eos_token_id(size - 2)


@pytest.fixture(scope="module", params=ORIGINALS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    tokenizer = original(request.param)
    path = tmp_path_factory.mktemp("tokenizer") / "model.gguf"
    files = files_of(path, "llama", lambda writer: write_byte_level(writer, tokenizer, request.param))
    return tokenizer, Tokenizer.from_str(files["tokenizer.json"].decode())


def test_byte_level(pair):
    first, ours = pair

    @settings(max_examples=60, deadline=None, database=None)
    @given(TEXTS)
    def same(text: str) -> None:
        expected = first.encode(text, add_special_tokens=False).ids
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == expected
        assert ours.decode(ids, skip_special_tokens=False) == first.decode(expected, skip_special_tokens=False)

    same()
    for text in [*CORPUS, "<|begin|>Hi<think> so</think><|end|> <|end", "x<think>"]:
        assert ours.encode(text, add_special_tokens=False).ids == first.encode(text, add_special_tokens=False).ids
        assert ours.decode(first.encode(text).ids) == first.decode(first.encode(text).ids)


def test_every_kind_of_split_loads_and_keeps_text(tmp_path):
    base = original("gpt-2")
    for number, pre in enumerate(SPLITS):
        path = tmp_path / f"{number}.gguf"
        files = files_of(path, "llama", lambda writer, pre=pre: write_byte_level(writer, base, pre))
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        for text in CORPUS[:3]:
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_deepseek_splits_lines_letters_han_and_digits(tmp_path):
    base = original("gpt-2")
    files = files_of(tmp_path / "x.gguf", "llama", lambda writer: write_byte_level(writer, base, "deepseek-llm"))
    splits = Tokenizer.from_str(files["tokenizer.json"].decode()).pre_tokenizer
    pieces = [end - start for _, (start, end) in splits.pre_tokenize_str("Hi there,\n\n数字and 12x!!")]
    assert pieces == [len(piece) for piece in ("Hi", " there", ",", "\n", "\n", "数字", "and", " ", "12", "x", "!!")]


def test_specials_and_templates(tmp_path):
    base = original("llama-bpe")
    size = base.get_vocab_size()

    def write(writer: gguf.GGUFWriter) -> None:
        write_byte_level(writer, base, "llama-bpe")
        writer.add_chat_template([{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}])
        writer.add_pad_token_id(size - 2)
        writer.add_add_eos_token(True)

    files = files_of(tmp_path / "x.gguf", "llama", write)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|begin|>", "<|end|>", "<|end|>")
    named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
    assert named == {"default": "D", "tool_use": "T"}
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("a").ids == [size - 3, *base.encode("a").ids, size - 2]  # llama-bpe begins with BOS

    def plain(writer: gguf.GGUFWriter) -> None:
        write_byte_level(writer, base, "llama-bpe")
        writer.add_add_bos_token(False)
        writer.add_chat_template("only")

    files = files_of(tmp_path / "y.gguf", "llama", plain)
    assert json.loads(files["tokenizer_config.json"])["chat_template"] == "only"
    assert Tokenizer.from_str(files["tokenizer.json"].decode()).encode("a").ids == base.encode("a").ids
    assert files_of(tmp_path / "z.gguf", "llama", lambda writer: None) == {}


def pieces_of(corpus: Sequence[str]) -> tuple[list[str], list[float], list[int]]:
    """A sentencepiece vocabulary: unknown, BOS, EOS, the bytes, learned pieces by falling score, characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trained.train_from_iterator(list(corpus) * 3, trainers.BpeTrainer(vocab_size=260))  # type: ignore[call-arg]
    vocab = sorted(trained.get_vocab(), key=lambda token: (len(token) == 1, trained.token_to_id(token)))
    learned = [token for token in vocab if len(token) > 1]
    letters = [token for token in vocab if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned, *letters]
    scores = [0.0] * 259 + [-float(n) for n in range(len(learned) + len(letters))]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(learned) + len(letters))
    return tokens, scores, types


def dumb_sentencepiece(
    text: str, tokens: list[str], scores: list[float], types: list[int], *, prefix: bool
) -> list[int]:
    """Join the two neighbors that make the best piece, the leftmost first, until none do; bytes for the rest."""
    ids = {token: number for number, token in enumerate(tokens) if types[number] == 1}
    symbols = list((" " if prefix and text else "") + text)
    symbols = ["▁" if symbol == " " else symbol for symbol in symbols]
    while True:
        joins = [(scores[ids[a + b]], -at) for at, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not joins:
            break
        at = -max(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def sentencepiece(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    kind = request.param
    tokens, scores, types = pieces_of(CORPUS)
    if kind == "gemma2":  # runs of spaces are written as spaces; scores say nothing
        tokens, types = [*tokens, "  ", "   ", "<start>"], [*types, 4, 4, 3]
        scores = np.random.default_rng(0).normal(size=len(tokens)).tolist()

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if kind == "gemma2":
            writer.add_add_space_prefix(False)

    files = files_of(tmp_path_factory.mktemp("pieces") / "model.gguf", kind, write)
    if kind == "gemma2":
        tokens = ["▁" * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
        types = [1 if kind == 4 else kind for kind in types]
        scores = [-float(number) for number in range(len(tokens))]
    return kind, Tokenizer.from_str(files["tokenizer.json"].decode()), tokens, scores, types


def test_sentencepiece(sentencepiece):
    kind, ours, tokens, scores, types = sentencepiece

    @settings(max_examples=150, deadline=None, database=None)
    @given(TEXTS)
    def same(text: str) -> None:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == dumb_sentencepiece(text, tokens, scores, types, prefix=kind == "llama")
        assert ours.decode(ids) == text.replace("▁", " ")

    same()
    for text in CORPUS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == dumb_sentencepiece(text, tokens, scores, types, prefix=kind == "llama")
    assert ours.encode("The").ids[0] == 1  # BOS unless the file says otherwise
    marked = ours.encode("a</s>b", add_special_tokens=False).ids
    assert marked.count(2) == 1


@pytest.mark.parametrize("sentencepiece", ["llama"], indirect=True)
def test_sentencepiece_equals_the_tokenizer_that_hubs_have_for_llama_2(sentencepiece):
    _, ours, tokens, scores, types = sentencepiece
    vocab = {token: number for number, token in enumerate(tokens)}
    normal = {token for token in vocab if types[vocab[token]] == 1}
    merges = sorted(
        ((t[:at], t[at:]) for t in normal for at in range(1, len(t)) if {t[:at], t[at:]} <= normal),
        key=lambda pair: (-scores[vocab["".join(pair)]], vocab[pair[0]], vocab[pair[1]]),
    )
    hub = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    hub.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    hub.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hub.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    hub.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    for text in [*CORPUS, "<s>[INST] Hi [/INST] Hello</s><s>[INST] there", " a", "", "   ", "😀é"]:
        assert ours.encode(text).ids == hub.encode(text).ids
        assert ours.decode(hub.encode(text).ids) == hub.decode(hub.encode(text).ids)
