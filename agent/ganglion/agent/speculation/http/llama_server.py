"""llama.cpp's own server: prompts of ids at /completion, and log-probabilities of what it draws, never of the prompt.

So every prefix is a prompt of its own, all in one request: the server runs them in its slots together, each slot keeps
what it has run (`cache_prompt`) and runs what is new. A window needs a slot for each of its tokens and one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ganglion.agent.speculation.http.checking import Ask, Choice, field, known, likeliest, number
from ganglion.wire.errors import ProtocolViolation

PATH: Final = "/completion"


@dataclass(frozen=True, slots=True)
class Prefixes:
    """A dialect (`checking.Dialect`); window_tokens is one less than the server has slots."""

    vocab: int
    window_tokens: int
    context: int
    title: str = "a prompt for each prefix"
    top: int = 20

    def usable(self, ids: Sequence[int], window: Sequence[int]) -> int:
        """As the protocol says."""
        return min(len(window), self.window_tokens)

    def ask(self, ids: Sequence[int], window: Sequence[int], *, top: int, more: int = 1) -> Ask:
        """As the protocol says; `more` is of the last prefix only where there is no window."""
        document = {
            "prompt": [[*ids, *window[:count]] for count in range(len(window) + 1)],
            "n_predict": more if not window else 1,
            "temperature": 0,
            "n_probs": max(2, top),
            "repeat_penalty": 1.0,
            "cache_prompt": True,
            "return_tokens": True,
        }
        return Ask(PATH, document, root=True)

    def read(self, reply: Any, ids: Sequence[int], window: Sequence[int], *, top: int) -> list[Choice]:
        """As the protocol says."""
        replies = reply if isinstance(reply, list) else [reply]
        if len(replies) != len(window) + 1:
            raise ProtocolViolation(f"the server answered {len(replies)} of {len(window) + 1} prompts")
        by_index = {field(one, "index", int): one for one in replies}
        if sorted(by_index) != list(range(len(window) + 1)):
            raise ProtocolViolation(f"the server answered prompts {sorted(by_index)} of {len(window) + 1}")
        found: list[Choice] = []
        for index in range(len(window) + 1):
            one = by_index[index]
            asked = len(ids) + index
            if one.get("tokens_evaluated", asked) != asked:
                raise ProtocolViolation(f"the server ran {one['tokens_evaluated']} tokens of a prompt of {asked}")
            found += self._drawn(one, top)
        return found

    def _drawn(self, one: Any, top: int) -> list[Choice]:
        tokens, rows = field(one, "tokens", list), one.get("completion_probabilities")
        if isinstance(rows, list) and rows:
            return [self._choice(row, top) for row in rows]
        if tokens and isinstance(tokens[0], int):  # a part of a character: it lists no row of it
            return [Choice(known(tokens[0], self.vocab))]
        if one.get("stop_type") != "eos":
            raise ProtocolViolation("the server drew no token after a prompt")
        return [Choice(None)]

    def _choice(self, row: Any, top: int) -> Choice:
        found = {}
        for one in [row, *field(row, "top_logprobs", list)]:
            found[known(field(one, "id", int), self.vocab)] = number(one.get("logprob"), "logprob")
        return likeliest(found, top)
