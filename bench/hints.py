"""What the target's first layers know of a draw before a pass is over: `python bench/hints.py [--tokens 64]`.

Along the demo target's own text: how often its head on the first k of six layers guesses the draw, and where the
drafter is wrong, how often the draw is among three other tokens that the head, or the drafter itself, names, and among
two of each.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench")]

from speculation import prompts  # noqa: E402
from trees import CONTEXT  # noqa: E402

from ganglion.agent.executor.loader import start_runtime  # noqa: E402
from ganglion.agent.speculation.early import early_layers  # noqa: E402
from ganglion.agent.speculation.engine import Ask, DraftEngine, load_engine  # noqa: E402
from ganglion.agent.store import PieceStore  # noqa: E402
from ganglion.models import demo_path  # noqa: E402
from ganglion.partitioner.cut import numeric_class, partition  # noqa: E402
from ganglion.wire.nouns import Manifest  # noqa: E402
from ganglion.wire.sampling.parameters import Sampling  # noqa: E402


def main() -> None:
    """A table by temperature and layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args()
    start_runtime(1)
    with tempfile.TemporaryDirectory() as folder:
        store = PieceStore(Path(folder) / "store")
        target, drafter = (
            partition(demo_path(name), store, name=name, numeric_class=numeric_class(demo_path(name), "fp32"))
            for name in ("demo", "demo-drafter")
        )

        def engine(manifest: Manifest) -> DraftEngine:
            return load_engine(manifest, store.open, Path(folder) / manifest.name, slots=1, context=CONTEXT)

        guessers = {"drafter": engine(drafter)}
        guessers |= {f"{count} of 6 layers": engine(early_layers(target, count)) for count in (3, 4, 5)}
        alone, given = engine(target), prompts(asked.prompts, 128)
        print(f"{'T':>4} {'guesser':<14} {'is the draw':>11} {'of corrections in 3':>19} {'with the drafter':>16}")
        for temperature in (0.0, 0.7, 1.0):
            first, third, both, wrong = Counter[str](), Counter[str](), Counter[str](), 0
            for seed, prompt in enumerate(given):
                ids, sampling = list(prompt), Sampling(temperature=temperature, seed=seed)
                for _ in range(asked.tokens):
                    drawn = alone.step([Ask(0, ids, sampling)])[0].tokens[0]
                    told = {name: one.step([Ask(0, ids, sampling, top=4)])[0].tokens for name, one in guessers.items()}
                    drafted = told["drafter"]
                    wrong += drafted[0] != drawn
                    for name, tokens in told.items():
                        first[name] += tokens[0] == drawn
                        if drafted[0] != drawn:
                            others = [token for token in tokens if token != drafted[0]][:3]
                            third[name] += drawn in others
                            both[name] += drawn in {*others[:2], *drafted[1:3]}
                    ids.append(drawn)
            for name in guessers:
                shares = first[name] / (asked.tokens * len(given)), third[name] / wrong, both[name] / wrong
                print(
                    f"{temperature:>4} {name:<14} {shares[0]:>11.0%} {shares[1]:>19.0%} {shares[2]:>16.0%}", flush=True
                )


if __name__ == "__main__":
    main()
