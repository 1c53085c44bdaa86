"""Which whole experts to keep wide: what rounding each one costs on a text, and the fewest bytes within a budget.

An expert's error is that of what it gives in a format against float32, by squares, times the square of the weight with
which it is mixed in, over the rows that a router sent to it: an expert that is chosen seldom or weighs little may be
narrow. Errors of experts are taken as independent, so that those of a choice add up, and what they cost in KL as
proportional to their sum, on a line through what is measured with all experts narrow and with all wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf, log1p

import numpy as np

from ganglion.partitioner.classes import Layout
from ganglion.partitioner.families.experts import Mixture
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.quality.measure import Measured
from ganglion.partitioner.quality.stream import OpenSession, Sessions, State, cut_segment, embed, run, start
from ganglion.partitioner.quality.tensors import energy
from ganglion.partitioner.quantize.formats import Format
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.partitioner.slots import Array
from ganglion.wire.errors import InvalidRequest
from ganglion.wire.nouns import NumericClass

Progress = Callable[[int, int], None]  # segments done, segments in all


@dataclass(frozen=True)
class ExpertError:
    """What one expert costs in two formats; shared experts of a layer, which have one format, are one.

    name: the pattern by which a rule chooses its format. rows: that were sent to it. narrow, wide: mean square by which
    rounding it alone moves what its layer leaves, over that of the residual. more_bytes: of wide over narrow.
    """

    name: str
    layer: int
    rows: int
    narrow: float
    wide: float
    more_bytes: int


@dataclass(frozen=True)
class WidthChoice:
    """The experts that are wide, by name; the error that is left, as of `ExpertError`, and the bytes that it takes."""

    wide: tuple[str, ...]
    error: float
    more_bytes: int


def expert_errors(
    layout: Layout,
    wide: Format,
    rows: Sequence[Sequence[int]],
    open_session: OpenSession,
    progress: Progress = lambda done, total: None,
) -> tuple[ExpertError, ...]:
    """The error of every expert in the class's format and in `wide`, on `rows` of token ids, a layer at a time.

    Raises InvalidRequest for a model without experts that are cut whole, or whose experts have two formats already.
    """
    recipe = layout.recipe
    plans = [(number, plan) for number, layer in enumerate(layout.layers) for plan in layer]
    cores = [plan.core for _, plan in plans if isinstance(plan.core, Mixture) and plan.axis == "experts"]
    if not cores:
        raise InvalidRequest(f"{layout.model.family} has no experts that are cut whole", param="experts")
    if any(len(recipe.of_experts(core)) > 1 for core in cores):
        raise InvalidRequest("exceptions name experts, whose formats are to be chosen; name none", param="exceptions")
    exact_class = recipe.numeric_class.exact
    plain, wider = (
        replace(
            recipe, numeric_class=NumericClass(format=form.kind, block=form.block, exact=exact_class), exceptions={}
        )
        for form in (Format("fp32"), wide)
    )
    states = embed(layout, rows)
    found: list[ExpertError] = []
    for done, (number, plan) in enumerate(plans):
        progress(done, len(plans))
        sessions = _started(plan, layout, plain, open_session)
        outputs = [run(sessions, plan, layout, state) for state in states]
        states = [
            State(one.get("res_out", state.res), one["partial"], one.get("carry"))
            for one, state in zip(outputs, states, strict=True)
        ]
        if isinstance(plan.core, Mixture) and plan.axis == "experts":
            residual = energy([state.res + state.delta for state in states]) or 1.0
            narrow, moved = (
                _moved(_started(plan, layout, one, open_session), plan.core, outputs) / residual
                for one in (recipe, wider)
            )
            chosen = np.concatenate([one["chosen"].reshape(-1) for one in outputs])
            counts = np.bincount(chosen, minlength=plan.core.stacked)
            found += _by_name(plan.core, number, counts, (narrow, moved), _bytes(plan.core, wide, recipe.base))
    progress(len(plans), len(plans))
    return tuple(found)


def choose_widths(errors: Iterable[ExpertError], most: float) -> WidthChoice:
    """The experts to keep wide so that the sum of errors is at most `most`: greedy by gain for each byte.

    Experts of a model are as large as each other (but for shared ones), so no choice of fewer bytes does. Where even
    all of them are too few, all that gain are wide.
    """
    every = tuple(errors)
    left, more_bytes, wide = sum(one.narrow for one in every), 0, []
    for one in sorted(every, key=lambda one: (-(one.narrow - one.wide) / max(one.more_bytes, 1), one.layer, one.name)):
        if left <= most or one.narrow <= one.wide:
            break
        left -= one.narrow - one.wide
        more_bytes += one.more_bytes
        wide.append(one)
    names = tuple(one.name for one in sorted(wide, key=every.index))
    return WidthChoice(names, max(left, 0.0), more_bytes)


@dataclass(frozen=True)
class Line:
    """KL in nats by the sum of errors, through all experts narrow and all wide."""

    narrow: tuple[float, float]  # error, KL
    wide: tuple[float, float]

    @classmethod
    def through(cls, errors: Sequence[ExpertError], narrow: Measured, wide: Measured) -> Line:
        """The line through what two formats of all experts were measured to cost."""
        return cls((sum(one.narrow for one in errors), narrow.kl), (sum(one.wide for one in errors), wide.kl))

    def kl(self, error: float) -> float:
        """The KL that is expected with this sum of errors."""
        run, rise = self.narrow[0] - self.wide[0], self.narrow[1] - self.wide[1]
        return self.wide[1] + (rise * (error - self.wide[0]) / run if run else 0.0)

    def most(self, budget: float) -> float:
        """The largest sum of errors that costs at most `budget` of the perplexity over that of all experts wide."""
        run, rise = self.narrow[0] - self.wide[0], self.narrow[1] - self.wide[1]
        return self.wide[0] + run * log1p(budget) / rise if rise > 0 else inf


def _started(plan: SegmentPlan, layout: Layout, recipe: Recipe, open_session: OpenSession) -> Sessions:
    return start(plan, layout, recipe, cut_segment(plan, layout, recipe), open_session)


def _moved(sessions: Sessions, core: Mixture, outputs: Sequence[dict[str, Array]]) -> Array:
    """By expert, the weighted squares by which what it gives differs from `outputs`: float64 [experts]."""
    total = np.zeros(core.stacked)
    for one in outputs:
        index, weights = one["chosen"].reshape(-1), one["weights"].reshape(-1).astype(np.float64)
        (given,) = sessions[1].run(["given"], {"rows": one["rows"], "index": index})
        squares = np.square(given - one["given"], dtype=np.float64).sum(axis=1)
        total += np.bincount(index, weights * weights * squares, core.stacked)
    return total


def _bytes(core: Mixture, wide: Format, narrow: Format) -> int:
    """Bytes that an expert takes more."""
    sizes = [
        form.weight_bytes(2 * core.width, core.hidden) + form.weight_bytes(core.hidden, core.width)
        for form in (wide, narrow)
    ]
    return sizes[0] - sizes[1]


def _by_name(
    core: Mixture, layer: int, counts: Array, errors: tuple[Array, Array], more_bytes: int
) -> Iterable[ExpertError]:
    by_name: dict[str, list[int]] = {}
    for expert in range(core.stacked):
        by_name.setdefault(_pattern(core.names_of(expert)), []).append(expert)
    for name, experts in by_name.items():
        narrow, wide = (float(one[experts].sum()) for one in errors)
        yield ExpertError(name, layer, int(counts[experts].sum()), narrow, wide, len(experts) * more_bytes)


def _pattern(names: Sequence[str]) -> str:
    """What matches all matrices of an expert and no other's."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    same = next(at for at, each in enumerate(zip(*parts, strict=True)) if len(set(each)) > 1)
    return ".".join([*parts[0][:same], "*"])
