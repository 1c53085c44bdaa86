"""A model's tokenizer: text to ids, ids to text, one id to its bytes. Its files are foreign and not trusted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from ganglion.gateway.calls import CallFormat, format_of
from ganglion.gateway.detokenizing import BYTE_TOKEN, Detokenizer
from ganglion.wire.errors import Corrupt, InvalidRequest, NotFound

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

T = TypeVar("T")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the special tokens that it may name; `with_tools`: another one for when tools are given."""

    source: str
    specials: Mapping[str, str]
    with_tools: str | None = None

    @property
    def calls(self) -> CallFormat:
        """How the model that this template is for calls tools."""
        return format_of(self.with_tools or self.source)

    def for_tools(self) -> ChatTemplate:
        """The template to render when tools are given."""
        return self if self.with_tools is None else ChatTemplate(self.with_tools, self.specials)


class ModelTokenizer:
    """The tokenizer of one model, from a folder with its files; raises NotFound or Corrupt naming the file."""

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER_FILE
        if not path.exists():
            raise NotFound(f"the model has no {TOKENIZER_FILE}: text cannot be turned into tokens")
        self._tokenizer: Any = _guarded(TOKENIZER_FILE, lambda: Tokenizer.from_file(str(path)))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        described = _guarded(TOKENIZER_FILE, lambda: json.loads(self._tokenizer.to_str(pretty=False)))
        decoders = _types(described.get("decoder"))
        self._byte_level = "ByteLevel" in decoders or "ByteLevel" in _types(described.get("pre_tokenizer"))
        self._byte_fallback = "ByteFallback" in decoders
        added = described.get("added_tokens") or ()
        self._added = {entry["id"]: entry["content"] for entry in added}
        self._special = frozenset(entry["id"] for entry in added if entry["special"])
        self.added: Mapping[str, int] = {content: token for token, content in self._added.items()}
        self.template = _template(folder)

    def encode(self, text: str, *, with_specials: bool) -> list[int]:
        """Ids of `text`; `with_specials` applies the tokenizer's own post-processor (its BOS, for example)."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=with_specials).ids
        except BaseException as error:
            if not _is_fault(error):
                raise
            raise InvalidRequest("the model's tokenizer cannot encode this text") from None
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def hidden(self, text: str) -> dict[int, str]:
        """The token that is `text` by itself, if decoding leaves it out; else nothing."""
        token = self.added.get(text)
        return {} if token is None or token not in self._special else {token: text}

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """A streaming decoder for text that goes on from `prompt`, or stands alone."""
        return Detokenizer(self.decode, self._is_open, prompt)

    def _is_open(self, token: int) -> bool:
        if token in self._special:
            return True
        if not self._byte_fallback:
            return False
        name = self._tokenizer.id_to_token(token)
        return name is not None and BYTE_TOKEN.fullmatch(name) is not None

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to a text; of an id outside the vocabulary, none."""
        if token in self._added:
            return str(self._added[token]).encode()
        name: str | None = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF.get(character) or character.encode() for character in name)
        if self._byte_fallback and BYTE_TOKEN.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        return name.replace("\u2581", " ").encode()

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, U+FFFD for what is not a character by itself."""
        return self.token_bytes(token).decode("utf-8", "replace")


def _byte_characters() -> dict[str, bytes]:
    """The printable stand-ins of bytes in byte-level vocabularies (GPT-2's `bytes_to_unicode`, turned round)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    characters = {chr(byte): bytes([byte]) for byte in plain}
    return characters | {chr(256 + number): bytes([byte]) for number, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _is_fault(error: BaseException) -> bool:
    # A panic of the Rust library derives from BaseException only.
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _guarded(name: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except BaseException as error:
        if not _is_fault(error):
            raise
        raise Corrupt(f"{name} of the model cannot be read ({type(error).__name__})") from None


def _types(part: Any) -> set[str]:
    """Every `type` named in a part of tokenizer.json."""
    return set(re.findall(r'"type":\s*"(\w+)"', json.dumps(part)))


def _document(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.exists():
        return {}
    found = _guarded(name, lambda: json.loads(path.read_text("utf-8")))
    if not isinstance(found, dict):
        raise Corrupt(f"{name} of the model is not a JSON object")
    return found


def _template(folder: Path) -> ChatTemplate | None:
    config = _document(folder, CONFIG_FILE)
    own = folder / TEMPLATE_FILE
    source: Any = _guarded(TEMPLATE_FILE, lambda: own.read_text("utf-8")) if own.exists() else None
    source = source or config.get("chat_template")
    with_tools: Any = None
    if isinstance(source, list):  # several named templates: tools have one of their own
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source, with_tools = named.get("default"), named.get("tool_use")
    if not isinstance(source, str) or not source:
        return None
    specials = _document(folder, SPECIALS_FILE) | config
    texts = {name: _content(specials.get(name)) for name in SPECIAL_NAMES}
    named_texts = {name: text for name, text in texts.items() if text is not None}
    return ChatTemplate(source, named_texts, with_tools if isinstance(with_tools, str) and with_tools else None)


def _content(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
