"""Train the gate over the demo experts, on text that their domains were trained on.

    python models/gate.py

Every example is a piece of text: the gate reads its beginning, and the quality of an expert is the geometric mean of
the probabilities that it gives to the tokens that follow. The gate is written to `ganglion/models/demo-gate/`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from domains import DOMAINS, load_domain
from numpy.typing import NDArray
from rich.progress import track
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from ganglion.gateway.experts.gate_file import write_gate
from ganglion.gateway.experts.gate_training import Example, run, train

HERE: Final = Path(__file__).resolve().parent
CHECKPOINTS: Final = HERE / "ganglion" / "models"
EXPERTS: Final = ("demo", "demo-c", "demo-javascript", "demo-english")
PROMPT_TOKENS: Final = 64
SCORED_TOKENS: Final = 192


def windows(text: str, tokenizer: Tokenizer, step: int = SCORED_TOKENS) -> Iterator[list[int]]:
    """Tokens of a prompt and of what follows it, every `step` tokens of the text."""
    ids = tokenizer.encode(text).ids
    for start in range(0, len(ids) - PROMPT_TOKENS - SCORED_TOKENS + 1, step):
        yield ids[start : start + PROMPT_TOKENS + SCORED_TOKENS]


@torch.no_grad()
def scores(name: str, tokens: list[list[int]], batch: int = 16) -> NDArray[np.float32]:
    """Log-probabilities of the tokens after the prompts, by one expert: [windows, SCORED_TOKENS], nats."""
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    found = []
    for start in track(range(0, len(tokens), batch), description=name):
        ids = torch.tensor(tokens[start : start + batch])
        logits = model(ids).logits[:, PROMPT_TOKENS - 1 : -1]
        wanted = ids[:, PROMPT_TOKENS:, None]
        found.append(torch.log_softmax(logits, -1).gather(-1, wanted)[..., 0])
    return torch.cat(found).numpy()


def main() -> None:
    """Score, train, write, and say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=400, help="of each domain")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS / "demo-gate")
    asked = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "demo" / "tokenizer.json"))
    chosen = random.Random(0)  # noqa: S311 - a sample, not a secret
    tokens: list[list[int]] = []
    for domain in DOMAINS:
        documents = list(load_domain(domain).train)
        chosen.shuffle(documents)
        some: list[list[int]] = []
        for document in documents:
            some += list(windows(document.text, tokenizer))[:4]
            if len(some) >= asked.windows:
                break
        tokens += some[: asked.windows]
    quality = {name: np.exp(scores(name, tokens).mean(1)) for name in EXPERTS}
    examples = [
        Example(tokenizer.decode(ids[:PROMPT_TOKENS]), {name: float(quality[name][row]) for name in EXPERTS})
        for row, ids in enumerate(tokens)
    ]
    gate = train(examples, EXPERTS, progress=lambda epoch, loss: print(f"epoch {epoch}: {loss:.4f}"))
    write_gate(asked.out, gate, examples)
    right = [
        EXPERTS[int(run(gate, one.text)[0].argmax())] == max(one.quality, key=lambda name: one.quality[name])
        for one in examples
    ]
    print(json.dumps({"examples": len(examples), "best expert first, training text": round(float(np.mean(right)), 3)}))


if __name__ == "__main__":
    main()
