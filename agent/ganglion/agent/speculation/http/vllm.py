"""vLLM's way: prompts of ids, and `prompt_logprobs`, which name the likeliest token at every place of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ganglion.agent.speculation.http.checking import Ask, Choice, field, known, likeliest, number, only_choice
from ganglion.wire.errors import ProtocolViolation

PATH: Final = "/completions"
_PREFIX: Final = "token_id:"  # how it spells ids where tokens are wanted as such


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """A dialect (`checking.Dialect`): one pass over the prompt and the window, whatever its length."""

    model: str
    vocab: int
    window_tokens: int
    context: int
    title: str = "prompt_logprobs, by ids"
    top: int = 20  # --max-logprobs

    def usable(self, ids: Sequence[int], window: Sequence[int]) -> int:
        """As the protocol says."""
        return min(len(window), self.window_tokens)

    def ask(self, ids: Sequence[int], window: Sequence[int], *, top: int, more: int = 1) -> Ask:
        """As the protocol says."""
        several = max(2, top)
        document = {
            "model": self.model,
            "prompt": [*ids, *window],
            "max_tokens": more,
            "temperature": 0,
            "repetition_penalty": 1.0,  # a model's generation_config may have another
            "logprobs": several,
            "prompt_logprobs": several,
            "return_tokens_as_token_ids": True,
        }
        return Ask(PATH, document)

    def read(self, reply: Any, ids: Sequence[int], window: Sequence[int], *, top: int) -> list[Choice]:
        """As the protocol says."""
        choice = only_choice(reply)
        rows = choice.get("prompt_logprobs") or reply.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(ids) + len(window):
            told = len(rows) if isinstance(rows, list) else "no"
            raise ProtocolViolation(
                f"the server gave {told} prompt_logprobs for a prompt of {len(ids) + len(window)} tokens"
            )
        found = [self._of_prompt(row, token, top) for row, token in zip(rows[len(ids) :], window, strict=True)]
        drawn = field(field(choice, "logprobs", dict), "top_logprobs", list)
        if not drawn:
            raise ProtocolViolation("the server drew no token after the prompt")
        return found + [self._of_answer(row, top) for row in drawn]

    def _of_prompt(self, row: Any, token: int, top: int) -> Choice:
        if not isinstance(row, dict) or str(token) not in row:
            raise ProtocolViolation(f"the server's prompt_logprobs do not name token {token}, which the prompt has")
        found = {
            self._id(name): number(one.get("logprob") if isinstance(one, dict) else one, "logprob")
            for name, one in row.items()
        }
        return likeliest(found, top)

    def _of_answer(self, row: Any, top: int) -> Choice:
        if not isinstance(row, dict):
            raise ProtocolViolation("the server's top_logprobs hold no tokens")
        return likeliest(
            {self._id(name.removeprefix(_PREFIX)): number(one, "logprob") for name, one in row.items()}, top
        )

    def _id(self, name: str) -> int:
        if not (name.isascii() and name.isdecimal()):
            raise ProtocolViolation(f"the server names a token {name[:20]!r}, which is no id")
        return known(int(name), self.vocab)
