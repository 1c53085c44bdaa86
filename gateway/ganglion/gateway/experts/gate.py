"""The gate: how good each expert is for a prompt. It runs here, where the text is; nobody else sees what it is given.

A gate is trained on all experts. Of a subset its weights are renormalized. What it does not know gets the prior.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from ganglion.gateway.experts.gate_file import FACTS_FILE, GateFile
from ganglion.gateway.experts.profile import Kind
from ganglion.gateway.experts.scoring import shares
from ganglion.wire.errors import Corrupt

GATE_FOLDER: Final = "gate"  # of a trained gate, in the gateway's home
PRIOR_QUALITY: Final = 0.5
UNTRIED: Final = 0.05  # share of requests for which an expert that the gate does not know may be the best
UNTRIED_ALL: Final = 0.5  # of all of them together at most
_WORDS: Final[Mapping[str, tuple[str, ...]]] = {  # a domain by what texts of it look like
    "python": ("def ", "import ", "self.", "python"),
    "c": ("#include", "#define", "struct ", "void "),
    "javascript": ("function ", "const ", "=>", "javascript"),
    "code": ("def ", "#include", "function ", "return ", "class "),
}
_FAVOR: Final = 3.0  # of an expert whose domain the prompt shows, over one whose domain it does not

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weighed:
    """weights: of the named experts, adding up to 1. quality: expected of each one's answer, 0 to 1."""

    weights: dict[str, float]
    quality: dict[str, float]


class Gate(Protocol):
    """What weighs experts. Not for the event loop: it computes."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Those that it was trained on."""
        ...

    def weigh(self, text: str, names: Sequence[str]) -> Weighed:
        """The experts `names`, not empty, for a prompt."""
        ...

    def kinds(self, names: Sequence[str]) -> Sequence[Kind]:
        """The kinds of prompts that it has seen in its training; none where it has no training."""
        ...


class PriorGate:
    """Without training: equal weights, but for experts whose domain stands in the prompt or shows in its words."""

    experts: tuple[str, ...] = ()

    def __init__(self, domains: Callable[[str], Sequence[str]] = lambda _: ()) -> None:
        """`domains`: of an expert, by its name."""
        self._domains = domains

    def weigh(self, text: str, names: Sequence[str]) -> Weighed:
        """As the protocol says."""
        low = text.casefold()
        found = {name: _FAVOR if any(_shows(low, one) for one in self._domains(name)) else 1.0 for name in names}
        return Weighed(shares(found, names), dict.fromkeys(names, PRIOR_QUALITY))

    def kinds(self, names: Sequence[str]) -> Sequence[Kind]:
        """As the protocol says."""
        del names
        return ()


def _shows(text: str, domain: str) -> bool:
    domain = domain.casefold()
    return any(word in text for word in _WORDS.get(domain, (domain,)))


class FolderGate:
    """The gate of a folder, read anew when that gets another one; the prior while it has none.

    prior: also for experts that the gate does not know. What comes later and cannot be read leaves the gate as it was.
    """

    def __init__(self, folder: Path, prior: Gate) -> None:
        """Raises Corrupt naming what is wrong with the gate that is there."""
        self._folder = folder
        self._prior = prior
        self._seen_ns = self._changed_ns()
        self._file = GateFile(folder) if self._seen_ns else None

    @property
    def experts(self) -> tuple[str, ...]:
        """As the protocol says."""
        return self._file.facts.experts if self._file is not None else ()

    def weigh(self, text: str, names: Sequence[str]) -> Weighed:
        """As the protocol says. Raises Corrupt where the graph gives anything else than it should."""
        self._follow()
        prior, file = self._prior.weigh(text, names), self._file
        at = _columns(file, names)
        if file is None or not at:
            return prior
        logits, quality = file.run(text)
        # The known ones share by the gate what the prior gives all of them together.
        top = max(float(logits[index]) for index in at.values())
        trained = shares({name: math.exp(float(logits[index]) - top) for name, index in at.items()}, list(at))
        whole = math.fsum(prior.weights[name] for name in at)
        weights = {name: whole * trained[name] if name in at else prior.weights[name] for name in names}
        return Weighed(shares(weights, names), _filled(quality.tolist(), at, names))

    def kinds(self, names: Sequence[str]) -> Sequence[Kind]:
        """As the protocol says: what it was trained on, and for each expert that it does not know a kind of its own.

        In that one this expert is as good as the best are usually, so that it is asked at all where a budget allows
        it: otherwise nothing would ever be learned of it.
        """
        self._follow()
        file = self._file
        at = _columns(file, names)
        if file is None or not at:
            return ()
        unknown = [name for name in names if name not in at]
        untried = min(UNTRIED, UNTRIED_ALL / max(1, len(unknown)))
        left = 1.0 - untried * len(unknown)
        rows = [
            (share, _filled(row, at, names)) for share, row in zip(file.facts.shares, file.facts.quality, strict=True)
        ]
        usual = {name: math.fsum(share * row[name] for share, row in rows) for name in names}
        best = math.fsum(share * max(row.values()) for share, row in rows)
        return [
            *((left * share, row) for share, row in rows),
            *((untried, usual | {name: best}) for name in unknown),
        ]

    def _follow(self) -> None:
        changed_ns = self._changed_ns()
        if changed_ns == self._seen_ns:
            return
        self._seen_ns = changed_ns
        try:
            self._file = GateFile(self._folder) if changed_ns else None
        except (Corrupt, OSError) as error:
            _log.warning("the gate is not read: %s", error)

    def _changed_ns(self) -> int:
        """0: there is none."""
        try:
            return (self._folder / FACTS_FILE).stat().st_mtime_ns
        except FileNotFoundError:
            return 0


def _columns(file: GateFile | None, names: Sequence[str]) -> dict[str, int]:
    """Of those of `names` that the gate knows, where they stand in it."""
    known = file.facts.experts if file is not None else ()
    return {name: index for index, name in enumerate(known) if name in set(names)}


def _filled(quality: Sequence[float], at: Mapping[str, int], names: Sequence[str]) -> dict[str, float]:
    """By name, from 0 to 1; one that the gate does not know counts as the mean of the others, on whose scale it is."""
    known = {name: min(1.0, max(0.0, quality[index])) for name, index in at.items()}
    mean = math.fsum(known.values()) / len(known)
    return {name: known.get(name, mean) for name in names}
