"""The slots of a segment: their order in `weights.bin`, and the bytes of each for one group.

Order: the vectors of every share, the replicated matrices, the vectors that are cut by groups; the joined matrices one
after the other (neighbors, so that one initializer spans those of one format and one product serves them), their
scales, zero points and biases; the summed matrix, its scales, zero points and bias; what `expert_slots` has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.checkpoint import Checkpoint
from ganglion.partitioner.expert_slots import cut_expert, cut_experts, cut_router, expert_slots, whole_expert_slots
from ganglion.partitioner.families.experts import Mixture
from ganglion.partitioner.families.plans import GroupVector, Linear, SegmentPlan, Vector
from ganglion.partitioner.quantize.blocks import quantize, quantize_rows
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.partitioner.quantize.repack import padded, read_columns, read_rows
from ganglion.partitioner.weights import Floats, Packed
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import PieceRef, Slot

Array = npt.NDArray[Any]
Join = Literal["rows", "columns", "whole", "marks"]
SUFFIXES = ("", "_scales", "_zeros")


@dataclass(frozen=True)
class SlotPlan:
    """Name, join, rows, stored type and groups of a slot, as `Slot` has them, before its pieces are known."""

    name: str
    join: Join
    rows: int = 1
    stored: Literal["", "float16", "bfloat16"] = ""
    groups: tuple[int, ...] | None = None

    def filled(self, pieces: tuple[PieceRef, ...]) -> Slot:
        """The slot with its pieces, by rising group."""
        return Slot(
            name=self.name, join=self.join, rows=self.rows, pieces=pieces, stored=self.stored, groups=self.groups
        )


def slots_of(plan: SegmentPlan, recipe: Recipe) -> tuple[SlotPlan, ...]:
    """The slots of a segment in order."""
    slots = [SlotPlan(vector.slot, "whole") for vector in plan.wholes]
    for matrix in plan.replicated:
        slots += [_slot(matrix, suffix, "whole", recipe) for suffix in recipe.of(matrix).slots]
        slots += [SlotPlan(f"{matrix.slot}_bias", "whole")] if matrix.bias else []
    slots += [SlotPlan(vector.slot, "rows") for vector in plan.grouped]
    for suffix in SUFFIXES:
        for matrix in plan.joined:
            if suffix in recipe.of(matrix).slots:
                # Products of integers take [inputs, outputs], where groups lie side by side.
                by_columns = recipe.of(matrix).per_row and not suffix
                slots.append(_slot(matrix, suffix, "columns" if by_columns else "rows", recipe, matrix.inputs))
    slots += [SlotPlan(f"{matrix.slot}_bias", "rows") for matrix in plan.joined if matrix.bias]
    if plan.summed is not None:
        # [outputs, blocks] per group joins by columns where one product takes all groups.
        form = recipe.of(plan.summed)
        by_columns = bool(form.block) and not sums_by_group(plan.summed, recipe)
        join: Join = "columns" if by_columns else "rows"
        slots += [_slot(plan.summed, suffix, join, recipe, plan.summed.outputs) for suffix in form.slots]
        if plan.summed.bias:
            slots.append(SlotPlan(f"{plan.summed.slot}_bias", "rows"))
    if isinstance(plan.core, Mixture):
        if plan.axis == "experts":
            slots += [
                SlotPlan(name, join, groups=groups) for name, join, groups in whole_expert_slots(plan.core, recipe)
            ]
        else:
            slots += [SlotPlan(*one) for one in expert_slots(plan.core, recipe)]
    return tuple(slots)


def sums_by_group(matrix: Linear, recipe: Recipe) -> bool:
    """Whether every group of a summed matrix has a product of its own.

    In exact classes always; elsewhere where products round rows with a scale of each group's own, and where a group
    does not end with a block, or with a byte of its zero points.
    """
    form = recipe.of(matrix)
    uneven = form.block and (matrix.width % form.block or (form.zero_points and matrix.width // form.block % 2))
    return recipe.numeric_class.exact or form.per_row or bool(uneven)


def cut_vector(vector: Vector, checkpoint: Checkpoint) -> Array:
    """A vector as float32 [length]."""
    found = checkpoint.tensor(vector.tensor, vector.length).rows(0, vector.length)
    return found + np.float32(vector.add) if vector.add else found


def cut_grouped(vector: GroupVector, checkpoint: Checkpoint, group: int) -> Array:
    """A group's numbers of a tensor that is cut as it is: float32 [width]."""
    tensor = checkpoint.tensor(vector.tensor, *vector.shape)
    per_row = int(np.prod(vector.shape[1:], dtype=np.int64))
    start, stop = group * vector.width // per_row, (group + 1) * vector.width // per_row
    return tensor.rows(start, stop).reshape(-1)


def cut_joined(matrix: Linear, checkpoint: Checkpoint, recipe: Recipe, group: int) -> dict[str, Array]:
    """Slot name -> numbers of one group of a matrix cut by outputs: [width, inputs], and its scales and bias."""
    tensor = checkpoint.tensor(f"{matrix.tensor}.weight", matrix.stored_outputs, matrix.inputs)
    start, stop = (matrix.first + at for at in _span(group, matrix.width, matrix.outputs))
    form = recipe.of(matrix)
    if form.holds(tensor.packing):
        cut = _packed(matrix, padded(read_rows(tensor, start, stop, form), form, matrix.width, matrix.inputs))
    elif form.block:

        def read(first: int, end: int) -> Floats:
            return _padded(tensor.rows(start + first, min(start + end, stop)), 0, end - first)

        cut = _packed(matrix, quantize_rows(read, matrix.width, matrix.inputs, form, recipe.rounding))
    else:
        cut = _formatted(matrix, _padded(tensor.rows(start, stop), 0, matrix.width), recipe)
    if matrix.bias:
        bias = checkpoint.tensor(f"{matrix.tensor}.bias", matrix.stored_outputs).rows(start, stop)
        cut[f"{matrix.slot}_bias"] = _padded(bias, 0, matrix.width)
    return cut


def cut_summed(matrix: Linear, checkpoint: Checkpoint, recipe: Recipe, group: int) -> dict[str, Array]:
    """Slot name -> numbers of one group of a matrix cut by inputs: in blocks [outputs, ...], else [width, outputs].

    Its bias belongs to the sum once: group 0 holds it, the others zeros.
    """
    tensor = checkpoint.tensor(f"{matrix.tensor}.weight", matrix.stored_outputs, matrix.inputs)
    start, stop = _span(group, matrix.width, matrix.inputs)
    form = recipe.of(matrix)
    if form.holds(tensor.packing) and matrix.width % form.block == 0:
        cut = _packed(matrix, padded(read_columns(tensor, start, stop, form), form, matrix.outputs, matrix.width))
    else:
        columns = _padded(tensor.columns(start, stop), 1, matrix.width)
        cut = _formatted(matrix, columns, recipe, turned=not form.block)
    if matrix.bias:
        bias = checkpoint.tensor(f"{matrix.tensor}.bias", matrix.stored_outputs).rows(0, matrix.outputs)
        cut[f"{matrix.slot}_bias"] = bias if group == 0 else np.zeros_like(bias)
    return cut


def cut_whole(plan: SegmentPlan, checkpoint: Checkpoint, recipe: Recipe) -> Iterator[dict[str, Array]]:
    """Slot name -> numbers of what every share holds: vectors, and replicated matrices."""
    for vector in plan.wholes:
        yield {vector.slot: cut_vector(vector, checkpoint)}
    for matrix in plan.replicated:
        yield cut_joined(matrix, checkpoint, recipe, 0)
    if isinstance(plan.core, Mixture):
        yield from cut_router(plan.core, checkpoint)


def cut_group(plan: SegmentPlan, checkpoint: Checkpoint, recipe: Recipe, group: int) -> Iterator[dict[str, Array]]:
    """Slot name -> numbers of one group of a segment, a matrix at a time: no more than that is in memory."""
    for vector in plan.grouped:
        yield {vector.slot: cut_grouped(vector, checkpoint, group)}
    for matrix in plan.joined:
        yield cut_joined(matrix, checkpoint, recipe, group)
    if plan.summed is not None:
        yield cut_summed(plan.summed, checkpoint, recipe, group)
    if isinstance(plan.core, Mixture):
        cut = cut_expert if plan.axis == "experts" else cut_experts
        yield from cut(plan.core, checkpoint, recipe, group)


def _slot(matrix: Linear, suffix: str, join: Join, recipe: Recipe, rows: int = 1) -> SlotPlan:
    stored = "" if suffix else recipe.stored(matrix)
    return SlotPlan(f"{matrix.slot}{suffix}", join, rows if join == "columns" else 1, stored)


def _packed(matrix: Linear, packed: Packed) -> dict[str, Array]:
    arrays = (packed.values, packed.scales, packed.zero_points)
    named = zip(SUFFIXES, arrays, strict=True)
    return {f"{matrix.slot}{suffix}": array for suffix, array in named if array is not None}


def _formatted(matrix: Linear, weights: Floats, recipe: Recipe, *, turned: bool = False) -> dict[str, Array]:
    """Slot name -> numbers of [outputs, inputs] in the matrix's format; turned: stored as [inputs, outputs]."""
    form = recipe.of(matrix)
    if form.kind in ("fp32", "fp16"):
        stored = _halved(matrix, weights, recipe) if form.kind == "fp16" else weights
        return {matrix.slot: stored.T if turned else stored}
    packed = quantize(weights, form, recipe.rounding)
    cut = _packed(matrix, packed)
    if form.per_row:
        cut[matrix.slot] = packed.values.T
    return cut


def _halved(matrix: Linear, weights: Floats, recipe: Recipe) -> Array:
    """In 16 bits: bfloat16 (its upper half, which the source holds) or float16, rounded to the nearest."""
    if recipe.stored(matrix) == "bfloat16":
        return (weights.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    with np.errstate(over="ignore"):
        half = weights.astype(np.float16)
    if not np.isfinite(half).all():
        raise Unsupported(
            f"tensor {matrix.tensor}.weight: holds {np.abs(weights).max():.6g}, float16 goes up to 65504; use fp32",
            param="format",
        )
    return half


def _span(group: int, width: int, size: int) -> tuple[int, int]:
    return group * width, min((group + 1) * width, size)


def _padded(array: Floats, axis: int, size: int) -> Floats:
    missing = size - array.shape[axis]
    if not missing:
        return array
    return np.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])
