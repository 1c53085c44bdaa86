"""The slots of a segment: their order in `weights.bin`, and the bytes of each for one group.

Order: the vectors of every share, the replicated matrices, the vectors that are cut by groups; the joined matrices one
after the other (neighbors, so that one initializer spans them and one product serves all), their scales, their biases;
the summed matrix, its scales, its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.checkpoint import Checkpoint
from ganglion.partitioner.families.plans import GroupVector, Linear, SegmentPlan, Vector
from ganglion.partitioner.quantize import quantize_int4
from ganglion.wire.nouns import NumericClass

Array = npt.NDArray[Any]
Join = Literal["rows", "columns", "whole"]


@dataclass(frozen=True)
class SlotPlan:
    """Name, join and rows of a slot, as `Slot` has them, before its pieces are known."""

    name: str
    join: Join
    rows: int = 1


def slots_of(plan: SegmentPlan, numeric_class: NumericClass) -> tuple[SlotPlan, ...]:
    """The slots of a segment in order."""
    slots = [SlotPlan(vector.slot, "whole") for vector in plan.wholes]
    quantized = numeric_class.format == "int4"
    for matrix in plan.replicated:
        slots.append(SlotPlan(matrix.slot, "whole"))
        slots += [SlotPlan(f"{matrix.slot}_scales", "whole")] if quantized else []
        slots += [SlotPlan(f"{matrix.slot}_bias", "whole")] if matrix.bias else []
    slots += [SlotPlan(vector.slot, "rows") for vector in plan.grouped]
    slots += [SlotPlan(matrix.slot, "rows") for matrix in plan.joined]
    slots += [SlotPlan(f"{matrix.slot}_scales", "rows") for matrix in plan.joined if quantized]
    slots += [SlotPlan(f"{matrix.slot}_bias", "rows") for matrix in plan.joined if matrix.bias]
    if plan.summed is not None:
        # [outputs, inputs] per group joins by columns where one product takes all groups; fp32 stores it transposed.
        by_columns = quantized and not numeric_class.exact
        join: Join = "columns" if by_columns else "rows"
        rows = plan.summed.outputs if by_columns else 1
        slots.append(SlotPlan(plan.summed.slot, join, rows))
        if quantized:
            slots.append(SlotPlan(f"{plan.summed.slot}_scales", join, rows))
        if plan.summed.bias:
            slots.append(SlotPlan(f"{plan.summed.slot}_bias", "rows"))
    return tuple(slots)


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


def cut_joined(matrix: Linear, checkpoint: Checkpoint, numeric_class: NumericClass, group: int) -> dict[str, Array]:
    """Slot name -> bytes of one group of a matrix cut by outputs: [width, inputs], and its scales and bias."""
    tensor = checkpoint.tensor(f"{matrix.tensor}.weight", matrix.stored_outputs, matrix.inputs)
    start, stop = (matrix.first + at for at in _span(group, matrix.width, matrix.outputs))
    cut = _formatted(matrix, _padded(tensor.rows(start, stop), 0, matrix.width), numeric_class)
    if matrix.bias:
        bias = checkpoint.tensor(f"{matrix.tensor}.bias", matrix.stored_outputs).rows(start, stop)
        cut[f"{matrix.slot}_bias"] = _padded(bias, 0, matrix.width)
    return cut


def cut_summed(matrix: Linear, checkpoint: Checkpoint, numeric_class: NumericClass, group: int) -> dict[str, Array]:
    """Slot name -> bytes of one group of a matrix cut by inputs: fp32 [width, outputs], int4 [outputs, blocks, ...].

    Its bias belongs to the sum once: group 0 holds it, the others zeros.
    """
    tensor = checkpoint.tensor(f"{matrix.tensor}.weight", matrix.stored_outputs, matrix.inputs)
    start, stop = _span(group, matrix.width, matrix.inputs)
    columns = _padded(tensor.columns(start, stop), 1, matrix.width)
    quantized = numeric_class.format == "int4"
    cut = _formatted(matrix, columns if quantized else np.ascontiguousarray(columns.T), numeric_class)
    if matrix.bias:
        bias = checkpoint.tensor(f"{matrix.tensor}.bias", matrix.stored_outputs).rows(0, matrix.outputs)
        cut[f"{matrix.slot}_bias"] = bias if group == 0 else np.zeros_like(bias)
    return cut


def cut_whole(plan: SegmentPlan, checkpoint: Checkpoint, numeric_class: NumericClass) -> Iterator[dict[str, Array]]:
    """Slot name -> bytes of what every share holds: vectors, and replicated matrices."""
    for vector in plan.wholes:
        yield {vector.slot: cut_vector(vector, checkpoint)}
    for matrix in plan.replicated:
        yield cut_joined(matrix, checkpoint, numeric_class, 0)


def cut_group(
    plan: SegmentPlan, checkpoint: Checkpoint, numeric_class: NumericClass, group: int
) -> Iterator[dict[str, Array]]:
    """Slot name -> bytes of one group of a segment, a matrix at a time: no more than one group of one is in memory."""
    for vector in plan.grouped:
        yield {vector.slot: cut_grouped(vector, checkpoint, group)}
    for matrix in plan.joined:
        yield cut_joined(matrix, checkpoint, numeric_class, group)
    if plan.summed is not None:
        yield cut_summed(plan.summed, checkpoint, numeric_class, group)


def _formatted(matrix: Linear, weights: npt.NDArray[np.float32], numeric_class: NumericClass) -> dict[str, Array]:
    if numeric_class.format == "fp32":
        return {matrix.slot: weights}
    packed, scales = quantize_int4(weights, numeric_class.block)
    return {matrix.slot: packed, f"{matrix.slot}_scales": scales}


def _span(group: int, width: int, size: int) -> tuple[int, int]:
    return group * width, min((group + 1) * width, size)


def _padded(array: npt.NDArray[np.float32], axis: int, size: int) -> npt.NDArray[np.float32]:
    missing = size - array.shape[axis]
    if not missing:
        return array
    return np.pad(array, [(0, missing if a == axis else 0) for a in range(array.ndim)])
