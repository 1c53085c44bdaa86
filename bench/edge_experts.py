"""What a gated set of edge experts is worth: perplexity on mixed text, on subsets, and at half the energy.

    python bench/edge_experts.py quality

Text: the held-out samples of the four domains (models/README.md). A window is 64 tokens that the gate reads and 192
that are scored; the experts share a tokenizer, so their distributions are mixed token by token (`blend`), or one
answers (`best`).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "models")]

from gate import CHECKPOINTS, EXPERTS, PROMPT_TOKENS, scores, windows  # noqa: E402

from ganglion.coordinator.selection.objective import problem_of  # noqa: E402
from ganglion.coordinator.selection.selector import solve  # noqa: E402
from ganglion.gateway.experts.gate_file import GateFile  # noqa: E402
from ganglion.gateway.experts.gate_training import Example, run, train  # noqa: E402
from ganglion.models import heldout_path  # noqa: E402

DOMAINS = ("python", "c", "javascript", "english")
Array = NDArray[Any]


class Scored:
    """Windows of all domains: prompts, domains, and log-probabilities [experts, windows, tokens]."""

    def __init__(self, parts: dict[str, str], step: int) -> None:
        tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "demo" / "tokenizer.json"))
        tokens: list[list[int]] = []
        domains: list[int] = []
        for number, domain in enumerate(DOMAINS):
            some = list(windows(parts[domain], tokenizer, step))
            tokens += some
            domains += [number] * len(some)
        self.prompts = [tokenizer.decode(ids[:PROMPT_TOKENS]) for ids in tokens]
        self.domains = np.array(domains)
        self.logs = np.stack([scores(name, tokens) for name in EXPERTS]).astype(np.float64)

    def perplexity(self, weights: Array, domain: int | None = None) -> float:
        """Of the mixture with weights [windows, experts]; every domain counts alike."""
        mixed = np.logaddexp.reduce(np.log(np.maximum(weights.T, 1e-300))[:, :, None] + self.logs, axis=0)
        wanted = range(len(DOMAINS)) if domain is None else (domain,)
        return float(np.exp(-np.mean([mixed[self.domains == one].mean() for one in wanted])))


def restricted(weights: Array, subset: tuple[int, ...]) -> Array:
    """Renormalised over a subset."""
    kept = np.zeros_like(weights)
    kept[:, subset] = weights[:, subset]
    return kept / kept.sum(1, keepdims=True)


def first(weights: Array) -> Array:
    """All weight on the best."""
    return np.eye(weights.shape[1])[weights.argmax(1)]


def quality() -> None:
    console = Console(width=160)
    scored = Scored({domain: heldout_path(domain).read_text("utf-8") for domain in DOMAINS}, 192)
    gate = GateFile(CHECKPOINTS / "demo-gate")
    if gate.facts.experts != EXPERTS:
        raise SystemExit(f"the gate speaks of {gate.facts.experts}")
    logits = np.stack([gate.run(prompt)[0] for prompt in scored.prompts]).astype(np.float64)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    every = tuple(range(len(EXPERTS)))
    oracle = np.eye(len(EXPERTS))[scored.logs.mean(2).argmax(0)]
    rows = {name: np.eye(len(EXPERTS))[[at] * len(weights)] for at, name in enumerate(EXPERTS)}
    rows |= {
        "equal weights, blend": np.full_like(weights, 1 / len(EXPERTS)),
        "gate, blend": weights,
        "gate, best": first(weights),
        "the best of each window, known afterwards": oracle,
    }
    table = Table(title=f"perplexity of {len(weights)} windows, every domain alike")
    table.add_column("")
    for heading in ("mixed", *DOMAINS):
        table.add_column(heading, justify="right")
    for name, some in rows.items():
        figures = [scored.perplexity(some), *(scored.perplexity(some, at) for at in range(len(DOMAINS)))]
        table.add_row(name, *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    single = min(scored.perplexity(rows[name]) for name in EXPERTS)
    console.print(f"gate, blend against the best single expert: {scored.perplexity(weights) / single - 1:+.1%}")
    _energy(console, scored, weights, gate, single)
    _subsets(console, scored, weights, every)


def _energy(console: Console, scored: Scored, weights: Array, gate: GateFile, single: float) -> None:
    """The subset that the coordinator chooses for less energy, by the kinds of prompts that the gate was trained on.

    An expert's energy is taken to go with the bytes of weights that a token reads: nothing here measures joules.
    """
    cost = np.array([(CHECKPOINTS / name / "model.safetensors").stat().st_size for name in EXPERTS], np.float64)
    shares, judged = np.array(gate.facts.shares), np.array(gate.facts.quality)
    table = Table(title="blends of the subset chosen for a part of the energy of all")
    for heading in ("energy", "subset", "of all", "perplexity", "against the best single"):
        table.add_column(heading, justify="left" if heading == "subset" else "right")
    for part in (1.0, 0.75, 0.5, 0.25, 0.12):
        limit = np.array([part * cost.sum()])
        allowed = np.flatnonzero(cost <= limit[0])
        problem = problem_of("coverage", shares, judged[:, allowed], cost[None, allowed], limit, most=0)
        chosen = tuple(int(allowed[at]) for at in solve(problem).members)
        figure = scored.perplexity(restricted(weights, chosen))
        names = ", ".join(EXPERTS[one] for one in sorted(chosen))
        used = cost[list(chosen)].sum() / cost.sum()
        table.add_row(f"{part:.0%}", names, f"{used:.0%}", f"{figure:.2f}", f"{figure / single - 1:+.1%}")
    console.print(table)


def _subsets(console: Console, scored: Scored, weights: Array, every: tuple[int, ...]) -> None:
    """Does a gate that was trained on all experts stay right on subsets? Against gates trained on each subset alone.

    Both are trained anew on one half of the windows, and measured on the other.
    """
    halves = np.arange(len(scored.prompts)) % 2
    geometric = np.exp(scored.logs.mean(2)).T

    def trained(subset: tuple[int, ...]) -> Array:
        examples = [
            Example(scored.prompts[at], {EXPERTS[one]: float(geometric[at, one]) for one in subset})
            for at in np.flatnonzero(halves == 0)
        ]
        made = train(examples, [EXPERTS[one] for one in subset], epochs=20)
        found = np.zeros_like(weights)
        found[:, subset] = np.stack([run(made, prompt)[0] for prompt in scored.prompts])
        return found

    measured = Scored.__new__(Scored)
    other = halves == 1
    measured.prompts = [one for one, kept in zip(scored.prompts, other, strict=True) if kept]
    measured.domains, measured.logs = scored.domains[other], scored.logs[:, other]
    full = trained(every)
    table = Table(
        title="subsets: the full gate renormalised, and a gate trained on the subset (perplexity, other half)"
    )
    for heading in ("subset", "full, renormalised", "trained on it", "ratio", "equal weights", "known afterwards"):
        table.add_column(heading, justify="left" if heading == "subset" else "right")
    ratios = []
    for size in range(2, len(every) + 1):
        for subset in itertools.combinations(every, size):
            kept = measured.perplexity(restricted(full, subset)[other])
            own = measured.perplexity(trained(subset)[other])
            equal = measured.perplexity(restricted(np.ones_like(full), subset)[other])
            best = np.zeros_like(full[other])
            best[np.arange(len(best)), np.array(subset)[measured.logs[list(subset)].mean(2).argmax(0)]] = 1
            ratios.append(kept / own)
            names = ", ".join(EXPERTS[one] for one in subset)
            table.add_row(
                names,
                f"{kept:.2f}",
                f"{own:.2f}",
                f"{kept / own:.3f}",
                f"{equal:.2f}",
                f"{measured.perplexity(best):.2f}",
            )
    console.print(table)
    console.print(f"ratio of the two: mean {np.mean(ratios):.3f}, worst {max(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quality",))
    parser.parse_args()
    quality()


if __name__ == "__main__":
    main()
