"""What one expert's answer is made of, whoever gives it: Taken, then Said as often as it likes, then Over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """The expert has the request. numeric_class: what its tokens depend on. "" and 0 where it is not known."""

    numeric_class: str = ""
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Said:
    """Text, how many tokens came with it, and the natural log-probabilities of those that have one."""

    text: str
    tokens: int
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Over:
    """It is whole. reason: OpenAI's finish_reason."""

    reason: str
    prompt_tokens: int
    completion_tokens: int


Part = Taken | Said | Over
