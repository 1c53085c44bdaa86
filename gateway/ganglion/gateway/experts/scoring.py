"""Pure: which of several answers is kept.

Vote: answers whose normalized texts are equal stand together; a group weighs what the gate gives its members' experts.
Rerank: an answer's score is the mean log-probability of its tokens as its own expert gives them, plus the logarithm of
the gate's weight of that expert. The mean (not the sum) makes long and short answers comparable; it is at most 0, so
log weight bounds what an answer that is still being made can reach. An expert that gives no log-probabilities stands in
with the logarithm of the quality that the gate expects of it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

LEAST: Final = 1e-9  # of a weight or quality, before its logarithm
ENOUGH: Final = math.log(0.9)  # mean log-probability at which a search for a better answer ends early


def normalized(text: str) -> str:
    """What counts as one answer in a vote: NFKC, case folded, white space to single spaces, no punctuation around."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    begin, end = 0, len(text)
    while begin < end and _is_edge(text[begin]):
        begin += 1
    while end > begin and _is_edge(text[end - 1]):
        end -= 1
    return text[begin:end] or text


def _is_edge(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in {"Po", "Ps", "Pe", "Pi", "Pf"}


@dataclass(frozen=True)
class Answered:
    """One whole answer. attempt: its number. mean_logprob: None where its expert gives none."""

    attempt: int
    text: str
    weight: float
    quality: float
    mean_logprob: float | None = None


def score(weight: float, quality: float, mean_logprob: float | None) -> float:
    """Of an answer, as the module says."""
    own = math.log(max(quality, LEAST)) if mean_logprob is None else mean_logprob
    return own + math.log(max(weight, LEAST))


def reranked(answers: Sequence[Answered]) -> Answered | None:
    """The answer with the best score; of equals the one of the heavier expert, then the earliest."""
    return max(
        answers,
        key=lambda one: (score(one.weight, one.quality, one.mean_logprob), one.weight, -one.attempt),
        default=None,
    )


def voted(answers: Sequence[Answered], outstanding: Sequence[float] = ()) -> tuple[Answered | None, bool]:
    """The kept answer, and whether answers of the weights `outstanding` cannot change which text that is.

    Of groups that weigh the same, that with the heaviest member, then that with the earliest; in a group likewise.
    """
    groups: dict[str, list[Answered]] = {}
    for one in answers:
        groups.setdefault(normalized(one.text), []).append(one)
    best = {text: max(members, key=lambda one: (one.weight, -one.attempt)) for text, members in groups.items()}
    weights = {text: math.fsum(one.weight for one in members) for text, members in groups.items()}
    ranked = sorted(groups, key=lambda text: (-weights[text], -best[text].weight, best[text].attempt))
    if not ranked:
        return None, False
    lead = weights[ranked[0]] - (weights[ranked[1]] if len(ranked) > 1 else 0.0)
    # More than the sum, by more than its rounding: what follows could at most draw level.
    return best[ranked[0]], not outstanding or lead > math.fsum(outstanding) * (1 + 1e-9) + 1e-12


def shares(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """`weights` of `names` alone, so that they add up to 1; equal where none has any."""
    found = {name: max(0.0, weights.get(name, 0.0)) for name in names}
    whole = math.fsum(found.values())
    return {name: value / whole if whole > 0 else 1 / len(names) for name, value in found.items()}
