"""A segment in float32 and in a recipe's formats, side by side, and what rounding each of its tensors does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

import numpy as np

from ganglion.partitioner.classes import Layout
from ganglion.partitioner.expert_slots import OTHER
from ganglion.partitioner.families.experts import Mixture
from ganglion.partitioner.families.plans import GatedMlp, Linear, SegmentPlan
from ganglion.partitioner.quality.stream import Cut, OpenSession, Sessions, State, cut_segment, run, start
from ganglion.partitioner.quantize.blocks import dequantize
from ganglion.partitioner.quantize.formats import Format
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.partitioner.slots import Array
from ganglion.partitioner.weights import Floats, Packed


@dataclass
class _Tally:
    """Sums of squares of numbers and of their errors, the largest number, and the bytes that they take."""

    signal: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    bytes: int = 0

    def add(self, numbers: Floats, rounded: Floats, size: int) -> None:
        """Count some numbers, before and after rounding."""
        self.signal += energy([numbers])
        self.error += energy([rounded - numbers])
        self.largest = max(self.largest, float(np.abs(numbers).max(initial=0)))
        self.bytes += size


@dataclass(frozen=True)
class Noise:
    """What rounding one stored tensor does in one segment; relative: of what the segment leaves, by squares.

    tensor: its name, or a pattern where the experts of a layer are taken together.
    """

    tensor: str
    form: Format
    outputs: int
    inputs: int
    tally: _Tally
    relative: float

    @property
    def sqnr_db(self) -> float:
        """Signal to noise of the numbers, infinite where none was changed."""
        if not self.tally.error or not self.tally.signal:
            return float("inf")
        return 10 * float(np.log10(self.tally.signal / self.tally.error))

    @property
    def peak(self) -> float:
        """The largest number over the root mean square."""
        root = float(np.sqrt(self.tally.signal / (self.outputs * self.inputs)))
        return self.tally.largest / max(root, 1e-30)


class Pair:
    """A segment in float32 and in the recipe's formats, cut once each."""

    def __init__(self, plan: SegmentPlan, layout: Layout, plain: Recipe, open_session: OpenSession) -> None:
        self.plan, self.layout, self._plain_recipe, self._open = plan, layout, plain, open_session
        self._plain_cut = cut_segment(plan, layout, plain)
        self._cut = cut_segment(plan, layout, layout.recipe)
        self.plain = start(plan, layout, plain, self._plain_cut, open_session)

    def rounded(self) -> Sessions:
        """The segment in the recipe's formats."""
        return start(self.plan, self.layout, self.layout.recipe, self._cut, self._open)

    def noises(self, states: Sequence[State]) -> list[Noise]:
        """Of every rounded tensor: its rounding, and how far it alone moves what the segment leaves for `states`."""
        watched = "carry" if self.plan.carry else "partial"
        expected = [run(self.plain, self.plan, self.layout, state)[watched] for state in states]

        def relative(sessions: Sessions) -> float:
            moved = [run(sessions, self.plan, self.layout, state)[watched] for state in states]
            return energy([a - b for a, b in zip(moved, expected, strict=True)]) / max(energy(expected), 1e-30)

        by_tensor: dict[str, list[Linear]] = {}  # a checkpoint may store several matrices as one
        for matrix in self.plan.linears:
            if self.layout.recipe.of(matrix).kind != "fp32":
                by_tensor.setdefault(f"{matrix.tensor}.weight", []).append(matrix)
        found = [
            self._noise(tensor, matrices, relative(self._only(tensor, matrices)) if states else 0.0)
            for tensor, matrices in by_tensor.items()
        ]
        return [*found, self._stacked(relative(self._only_stacks()))] if self._stacks() else found

    def _stacks(self) -> list[str]:
        """The slots of rounded matrices that are no `Linear`: experts, in the class's format or another."""
        linear = {matrix.slot for matrix in self.plan.linears}
        return [slot for slot in self._cut if f"{slot}_scales" in self._cut and slot not in linear]

    def _stacked(self, relative: float) -> Noise:
        formats = self.layout.recipe.of_experts(self.plan.core) if isinstance(self.plan.core, Mixture) else ()
        tally = _Tally()
        width = outputs = 0
        for slot in self._stacks():
            form, experts = formats[slot.startswith(OTHER)]
            exacts, scales = self._plain_cut[slot.removeprefix(OTHER)], self._cut[f"{slot}_scales"]
            if len(formats) > 1:
                exacts = [exacts[expert] for expert in experts]
            for exact, values, scale in zip(exacts, self._cut[slot], scales, strict=True):
                inputs = exact.shape[-1]
                packed = Packed(values.reshape(-1, *values.shape[-2:]), scale.reshape(-1, scale.shape[-1]))
                numbers = exact.reshape(-1, inputs)
                tally.add(numbers, dequantize(packed, form, inputs), values.nbytes + scale.nbytes)
                width, outputs = max(width, inputs), outputs + len(numbers)
        names = [name for name in self.plan.tensors() if name not in _named(self.plan)]
        pattern = f"{commonprefix(names)}*"  # noqa: RUF071 - of characters: up to where the experts' names part
        return Noise(pattern, self.layout.recipe.base, outputs, width, tally, relative)

    def _only_stacks(self) -> Sessions:
        """The segment with only these rounded."""
        plain = {f"{matrix.tensor}.weight": Format("fp32") for matrix in self.plan.linears}
        recipe = replace(self.layout.recipe, exceptions={**self.layout.recipe.exceptions, **plain})
        linear = {matrix.slot for matrix in self.plan.linears}
        cut: Cut = {slot: self._plain_cut[slot] if slot in linear else arrays for slot, arrays in self._cut.items()}
        return start(self.plan, self.layout, recipe, cut, self._open)

    def _only(self, tensor: str, matrices: list[Linear]) -> Sessions:
        """The segment with only this tensor rounded."""
        form = self.layout.recipe.of(matrices[0])
        recipe = replace(self.layout.recipe, numeric_class=self._plain_recipe.numeric_class, exceptions={tensor: form})
        slots = [f"{one.slot}{suffix}" for one in matrices for suffix in form.slots]
        cut: Cut = {**self._plain_cut, **{slot: self._cut[slot] for slot in slots}}
        return start(self.plan, self.layout, recipe, cut, self._open)

    def _noise(self, tensor: str, matrices: list[Linear], relative: float) -> Noise:
        form = self.layout.recipe.of(matrices[0])
        tally = _Tally()
        for matrix in matrices:
            turned = matrix is self.plan.summed and not form.block
            for group, exact in enumerate(self._plain_cut[matrix.slot]):
                numbers = exact.T if matrix is self.plan.summed else exact
                parts = [self._cut[f"{matrix.slot}{suffix}"][group] for suffix in form.slots]
                rounded = _numbers(form, parts, numbers.shape[1], turned=turned)
                tally.add(numbers, rounded, sum(part.nbytes for part in parts))
        return Noise(tensor, form, sum(matrix.outputs for matrix in matrices), matrices[0].inputs, tally, relative)


def _named(plan: SegmentPlan) -> set[str]:
    """The tensors of a plan that are no experts."""
    return set(replace(plan, core=GatedMlp()).tensors())


def _numbers(form: Format, parts: list[Array], inputs: int, *, turned: bool) -> Floats:
    """What cut arrays stand for: [outputs, inputs]; turned: they lie as [inputs, outputs]."""
    if form.kind == "fp16":
        half = parts[0].T if turned else parts[0]
        wide = (half.astype(np.uint32) << np.uint32(16)).view(np.float32) if half.dtype == np.uint16 else half
        return np.asarray(wide, np.float32)
    values = parts[0].T if form.per_row else parts[0]
    return dequantize(Packed(values, parts[1], parts[2] if len(parts) > 2 else None), form, inputs)


def energy(arrays: Sequence[Floats]) -> float:
    """Sum of squares."""
    return float(sum(np.sum(np.square(one, dtype=np.float64)) for one in arrays))
