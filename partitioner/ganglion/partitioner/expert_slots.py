"""The slots of a layer of experts, and the bytes of each for one group: of columns of all of them, or a whole expert.

The router is float32 in every class. `experts_in` [experts, 2 * width, hidden] has gate's and up's outputs in turn,
`experts_out` [experts, hidden, width]; int4 blocks lie along the inputs. Where every group is a product of its own
(exact classes) groups follow each other; elsewhere one product takes the share's groups, so each expert's columns lie
side by side. Of the output biases group 0 holds the experts' own, the others zeros: they belong to the sum once. A
group that is a whole expert has its part of the stacks, [2 * width, hidden] and [hidden, width], and its own biases.
Where whole experts of a layer are of two formats, those in the other one than the class's have slots of their own,
whose names begin with `other_`, and the slot `experts_other` marks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from ganglion.partitioner.checkpoint import Checkpoint
from ganglion.partitioner.families.experts import Mixture, Separate, Stacked
from ganglion.partitioner.quantize.blocks import quantize
from ganglion.partitioner.quantize.formats import Format
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.partitioner.quantize.repack import padded, read_columns, read_rows
from ganglion.partitioner.weights import Floats, Packed, Weights

Array = npt.NDArray[Any]
Join = Literal["rows", "columns", "whole", "marks"]
ROUTER: Final = "router"
IN: Final = "experts_in"
OUT: Final = "experts_out"
OTHER: Final = "other_"  # before the names of slots of the experts that have not the class's format
WHICH: Final = "experts_other"


def expert_slots(core: Mixture, recipe: Recipe) -> Iterator[tuple[str, Join, int]]:
    """Name, join and rows of every slot in order, where groups are columns."""
    for name in _router_slots(core):
        yield name, "whole", 1
    join: Join = "rows" if recipe.numeric_class.exact else "columns"
    for slot, rows in ((IN, core.stacked), (OUT, core.stacked * core.hidden)):
        for suffix in recipe.base.slots:
            yield f"{slot}{suffix}", join, rows if join == "columns" else 1
    if core.bias:
        yield f"{IN}_bias", join, core.stacked if join == "columns" else 1
        yield f"{OUT}_bias", "rows", 1


def whole_expert_slots(core: Mixture, recipe: Recipe) -> Iterator[tuple[str, Join, tuple[int, ...] | None]]:
    """Name, join and groups of every slot in order, where a group is an expert."""
    for name in _router_slots(core):
        yield name, "whole", None
    formats = recipe.of_experts(core)
    for (form, experts), before in zip(formats, ("", OTHER), strict=False):
        for slot in (IN, OUT):
            for suffix in (*form.slots, *(("_bias",) if core.bias else ())):
                yield f"{before}{slot}{suffix}", "rows", experts if len(formats) > 1 else None
    if len(formats) > 1:
        yield WHICH, "marks", formats[1][1]


def _router_slots(core: Mixture) -> tuple[str, ...]:
    return (ROUTER, f"{ROUTER}_bias") if core.router_bias else (ROUTER,)


def cut_router(core: Mixture, checkpoint: Checkpoint) -> Iterator[dict[str, Array]]:
    """Slot name -> numbers of what every share holds."""
    yield {ROUTER: checkpoint.tensor(f"{core.router}.weight", core.experts, core.hidden).rows(0, core.experts)}
    if core.router_bias:
        yield {f"{ROUTER}_bias": checkpoint.tensor(f"{core.router}.bias", core.experts).rows(0, core.experts)}


def cut_experts(core: Mixture, checkpoint: Checkpoint, recipe: Recipe, group: int) -> Iterator[dict[str, Array]]:
    """Slot name -> numbers of one group of columns of every expert, an expert at a time."""
    source = _Source(core, checkpoint, recipe, group, recipe.base)
    yield _stack(IN, core, recipe, source.entering)
    yield _stack(OUT, core, recipe, source.leaving)
    if core.bias:
        yield source.biases(group)


def cut_expert(core: Mixture, checkpoint: Checkpoint, recipe: Recipe, expert: int) -> Iterator[dict[str, Array]]:
    """Slot name -> numbers of one whole expert, a matrix at a time."""
    form = recipe.of_expert(core, expert)
    source = _Source(core, checkpoint, recipe, 0, form)
    before = OTHER if form != recipe.base else ""
    for slot, read in ((IN, source.entering), (OUT, source.leaving)):
        yield {f"{before}{slot}{suffix}": array for suffix, array in _parts(read(expert)).items()}
    if core.bias:
        yield {f"{before}{slot}": array for slot, array in source.biases_of(expert).items()}


def expert_bytes(core: Mixture, form: Format, scratch: int, experts: int) -> int:
    """Bytes that cutting a group of `experts` takes: both stacks, and `scratch` times one's float32 numbers."""
    outputs = 2 * core.width
    stacks = form.weight_bytes(outputs, core.hidden) + form.weight_bytes(core.hidden, core.width)
    return experts * stacks + scratch * 4 * outputs * core.hidden


def _stack(slot: str, core: Mixture, recipe: Recipe, read: Callable[[int], Packed | Floats]) -> dict[str, Array]:
    """The experts' matrices one after the other, each put in its place as it is read."""
    found: dict[str, Array] = {}
    for expert in range(core.stacked):
        for suffix, array in _parts(read(expert)).items():
            name = f"{slot}{suffix}"
            if not expert:
                found[name] = np.empty((core.stacked, *array.shape), array.dtype)
            found[name][expert] = array
    return found


def _parts(one: Packed | Floats) -> dict[str, Array]:
    """A matrix's numbers by the suffix of their slot."""
    return {"": one.values, "_scales": one.scales} if isinstance(one, Packed) else {"": one}


class _Source:
    """Where the columns of one group come from."""

    def __init__(self, core: Mixture, checkpoint: Checkpoint, recipe: Recipe, group: int, form: Format) -> None:
        self.core, self.checkpoint, self.form, self.recipe = core, checkpoint, form, recipe
        self.start = group * core.width
        self.stop = min(self.start + core.width, core.intermediate)

    def entering(self, expert: int) -> Packed | Floats:
        """Gate's and up's outputs in turn [2 * width, hidden]."""
        core = self.core
        if isinstance(core.stored, Stacked):
            stack = self.checkpoint.tensor(core.stored.gate_up, core.experts, core.hidden, 2 * core.intermediate)
            columns = stack.part(expert).columns(2 * self.start, 2 * self.stop)
            return self._formatted(_padded(columns.T, 2 * core.width, core.hidden))
        stored, first, beside = self._separate(expert)
        shape = beside * core.intermediate, core.hidden
        tensors = [self.checkpoint.tensor(f"{name}.weight", *shape) for name in (stored.gate, stored.up)]
        if all(self.form.holds(one.packing) for one in tensors):
            return _in_turn([self._rows(one, first) for one in tensors])
        gate, up = (one.rows(first + self.start, first + self.stop) for one in tensors)
        turns = np.stack([gate, up], axis=1).reshape(-1, core.hidden)
        return self._formatted(_padded(turns, 2 * core.width, core.hidden))

    def leaving(self, expert: int) -> Packed | Floats:
        """The output matrix's columns [hidden, width]."""
        core = self.core
        if isinstance(core.stored, Stacked):
            stack = self.checkpoint.tensor(core.stored.down, core.experts, core.intermediate, core.hidden)
            columns = stack.part(expert).rows(self.start, self.stop).T
            return self._formatted(_padded(columns, core.hidden, core.width))
        stored, first, beside = self._separate(expert)
        tensor = self.checkpoint.tensor(f"{stored.down}.weight", core.hidden, beside * core.intermediate)
        start, stop = first + self.start, first + self.stop
        if self.form.holds(tensor.packing) and not start % self.form.block:
            return padded(read_columns(tensor, start, stop, self.form), self.form, core.hidden, core.width)
        return self._formatted(_padded(tensor.columns(start, stop), core.hidden, core.width))

    def biases(self, group: int) -> dict[str, Array]:
        """The biases of a stack: those of the group's columns, and the outputs' where it is the first."""
        core = self.core
        if not isinstance(core.stored, Stacked):
            raise TypeError("biases of experts that are not stacked")
        entering = self.checkpoint.tensor(f"{core.stored.gate_up}_bias", core.experts, 2 * core.intermediate)
        leaving = self.checkpoint.tensor(f"{core.stored.down}_bias", core.experts, core.hidden).rows(0, core.experts)
        columns = entering.columns(2 * self.start, 2 * self.stop)
        return {
            f"{IN}_bias": _padded(columns, core.experts, 2 * core.width),
            f"{OUT}_bias": leaving if group == 0 else np.zeros_like(leaving),
        }

    def biases_of(self, expert: int) -> dict[str, Array]:
        """The biases of one whole expert: [2 * width] and [hidden]."""
        core = self.core
        if not isinstance(core.stored, Stacked):
            raise TypeError("biases of experts that are not stacked")
        entering = self.checkpoint.tensor(f"{core.stored.gate_up}_bias", core.experts, 2 * core.intermediate)
        leaving = self.checkpoint.tensor(f"{core.stored.down}_bias", core.experts, core.hidden)
        one, other = (tensor.rows(expert, expert + 1) for tensor in (entering, leaving))
        return {f"{IN}_bias": _padded(one, 1, 2 * core.width)[0], f"{OUT}_bias": other[0]}

    def _separate(self, expert: int) -> tuple[Separate, int, int]:
        """An expert's names, its first column in their matrices, and how many lie in them side by side."""
        core = self.core
        if expert < core.experts and isinstance(core.stored, Separate):
            return core.stored.of(expert), 0, 1
        if core.stored_shared is None:
            raise TypeError(f"expert {expert} of {core.stacked} is stored nowhere")
        return core.stored_shared, (expert - core.experts) * core.intermediate, core.shared

    def _rows(self, tensor: Weights, first: int) -> Packed:
        rows = read_rows(tensor, first + self.start, first + self.stop, self.form)
        return padded(rows, self.form, self.core.width, self.core.hidden)

    def _formatted(self, numbers: Floats) -> Packed | Floats:
        return quantize(numbers, self.form, self.recipe.rounding) if self.form.block else numbers


def _in_turn(pair: list[Packed]) -> Packed:
    values = np.stack([one.values for one in pair], axis=1)
    scales = np.stack([one.scales for one in pair], axis=1)
    return Packed(values.reshape(-1, *values.shape[2:]), scales.reshape(-1, scales.shape[2]))


def _padded(numbers: Floats, rows: int, columns: int) -> Floats:
    """With zeros up to [rows, columns]."""
    return np.pad(numbers, [(0, rows - numbers.shape[0]), (0, columns - numbers.shape[1])])
