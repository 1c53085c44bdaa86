"""Trains a gate from what experts were worth on prompts: numpy only, on the device that holds the texts.

The gate is trained once, on all experts. Its weights are a softmax, so those of a subset are the same numbers divided
by their sum. Where targets are a softmax too (an expert's share goes with its quality to the power 1/temperature) the
best gate of a subset *is* that renormalised one: what is left over of a softmax after some are struck out is a softmax
(Luce's choice axiom). What of this a trained gate keeps is measured: bench/edge_experts.py, in the manner of MoE²
(arXiv 2501.09410).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ganglion.gateway.experts.encoder import BUCKETS, Features, features
from ganglion.wire.errors import InvalidRequest

Floats = NDArray[np.float32]

EMBEDDING: Final = 32
HIDDEN: Final = 32
LEAST_QUALITY: Final = 1e-4
LEAST_EXAMPLES: Final = 32


@dataclass(frozen=True)
class Example:
    """A prompt, and the quality of what experts made of it: 0 to 1, by name; of those that were not asked nothing.

    Of a text that goes on the quality is the geometric mean of an expert's token probabilities; of an answer it is how
    well it did.
    """

    text: str
    quality: Mapping[str, float]


@dataclass(frozen=True)
class GateWeights:
    """Of a gate: embedding [BUCKETS, EMBEDDING], hidden layer, and both heads over the experts; float32."""

    experts: tuple[str, ...]
    embedding: Floats
    hidden: Floats  # [EMBEDDING, HIDDEN]
    hidden_bias: Floats
    weight: Floats  # [HIDDEN, experts]
    weight_bias: Floats
    quality: Floats  # [HIDDEN, experts]
    quality_bias: Floats


def train(
    examples: Sequence[Example],
    experts: Sequence[str],
    *,
    temperature: float = 0.1,
    epochs: int = 40,
    batch: int = 64,
    rate: float = 0.01,
    decay: float = 0.02,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> GateWeights:
    """Fit a gate; deterministic for a seed. `progress` hears epochs that are done and the mean loss of the last.

    temperature: of the targets; small ones want the best expert only. Raises InvalidRequest for too few examples, for
    an expert that none of them has tried, and for a quality that is no number from 0 to 1.
    """
    names = tuple(experts)
    quality, known = _table(examples, names)
    read = [features(one.text) for one in examples]
    model = _Model(names, seed)
    model.start(quality, known)
    log_quality = np.log(np.maximum(quality, LEAST_QUALITY))
    targets = _softmax(np.where(known, log_quality / temperature, -np.inf))
    generator = np.random.default_rng(seed)
    steps, last = epochs * -(-len(read) // batch), 0
    for epoch in range(epochs):
        losses, order = [], generator.permutation(len(read))
        for start in range(0, len(read), batch):
            chosen = order[start : start + batch]
            some = [read[at] for at in chosen]
            losses.append(model.step(some, targets[chosen], quality[chosen], known[chosen], decay))
            last += 1
            model.update(rate * (1 - (last - 1) / steps), last)
        if progress is not None:
            progress(epoch + 1, float(np.mean(losses)))
    return model.weights()


def run(gate: GateWeights, text: str) -> tuple[Floats, Floats]:
    """Weights (adding up to 1) and quality of every expert: what the graph gives, for tests and for training."""
    found = features(text)
    pooled = found.weights @ gate.embedding[found.buckets]
    hidden = np.tanh(pooled @ gate.hidden + gate.hidden_bias)
    weights = _softmax((hidden @ gate.weight + gate.weight_bias)[None])[0]
    return weights, _sigmoid(hidden @ gate.quality + gate.quality_bias)


def _table(examples: Sequence[Example], names: tuple[str, ...]) -> tuple[Floats, NDArray[np.bool_]]:
    """Quality [examples, experts], and where it is known."""
    if len(examples) < LEAST_EXAMPLES:
        raise InvalidRequest(f"{len(examples)} outcomes to train from, at least {LEAST_EXAMPLES} are needed")
    quality = np.zeros((len(examples), len(names)), np.float32)
    known = np.zeros(quality.shape, bool)
    for row, example in enumerate(examples):
        for column, name in enumerate(names):
            if name in example.quality:
                quality[row, column], known[row, column] = example.quality[name], True
    if not (np.isfinite(quality).all() and (quality >= 0).all() and (quality <= 1).all()):
        raise InvalidRequest("an outcome has a quality that is no number from 0 to 1")
    untried = [name for column, name in enumerate(names) if not known[:, column].any()]
    if untried:
        raise InvalidRequest(
            f"no outcome has tried {', '.join(untried)}; ask all experts for a while, with vote or rerank"
        )
    return quality, known


class _Model:
    """The parameters, their gradients of the last step, and Adam's moments (decoupled decay, arXiv 1711.05101)."""

    def __init__(self, names: tuple[str, ...], seed: int) -> None:
        generator = np.random.default_rng(seed)

        def normal(*shape: int, scale: float) -> Floats:
            return (scale * generator.standard_normal(shape)).astype(np.float32)

        count = len(names)
        self._names = names
        self._values: dict[str, Floats] = {
            "embedding": normal(BUCKETS, EMBEDDING, scale=1.0),
            "hidden": normal(EMBEDDING, HIDDEN, scale=EMBEDDING**-0.5),
            "hidden_bias": np.zeros(HIDDEN, np.float32),
            "weight": normal(HIDDEN, count, scale=0.01),
            "weight_bias": np.zeros(count, np.float32),
            "quality": normal(HIDDEN, count, scale=0.01),
            "quality_bias": np.zeros(count, np.float32),
        }
        self._gradients = {name: np.zeros_like(one) for name, one in self._values.items()}
        self._first: dict[str, NDArray[Any]] = {name: np.zeros_like(one) for name, one in self._values.items()}
        self._second: dict[str, NDArray[Any]] = {name: np.zeros_like(one) for name, one in self._values.items()}
        self._decay = 0.0

    def start(self, quality: Floats, known: NDArray[np.bool_]) -> None:
        """Begin with each expert's mean quality."""
        mean = quality.sum(0) / np.maximum(known.sum(0), 1)
        bounded = np.clip(mean, LEAST_QUALITY, 1 - LEAST_QUALITY)
        self._values["quality_bias"] = np.log(bounded / (1 - bounded)).astype(np.float32)

    def weights(self) -> GateWeights:
        return GateWeights(self._names, **self._values)

    def step(
        self, read: Sequence[Features], targets: Floats, quality: Floats, known: NDArray[np.bool_], decay: float
    ) -> float:
        """Gradients of one batch; its mean loss: cross-entropy of the weights among what was tried, and of quality."""
        self._decay = decay
        v, count = self._values, np.float32(len(read))
        pooled = np.stack([one.weights @ v["embedding"][one.buckets] for one in read])
        hidden = np.tanh(pooled @ v["hidden"] + v["hidden_bias"])
        weights = _softmax(np.where(known, hidden @ v["weight"] + v["weight_bias"], -np.inf))
        found = _sigmoid(hidden @ v["quality"] + v["quality_bias"])
        loss = -(targets * np.log(np.maximum(weights, 1e-9))).sum(1).mean()
        loss -= (known * (quality * np.log(found + 1e-9) + (1 - quality) * np.log(1 - found + 1e-9))).sum(1).mean()
        by_weight, by_quality = (weights - targets) / count, np.where(known, found - quality, 0) / count
        into = (by_weight @ v["weight"].T + by_quality @ v["quality"].T) * (1 - hidden * hidden)
        by_pooled = into @ v["hidden"].T
        embedding = np.zeros_like(v["embedding"])
        for row, one in enumerate(read):
            embedding[one.buckets] += one.weights[:, None] * by_pooled[row]
        self._gradients = {
            "embedding": embedding,
            "hidden": pooled.T @ into,
            "hidden_bias": into.sum(0),
            "weight": hidden.T @ by_weight,
            "weight_bias": by_weight.sum(0),
            "quality": hidden.T @ by_quality,
            "quality_bias": by_quality.sum(0),
        }
        return float(loss)

    def update(self, rate: float, number: int) -> None:
        """Adam with the gradients of the last step, which was the `number`-th."""
        for name, gradient in self._gradients.items():
            first = self._first[name] = 0.9 * self._first[name] + 0.1 * gradient
            second = self._second[name] = 0.99 * self._second[name] + 0.01 * gradient * gradient
            moved = first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.99**number)) + 1e-8)
            kept = 1 - rate * self._decay if not name.endswith("bias") else 1.0
            self._values[name] = (kept * self._values[name] - rate * moved).astype(np.float32)


def _softmax(logits: Floats) -> Floats:
    """Over the last dimension; a row of nothing but -inf gives zeros."""
    highest = logits.max(-1, keepdims=True)
    powers = np.exp(logits - np.where(np.isfinite(highest), highest, 0))
    shares: Floats = (powers / np.maximum(powers.sum(-1, keepdims=True), 1e-30)).astype(np.float32)
    return shares


def _sigmoid(logits: Floats) -> Floats:
    found: Floats = (1 / (1 + np.exp(-logits))).astype(np.float32)
    return found
