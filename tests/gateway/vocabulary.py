"""A vocabulary of bytes for llguidance, and random answers under a grammar."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

EOS = 256
LONGEST_TOKENS = 20000


class _Wrapped:
    """What llguidance asks of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = None

    def __init__(self, added: Sequence[str], special: bool) -> None:
        self.tokens = [*(bytes([byte]) for byte in range(256)), b"</s>", *(text.encode() for text in added)]
        self.special_token_ids = [EOS, *(range(EOS + 1, len(self.tokens)) if special else ())]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


class ByteVocabulary:
    """Ids 0..255 are the bytes, 256 is the end, `added` tokens follow; `special`: as llguidance sees these."""

    def __init__(self, added: Sequence[str] = (), *, special: bool = True) -> None:
        wrapped = _Wrapped(added, special)
        self.tokens = wrapped.tokens
        self.ids = {text: EOS + 1 + at for at, text in enumerate(added)}
        self._tokenizer = LLTokenizer(TokenizerWrapper(wrapped))

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def encode(self, text: str) -> list[int]:
        """`text` with its added tokens as such."""
        found = [(text.index(name), name) for name in self.ids if name in text]
        if not found:
            return list(text.encode())
        at, name = min(found)
        return [*text[:at].encode(), self.ids[name], *self.encode(text[at + len(name) :])]

    def allows(self, grammar: str, text: str) -> bool:
        """Whether `text` is a whole answer."""
        matcher, ids = self.matcher(grammar), self.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    def walk(self, grammar: str, seed: int) -> str:
        """A random answer: each token drawn from those that the grammar allows, until it ends."""
        matcher, drawn, said = self.matcher(grammar), random.Random(seed), bytearray()
        for _ in range(LONGEST_TOKENS):
            if matcher.is_stopped():
                break
            mask = matcher.compute_bitmask()
            assert not matcher.is_error(), matcher.get_error()
            token = drawn.choice([at for at in range(len(self.tokens)) if mask[at >> 3] >> (at & 7) & 1])
            if token == EOS:
                break
            assert matcher.consume_token(token)
            said += self.tokens[token]
        else:
            raise AssertionError("the answer does not end")
        return said.decode()
