"""Tokens and their texts, for servers that take and give text only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ganglion.agent.lead.grammar import readable_tokenizer
from ganglion.wire.errors import Corrupt

_SPELLINGS: Final = 2  # more than one is too many


class TokenTexts:
    """The bytes of every token of a tokenizer.json, and which tokens a text may be. Raises Corrupt for no tokenizer."""

    def __init__(self, tokenizer: bytes, vocab: int, *, eos_ids: Sequence[int], name: str) -> None:
        """`vocab`: rows of the model; ids beyond the tokenizer's have no text. `name`: of the model, for messages."""
        from llguidance import LLTokenizer

        try:
            read = LLTokenizer(readable_tokenizer(tokenizer, name), eos_token=list(eos_ids) or None)
        except ValueError as error:
            raise Corrupt(f"tokenizer.json of model {name}: {str(error)[:300]}") from error
        self.vocab = vocab
        self.name = name
        self.eos_ids = frozenset(eos_ids)
        known = min(vocab, read.vocab_size)
        self._bytes = [bytes(read.decode_bytes([number])) for number in range(known)]
        self._special = frozenset(number for number in range(known) if read.is_special_token(number))
        self._ids: dict[str, list[int]] = {}
        for number in range(known):
            self._ids.setdefault(self.label(number), []).append(number)

    def text(self, ids: Sequence[int]) -> str | None:
        """What the ids spell; None where they end or begin within a character, or have no text."""
        try:
            return b"".join(self._bytes[number] for number in ids).decode()
        except (UnicodeDecodeError, IndexError):
            return None

    def label(self, token: int) -> str:
        """A token as a server shows it alone: without special tokens and bytes that are no whole characters."""
        if token in self._special or token >= len(self._bytes):
            return ""
        return self._bytes[token].decode("utf-8", "ignore")

    def shows(self, token: int, label: str, *, first: bool) -> bool:
        """Whether `label` may be the server's for `token`; the first of a text may have lost the space before it."""
        own = self.label(token)
        if label == own or (first and label == own.removeprefix(" ")):
            return True
        spelled = self._bytes[token] if token < len(self._bytes) else b""
        if token in self._special:
            return label.encode() == spelled
        return label == spelled.decode("utf-8", "replace")

    def only(self, label: str) -> int | None:
        """The one token with this label; None where there are several, or none."""
        found = self._ids.get(label, ())
        return found[0] if len(found) == 1 and label else None

    def knows(self, label: str) -> bool:
        """Whether any token has this label."""
        return label in self._ids

    def spelled(self, text: str, count: int) -> list[int] | None:
        """The one way to spell `text` in `count` tokens of which each but the last ends within a character, or None."""
        found: list[list[int]] = []
        for ids in self._spellings(text.encode(), count):
            found.append(ids)
            if len(found) == _SPELLINGS:
                return None
        return found[0] if found else None

    def _spellings(self, spelled: bytes, count: int) -> Iterator[list[int]]:
        if count <= 0:
            return
        for number, part in enumerate(self._bytes):
            if not part or not spelled.startswith(part) or number in self._special:
                continue
            rest = spelled[len(part) :]
            if count == 1:
                if not rest:
                    yield [number]
            elif rest and self.label(number).encode() != part:
                yield from ([number, *others] for others in self._spellings(rest, count - 1))
