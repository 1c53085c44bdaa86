"""A GGUF file's vocabulary as the tokenizer files that the gateway reads.

A GGUF names a kind of tokenizer ("gpt2" byte-level BPE, "llama" sentencepiece) and, of the first, how text is split
before merging (`pre`); what else those kinds do is fixed here as the original tokenizers have it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from ganglion.partitioner.gguf.metadata import Metadata
from ganglion.wire.errors import InvalidDocument, Unsupported

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
TOKENS: Final = 1 << 20
PIECE_CHARACTERS: Final = 256  # of a sentencepiece token
VOCABULARY_CHARACTERS: Final = 16 << 20
SPACE: Final = "\u2581"
CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3: Final = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2: Final = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
CASED: Final = r"[^\r\n\p{{L}}\p{{N}}]?{u}*{l}+{c}|[^\r\n\p{{L}}\p{{N}}]?{u}+{l}*{c}|\p{{N}}{n}"
CASED_REST: Final = REST.replace(r"[\r\n]*|", r"[\r\n/]*|")
TEKKEN: Final = CASED.format(u=UPPER, l=LOWER, c="", n="") + CASED_REST
GPT_4O: Final = CASED.format(u=UPPER, l=LOWER, c=CONTRACTIONS + "?", n="{1,3}") + CASED_REST
# DeepSeek's own table lists the cased letters of an older Unicode; the property adds the letters that came since.
DEEPSEEK: Final = (
    "[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)


@dataclass(frozen=True)
class Splits:
    """How a byte-level tokenizer splits text: expressions in turn, or GPT-2's own (`words`), digits apart (`digits`).

    whole: a piece that is a token is taken unmerged. begins: whether texts begin with BOS where the file is silent.
    """

    expressions: tuple[str, ...] = ()
    words: bool = False
    digits: bool = False
    nfc: bool = False
    whole: bool = False
    begins: bool = False


SPLITS: Final = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), Splits((LLAMA3,), whole=True, begins=True)
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splits((LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), Splits((QWEN2,), nfc=True)),
    "tekken": Splits((TEKKEN,), whole=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Splits((GPT_4O,))),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt"), Splits(words=True)),
    "olmo": Splits(words=True, nfc=True),
    **dict.fromkeys(("smollm", "refact", "starcoder"), Splits(words=True, digits=True)),
    "command-r": Splits(words=True, digits=True, nfc=True),
    "deepseek-llm": Splits(DEEPSEEK),
    "superbpe": Splits((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
}
KINDS: Final = ("gpt2", "llama")
SPECIALS: Final = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",
    "mask_token": "mask",
}


def tokenizer_files(metadata: Metadata) -> dict[str, Callable[[], bytes]]:
    """How to make tokenizer.json and tokenizer_config.json, or nothing where the file has no vocabulary.

    Everything is checked at once, so that making them (seconds for a large vocabulary) cannot fail. Raises
    InvalidDocument naming the key, Unsupported naming the kinds of tokenizer that are read.
    """
    kind = metadata.text("tokenizer.ggml.model", "none")
    if kind in {"none", "no_vocab"}:
        return {}
    if kind not in KINDS:
        raise Unsupported(f"{metadata.path}: tokenizer {kind!r}; supported are {', '.join(KINDS)}", param="tokenizer")
    vocabulary = _vocabulary(metadata)
    config = _dumped(_config(metadata, vocabulary.tokens, kind))
    own = metadata.text("tokenizer.huggingface.json", "").encode()
    if own:
        return {"tokenizer.json": lambda: own, "tokenizer_config.json": lambda: config}
    build = _byte_level(metadata, vocabulary) if kind == "gpt2" else _sentencepiece(metadata, vocabulary)
    return {"tokenizer.json": lambda: _dumped(build()), "tokenizer_config.json": lambda: config}


def _dumped(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


@dataclass(frozen=True)
class _Vocabulary:
    tokens: tuple[str, ...]
    types: list[int]

    def added(self, kept: frozenset[int]) -> list[dict[str, Any]]:
        """The tokens of types UNKNOWN, CONTROL and USER_DEFINED that are matched whole, but those in `kept`."""
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != USER_DEFINED,
            }
            for number, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in {UNKNOWN, CONTROL, USER_DEFINED} and number not in kept
        ]


def _vocabulary(metadata: Metadata) -> _Vocabulary:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not 1 <= len(tokens) <= TOKENS:
        raise InvalidDocument(f"{metadata.path}: a vocabulary of {len(tokens)} tokens, 1 to {TOKENS} are accepted")
    types = metadata.wholes("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise InvalidDocument(f"{metadata.path}: {len(types)} token types for {len(tokens)} tokens")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise InvalidDocument(f"{metadata.path}: token {twice[:80]!r} twice in the vocabulary")
    if any(not token for token in tokens):
        raise InvalidDocument(f"{metadata.path}: token {tokens.index('')} is empty")
    return _Vocabulary(tokens, types)


def _special(metadata: Metadata, tokens: tuple[str, ...], name: str) -> str | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if not metadata.has(key):
        return None
    number = metadata.whole(key, least=0)
    if number >= len(tokens):
        raise InvalidDocument(f"{metadata.path}: {key} is {number}, the vocabulary has {len(tokens)} tokens")
    return tokens[number]


def _config(metadata: Metadata, tokens: tuple[str, ...], kind: str) -> dict[str, Any]:
    specials = {name: _special(metadata, tokens, key) for name, key in SPECIALS.items()}
    templates = [
        {"name": name, "template": metadata.text(f"tokenizer.chat_template.{name}")}
        for name in metadata.texts("tokenizer.chat_templates")
    ]
    template: Any = metadata.text("tokenizer.chat_template", "") or None
    if templates and not any(named["name"] == "default" for named in templates) and template:
        templates.insert(0, {"name": "default", "template": template})
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(metadata, kind),
        "add_eos_token": metadata.flag("tokenizer.ggml.add_eos_token", False),
        "chat_template": templates or template,
    }
    return {name: value for name, value in (config | specials).items() if value is not None}


def _adds_bos(metadata: Metadata, kind: str) -> bool:
    usual = SPLITS.get(metadata.text("tokenizer.ggml.pre", ""), Splits())
    return metadata.flag("tokenizer.ggml.add_bos_token", kind == "llama" or usual.begins)


def _splits(metadata: Metadata) -> Splits:
    pre = metadata.text("tokenizer.ggml.pre", "(none named)")
    if pre not in SPLITS:
        raise Unsupported(
            f"{metadata.path}: tokenizer.ggml.pre {pre[:80]!r}; supported are {', '.join(SPLITS)}", param="tokenizer"
        )
    return SPLITS[pre]


def _post_processor(metadata: Metadata, vocabulary: _Vocabulary, kind: str) -> dict[str, Any] | None:
    """BOS before and EOS after a text, where the file asks for them."""
    used: dict[str, str] = {}
    wanted = {"bos": _adds_bos(metadata, kind), "eos": metadata.flag("tokenizer.ggml.add_eos_token", False)}
    for name, adds in wanted.items():
        token = _special(metadata, vocabulary.tokens, name)
        if adds and token is not None:
            used[name] = token
    if not used:
        return None
    around = {name: [{"SpecialToken": {"id": token, "type_id": 0}}] for name, token in used.items()}

    def sequence(which: str) -> list[dict[str, Any]]:
        return [*around.get("bos", []), {"Sequence": {"id": which, "type_id": 0}}, *around.get("eos", [])]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A"),
        "pair": [*sequence("A"), *sequence("B")],
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.tokens.index(token)], "tokens": [token]} for token in used.values()
        },
    }


def _document(added: list[dict[str, Any]], model: dict[str, Any], **parts: dict[str, Any] | None) -> dict[str, Any]:
    described = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    shared = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return described | parts | {"model": shared | model}


def _byte_level(metadata: Metadata, vocabulary: _Vocabulary) -> Callable[[], dict[str, Any]]:
    splits = _splits(metadata)
    merges = [merge.split(" ") for merge in metadata.texts("tokenizer.ggml.merges")]
    vocab = {
        token: number
        for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind != UNUSED
    }
    for merge in merges:
        if len(merge) != 2 or any(part not in vocab for part in (*merge, "".join(merge))):
            raise InvalidDocument(f"{metadata.path}: merge {' '.join(merge)[:80]!r} is not of two tokens to a third")
    bytes_apart = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": splits.words}
    before: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in splits.expressions
    ]
    if splits.digits:
        before.append({"type": "Digits", "individual_digits": True})
    model = {
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": splits.whole,
        "vocab": vocab,
        "merges": merges,
    }
    after = _post_processor(metadata, vocabulary, "gpt2")
    return lambda: _document(
        vocabulary.added(frozenset()),
        model,
        normalizer={"type": "NFC"} if splits.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*before, bytes_apart]} if before else bytes_apart,
        post_processor=after,
        decoder=bytes_apart | {"use_regex": True},
    )


def _sentencepiece(metadata: Metadata, vocabulary: _Vocabulary) -> Callable[[], dict[str, Any]]:
    """Sentencepiece BPE with byte fallback; a Gemma's puts no space before a text and merges in the order of ids."""
    gemma = metadata.architecture.startswith("gemma")
    # A run of spaces is stored as spaces, and looked up as the pieces have it.
    runs = frozenset(n for n, token in enumerate(vocabulary.tokens) if len(token) > 1 and not token.strip(" "))
    tokens = tuple(SPACE * len(t) if n in runs else t for n, t in enumerate(vocabulary.tokens))
    scores = metadata.numbers("tokenizer.ggml.scores")
    if not gemma and len(scores) != len(tokens):
        raise InvalidDocument(f"{metadata.path}: {len(scores)} token scores for {len(tokens)} tokens")
    ranks = [-float(number) for number in range(len(tokens))] if gemma else scores
    pieces = {
        token: number
        for number, (token, kind) in enumerate(zip(tokens, vocabulary.types, strict=True))
        if kind == NORMAL or number in runs
    }
    _check_pieces(metadata, pieces)
    model = {
        "unk_token": _special(metadata, tokens, "unknown"),
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
    }
    spaced = metadata.flag("tokenizer.ggml.add_space_prefix", not gemma)
    shown = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [shown, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spaced:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if spaced:  # before every stretch of text between special tokens, as Llama 2's own files have it
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
    after = _post_processor(metadata, vocabulary, "llama")
    return lambda: _document(
        vocabulary.added(runs),
        model | {"merges": _merges(pieces, ranks)},
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        post_processor=after,
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _check_pieces(metadata: Metadata, pieces: dict[str, int]) -> None:
    """Merging takes time with the square of a piece's length."""
    if sum(map(len, pieces)) > VOCABULARY_CHARACTERS:
        raise InvalidDocument(f"{metadata.path}: a vocabulary of over {VOCABULARY_CHARACTERS} characters")
    for piece, number in pieces.items():
        if len(piece) > PIECE_CHARACTERS:
            raise InvalidDocument(
                f"{metadata.path}: token {number} has {len(piece)} characters, at most {PIECE_CHARACTERS} are accepted"
            )


def _merges(pieces: dict[str, int], ranks: list[float]) -> list[list[str]]:
    """Every way to put a piece together of two, the best piece's first: what sentencepiece does with scores."""
    found: list[tuple[float, int, int, int, str, str]] = []
    for piece, number in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-ranks[number], number, pieces[left], pieces[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]
