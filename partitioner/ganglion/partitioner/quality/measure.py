"""Measuring a recipe against float32: every tensor's rounding, and what the model then says of a text.

Both run side by side through the model, segment by segment. Of every matrix that is rounded: the signal to noise of its
numbers, and, with only this one rounded, how far what its segment adds to the residual moves. The second sees the
inputs as well, so it finds matrices that are rounded finely and still matter, and those of which the reverse is true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ganglion.partitioner.classes import Layout
from ganglion.partitioner.quality.stream import OpenSession, Session, State, embed, step
from ganglion.partitioner.quality.tensors import Noise, Pair, energy
from ganglion.partitioner.weights import Floats
from ganglion.wire.nouns import NumericClass

PROBED_TOKENS = 512  # of the text, for what one matrix does
HEAD_TOKENS = 256  # of which logits are in memory at once
Progress = Callable[[int, int], None]  # segments done, segments in all


@dataclass(frozen=True)
class TensorQuality:
    """A rounded tensor, or a pattern for the experts of a layer, taken together.

    sqnr_db: signal to noise of its numbers (infinite where nothing was rounded again). peak: its largest number over
    its root mean square. noise: mean square by which rounding it alone moves what its segment leaves, over that of the
    residual (of the output matrix: 0). kl: nats per token that rounding it alone costs, measured for the output matrix,
    for others their share of the rest by noise. bytes: as cut.
    """

    name: str
    format: str
    sqnr_db: float
    peak: float
    noise: float
    kl: float
    bytes: int
    outputs: int
    inputs: int


@dataclass(frozen=True)
class Measured:
    """Against float32 on a text of `tokens` predicted tokens: perplexities, mean KL in nats, share of equal choices."""

    numeric_class: NumericClass
    tokens: int
    perplexity_fp32: float
    perplexity: float
    kl: float
    top1: float
    tensors: tuple[TensorQuality, ...]


def measure(
    layout: Layout,
    rows: Sequence[Sequence[int]],
    open_session: OpenSession,
    progress: Progress = lambda done, total: None,
    *,
    by_tensor: bool = True,
) -> Measured:
    """Measure the layout's recipe on `rows` of token ids; by_tensor: also every tensor of its own."""
    plain = replace(layout.recipe, numeric_class=_plain(layout.recipe.numeric_class), exceptions={})
    exact, rounded = embed(layout, rows), embed(layout, rows)
    probes = _probes(rows)
    noises: list[Noise] = []
    carried: list[Noise] = []
    plans = [plan for layer in layout.layers for plan in layer]
    for done, plan in enumerate(plans):
        progress(done, len(plans) + 1)
        pair = Pair(plan, layout, plain, open_session)
        found = pair.noises(exact[:probes]) if by_tensor else []
        exact = [step(pair.plain, plan, layout, state) for state in exact]
        sessions = pair.rounded()
        rounded = [step(sessions, plan, layout, state) for state in rounded]
        carried += found
        if not plan.carry:  # what a segment carries moves the residual only as much as the next one does
            seen = exact[:probes]
            moves = energy([state.delta for state in seen]) / energy([state.res + state.delta for state in seen])
            noises += [replace(one, relative=one.relative * moves) for one in carried]
            carried = []
    progress(len(plans), len(plans) + 1)
    pair = Pair(layout.head, layout, plain, open_session)
    heads = pair.plain[0], pair.rounded()[0]
    tally, alone = _Tally(), _Tally()
    for ids, one, two in zip(rows, exact, rounded, strict=True):
        tally.add(heads, layout.model.vocab, ids, (one, two))
    found = pair.noises([]) if by_tensor else []
    for ids, one in zip(rows[:probes], exact, strict=False):
        if found:
            alone.add(heads, layout.model.vocab, ids, (one, one))
    progress(len(plans) + 1, len(plans) + 1)
    head_kl = alone.kl / alone.tokens if alone.tokens else 0.0
    return Measured(
        layout.recipe.numeric_class,
        tally.tokens,
        float(np.exp(tally.nats_fp32 / tally.tokens)),
        float(np.exp(tally.nats / tally.tokens)),
        tally.kl / tally.tokens,
        tally.same / tally.tokens,
        _tensors(noises, found, tally.kl / tally.tokens, head_kl),
    )


def _plain(numeric_class: NumericClass) -> NumericClass:
    return NumericClass(format="fp32", block=0, exact=numeric_class.exact)


def _probes(rows: Sequence[Sequence[int]]) -> int:
    """How many rows tell what one matrix does."""
    taken = 0
    for number, row in enumerate(rows, 1):
        taken += len(row)
        if taken >= PROBED_TOKENS:
            return number
    return len(rows)


@dataclass
class _Tally:
    """Sums over the places where a token was predicted."""

    tokens: int = 0
    nats_fp32: float = 0.0
    nats: float = 0.0
    kl: float = 0.0
    same: int = 0

    def add(self, heads: tuple[Session, Session], vocab: int, ids: Sequence[int], states: tuple[State, State]) -> None:
        """Add what two heads say of two states of one row, the first being float32."""
        following = np.asarray(ids[1:])
        for at in range(0, len(following), HEAD_TOKENS):
            stop = min(at + HEAD_TOKENS, len(following))
            feeds = [{"res": state.res[at:stop], "delta": state.delta[at:stop]} for state in states]
            expected, found = (
                _log_softmax(head.run(["logits"], feed)[0][:, :vocab]) for head, feed in zip(heads, feeds, strict=True)
            )
            here = np.arange(stop - at), following[at:stop]
            self.tokens += stop - at
            self.nats_fp32 -= float(expected[here].sum())
            self.nats -= float(found[here].sum())
            self.kl += float(np.sum(np.exp(expected) * (expected - found)))
            self.same += int(np.sum(expected.argmax(1) == found.argmax(1)))


def _log_softmax(logits: Floats) -> Floats:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    shifted: Floats = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return shifted


def _tensors(noises: list[Noise], head: list[Noise], kl: float, head_kl: float) -> tuple[TensorQuality, ...]:
    """By tensor, the dearest first; what the output matrix leaves of the KL is divided by noise."""
    total = sum(one.relative for one in noises) or 1.0
    rest = max(0.0, kl - head_kl)
    costs = [(one, rest * one.relative / total) for one in noises] + [(one, head_kl) for one in head]
    found = [
        TensorQuality(
            name=one.tensor,
            format=one.form.name,
            sqnr_db=one.sqnr_db,
            peak=one.peak,
            noise=one.relative,
            kl=cost,
            bytes=one.tally.bytes,
            outputs=one.outputs,
            inputs=one.inputs,
        )
        for one, cost in costs
    ]
    return tuple(sorted(found, key=lambda one: (-one.kl, one.name)))
