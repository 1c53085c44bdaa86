"""Tokens to text as they come: the pieces joined are the text of the whole.

A window of recent ids is decoded twice, without and with the new ones, and the difference is given out (as
text-generation servers do): decoders that strip a leading space or join characters from bytes then see their context.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
PROMPT_TAIL_TOKENS = 8  # enough for the context of any decoder's prefix rules


class Detokenizer:
    """Decodes one growing sequence of ids.

    `decode(ids) -> str` is the tokenizer's own; `is_open(id)` says after which ids the text is not decided: single
    bytes of a byte-fallback vocabulary (such a decoder decides on a run of them as a whole) and special tokens, which
    leave no text and do not end a run.
    `prompt`: ids before the first one, when the text goes on from them (completions); empty when it stands alone.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], is_open: Callable[[int], bool], prompt: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._is_open = is_open
        self._window = list(prompt[-PROMPT_TAIL_TOKENS:])
        self._read = len(self._window)  # ids of the window whose text was given out

    def push(self, token: int) -> str:
        """Take one id; give out the text that it completes, "" while a character is unfinished."""
        self._window.append(token)
        if self._is_open(token):
            return ""
        text = self._difference()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text

    def finish(self) -> str:
        """No more ids: give out what was held, unfinished characters as U+FFFD."""
        text = self._difference()
        self._read = len(self._window)
        return text

    def _difference(self) -> str:
        before = self._decode(self._window[: self._read])
        after = self._decode(self._window)
        return after[_shared(before, after) :]


def _shared(before: str, after: str) -> int:
    """How many characters both begin with: normally all of `before`, unless a character of it was unfinished."""
    if after.startswith(before):
        return len(before)
    return next((at for at, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), len(after))
