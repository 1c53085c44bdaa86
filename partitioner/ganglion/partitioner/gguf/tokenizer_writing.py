"""A byte-level tokenizer as GGUF metadata, so that llama.cpp makes the same ids of a text as the model's own does.

llama.cpp knows ways of splitting text by name (`pre`) and no expressions, so a tokenizer has to split in one of them.
One that splits in its own way can be written by the nearest of them, which the caller names: ids then differ where the
splits do. "superbpe" sets only digits apart: it suits where hardly any merge reaches over a split. The tokenizer.json
itself goes into the file too, under a key that Hugging Face's tools and our reader take first.
"""

from __future__ import annotations

import json
from typing import Any, Final

from ganglion.partitioner.checkpoint import Checkpoint
from ganglion.partitioner.gguf.tokenizers import CONTROL, NORMAL, SPECIALS, SPLITS, UNUSED, USER_DEFINED, Splits
from ganglion.wire.errors import InvalidDocument, NotFound, Unsupported

AUTO: Final = "auto"
NONE: Final = "none"


def add_tokenizer(writer: Any, checkpoint: Checkpoint, pre: str) -> None:
    """Add the tokenizer of `checkpoint` to a gguf.GGUFWriter, its tokens padded to the model's vocabulary.

    pre: a name of SPLITS, or AUTO for the one that the tokenizer itself splits by. Raises NotFound without a
    tokenizer.json, InvalidDocument for one that does not parse, Unsupported for another kind than byte-level BPE and,
    with AUTO, for splits that have no name.
    """
    where, vocab = f"{checkpoint.path}/tokenizer.json", checkpoint.config.whole("vocab_size")
    document, config = _read(checkpoint, "tokenizer.json"), {}
    if "tokenizer_config.json" in checkpoint.tokenizer:
        config = _read(checkpoint, "tokenizer_config.json")
    try:
        model = document["model"]
        if model["type"] != "BPE" or model.get("byte_fallback") or "ByteLevel" not in json.dumps(document["decoder"]):
            raise Unsupported(f"{where}: {model['type']}; byte-level BPE is written to GGUF", param="tokenizer")
        named = _pre_of(document, where) if pre == AUTO else pre
        if named not in SPLITS:
            raise Unsupported(f"tokenizer.ggml.pre {pre!r}; it is {AUTO} or one of {', '.join(SPLITS)}", param="pre")
        tokens, types = _tokens(document, vocab, where)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        ids = {token: number for number, token in enumerate(tokens)}
        specials = {name: ids[token] for name in SPECIALS if (token := _spelled(config.get(name))) in ids}
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidDocument(f"{where}: {type(error).__name__} at {error}") from error
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(named)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if checkpoint.eos_ids:
        eos = specials.setdefault("eos_token", checkpoint.eos_ids[0])
        for key, number in zip(("eot", "eom"), (one for one in checkpoint.eos_ids if one != eos), strict=False):
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    for name, number in specials.items():
        writer.add_uint32(f"tokenizer.ggml.{SPECIALS[name]}_token_id", number)
    writer.add_add_bos_token(bool(config.get("add_bos_token", _adds(document, tokens, specials.get("bos_token")))))
    writer.add_add_eos_token(bool(config.get("add_eos_token", False)))
    writer.add_string("tokenizer.huggingface.json", checkpoint.tokenizer["tokenizer.json"].read_bytes().decode())
    template = config.get("chat_template")
    if (apart := checkpoint.tokenizer.get("chat_template.jinja")) is not None:
        template = apart.read_bytes().decode("utf-8", "replace")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    file = checkpoint.tokenizer.get(name)
    if file is None:
        raise NotFound(f"{checkpoint.path} has no {name}; a GGUF file with a tokenizer is made from it")
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(f"{checkpoint.path}/{name}: {error}") from error
    if not isinstance(found, dict):
        raise InvalidDocument(f"{checkpoint.path}/{name} is no JSON object")
    return found


def _pre_of(document: dict[str, Any], where: str) -> str:
    before = document.get("pre_tokenizer") or {}
    parts = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    *splits, last = parts
    expressions = [
        part["pattern"]["Regex"] for part in splits if part["type"] == "Split" and part["behavior"] == "Isolated"
    ]
    digits = any(part["type"] == "Digits" and part.get("individual_digits") for part in splits)
    found = Splits(
        tuple(expressions),
        words=bool(last.get("use_regex", True)),
        digits=digits,
        nfc=(document.get("normalizer") or {}).get("type") == "NFC",
        whole=bool(document["model"].get("ignore_merges")),
    )
    understood = last.get("type") == "ByteLevel" and len(expressions) + digits == len(splits)
    for name, known in SPLITS.items():
        same = (known.expressions, known.words, known.digits, known.nfc, known.whole)
        if understood and same == (found.expressions, found.words, found.digits, found.nfc, found.whole):
            return name
    raise Unsupported(
        f"{where}: llama.cpp has no name for how this tokenizer splits text; name the nearest of {', '.join(SPLITS)}",
        param="pre",
    )


def _tokens(document: dict[str, Any], vocab: int, where: str) -> tuple[list[str], list[int]]:
    by_id = {number: (token, NORMAL) for token, number in document["model"]["vocab"].items()}
    for added in document.get("added_tokens") or ():
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if by_id and not 0 <= min(by_id) <= max(by_id) < vocab:
        raise InvalidDocument(f"{where}: token ids up to {max(by_id)}, the model has {vocab} rows")
    found = [by_id.get(number, (f"[PAD{number}]", UNUSED)) for number in range(vocab)]
    return [token for token, _ in found], [kind for _, kind in found]


def _spelled(token: Any) -> str | None:
    """A special token of tokenizer_config.json, which is its text or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


def _adds(document: dict[str, Any], tokens: list[str], bos: int | None) -> bool:
    """Whether the tokenizer's own post-processor begins a text with BOS."""
    return bos is not None and tokens[bos] in json.dumps(document.get("post_processor"), ensure_ascii=False)
