"""Products with the matrices of a segment, in every format, for joined, replicated and summed ones.

Rows are float32 [S, inputs]. Matrices in blocks go through MatMulNBits. int8 without a block rounds the rows: a row's
largest number becomes 127, the integers are multiplied exactly, and the two scales are put back; matrices that share
rows share their rounding. A summed matrix rounds each group's columns by a scale of their own, so that no scale depends
on the split.
"""

from __future__ import annotations

from itertools import groupby
from typing import Final

import numpy as np
from onnx import TensorProto, numpy_helper

from ganglion.partitioner.families.plans import Linear, SegmentPlan
from ganglion.partitioner.graphs.nodes import MICROSOFT, Nodes
from ganglion.partitioner.quantize.formats import Format
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.partitioner.slots import sums_by_group
from ganglion.wire.nouns import Segment
from ganglion.wire.shares import Groups, group_count, share_pieces, slot_offsets

TINY: Final = 1e-8  # a row whose numbers are all smaller is rounded as if one were as large
ROW_LEVELS: Final = 127.0  # of a row's numbers, on either side of zero
ROW_ZERO: Final = np.uint8(128)


class Products(Nodes):
    """Adds products to the graph of a share of a segment; `held`: pieces of each slot, `sizes`: bytes of one."""

    def __init__(self, plan: SegmentPlan, segment: Segment, share: Groups, recipe: Recipe) -> None:
        super().__init__(plan.kind)
        self.plan, self.count, self.recipe = plan, group_count(share), recipe
        self.numeric_class = recipe.numeric_class
        self.exact = self.numeric_class.exact
        self.wide = TensorProto.DOUBLE if self.exact else TensorProto.FLOAT
        self.offsets = slot_offsets(segment, share)
        self.held = {slot.name: len(share_pieces(slot, share)) for slot in segment.slots}
        self.sizes = {slot.name: slot.growth * slot.pieces[0].size for slot in segment.slots if slot.pieces}
        self._rounded_rows: dict[str, tuple[str, str]] = {}

    def seam(self, value: str, name: str, width: int) -> str:
        """End this graph with rows `value`, and begin the next, which knows nothing of what was rounded here."""
        if self.plan.entry.mode == "keep":
            raise ValueError(f"segment {self.plan.kind}: what it has not yet exchanged does not pass a seam")
        self._rounded_rows.clear()
        return super().seam(value, name, width)

    def joined(self, rows: str, some: tuple[Linear, ...] = ()) -> str:
        """The products with every matrix that is cut by outputs (or some), side by side: [S, sum of widths]."""
        products = self._by_format(rows, some or self.plan.joined)
        return products[0] if len(products) == 1 else self.node("Concat", products, axis=-1)[0]

    def joined_apart(self, rows: str) -> list[str]:
        """The product with each matrix that is cut by outputs, all of one width: [S, width] each."""
        products, matrices = self._by_format(rows, self.plan.joined), len(self.plan.joined)
        if len(products) == matrices:
            return products
        if len(products) > 1:
            products = self.node("Concat", products, axis=-1)
        return self.node("Split", products, outputs=matrices, axis=-1, num_outputs=matrices)

    def _by_format(self, rows: str, joined: tuple[Linear, ...]) -> list[str]:
        """A product for each run of matrices that one product serves."""
        products = []
        for (form, _), run in groupby(joined, lambda one: (self.recipe.of(one), one.bias)):
            matrices = list(run)
            # [inputs, outputs] of one matrix are not neighbors of the next one's: a product each.
            together = [[one] for one in matrices] if form.per_row else [matrices]
            products += [self._joined(rows, part, self.count * sum(one.width for one in part)) for part in together]
        return products

    def replicated(self, rows: str, matrix: Linear) -> str:
        """The product with a matrix that every share holds: [S, outputs]."""
        return self._joined(rows, [matrix], matrix.width)

    def summed_terms(self, rows: str, matrix: Linear) -> list[str]:
        """What a partial sum is made of, in the width of sums: of each group or of the share, and the bias."""
        if self.recipe.of(matrix).per_row:
            terms = self._summed_rounded(rows, matrix)
        elif sums_by_group(matrix, self.recipe):
            parts = enumerate(self.by_group(rows))
            terms = [self._summed_product(part, matrix, group, 1) for group, part in parts]
        else:
            terms = [self._summed_product(rows, matrix, 0, self.count)]
        terms = [self.widen(term) for term in terms]
        return [*terms, self._summed_bias(matrix)] if matrix.bias else terms

    def by_group(self, rows: str) -> list[str]:
        """The columns of each group."""
        if self.count == 1:
            return [rows]
        return self.node("Split", [rows], outputs=self.count, axis=-1, num_outputs=self.count)

    def widen(self, value: str) -> str:
        """In the width of sums: float64 in exact classes."""
        return self.node("Cast", [value], to=TensorProto.DOUBLE)[0] if self.exact else value

    def narrow(self, value: str) -> str:
        """A sum in float32."""
        return self.node("Cast", [value], to=TensorProto.FLOAT)[0] if self.exact else value

    def weight(self, slot: str, shape: list[int]) -> str:
        """A float32 initializer: the whole of a slot of this share."""
        return self.external(slot, TensorProto.FLOAT, shape, self.offsets[slot])

    def _joined(self, rows: str, matrices: list[Linear], outputs: int) -> str:
        """One product with neighboring matrices of one format, which lie in `weights.bin` one after the other."""
        first = matrices[0]
        form, slot = self.recipe.of(first), first.slot
        if form.per_row:
            integers, scale = self._rounded(rows)
            product = self._integers(integers, scale, slot, 0, outputs=outputs, inputs=first.inputs)
        elif form.block:
            product = self._blocks(rows, slot, form, 0, outputs=outputs, inputs=first.inputs)
        else:
            weight = self.external(slot, TensorProto.FLOAT, [outputs, first.inputs], self.offsets[slot])
            product = self.node("Gemm", [rows, weight], transB=1)[0]
        if first.bias:
            bias = self.external(f"{slot}_bias", TensorProto.FLOAT, [outputs], self.offsets[f"{slot}_bias"])
            product = self.node("Add", [product, bias])[0]
        return product

    def _summed_product(self, rows: str, matrix: Linear, group: int, groups: int) -> str:
        """The product of `groups` groups from `group` on with their columns of the matrix."""
        inputs, form = groups * matrix.width, self.recipe.of(matrix)
        if form.block:
            return self._blocks(rows, matrix.slot, form, group, outputs=matrix.outputs, inputs=inputs)
        offset = self.offsets[matrix.slot] + group * self.sizes[matrix.slot]
        weight = self.external(f"{matrix.slot}.{group}", TensorProto.FLOAT, [inputs, matrix.outputs], offset)
        return self.node("MatMul", [rows, weight])[0]

    def _summed_rounded(self, rows: str, matrix: Linear) -> list[str]:
        """A product of integers for each group, all rounded at once: [S, outputs] each."""
        by_group = self.reshape(rows, [-1, self.count, matrix.width])
        integers, scales = self._rounded(by_group)
        parts = self.node("Split", [integers], outputs=self.count, axis=1, num_outputs=self.count)
        steps = self.node("Split", [scales], outputs=self.count, axis=1, num_outputs=self.count)
        sizes = {"outputs": matrix.outputs, "inputs": matrix.width}
        products = [
            self._integers(part, step, matrix.slot, group, **sizes)
            for group, (part, step) in enumerate(zip(parts, steps, strict=True))
        ]
        return [self.reshape(product, [-1, matrix.outputs]) for product in products]

    def _summed_bias(self, matrix: Linear) -> str:
        """The share's biases (only group 0 has one that is not zero), in the width of the sum: [outputs]."""
        slot = f"{matrix.slot}_bias"
        biases = self.external(slot, TensorProto.FLOAT, [self.count, matrix.outputs], self.offsets[slot])
        return self.node("ReduceSum", [self.widen(biases), self.shape([0])], keepdims=0)[0]

    def _blocks(self, rows: str, slot: str, form: Format, group: int, *, outputs: int, inputs: int) -> str:
        """The product with a matrix in blocks, from the bytes of `group` on."""
        blocks = -(-inputs // form.block)
        shapes = {
            "": (TensorProto.UINT8, [outputs, blocks, form.block * form.bits // 8]),
            "_scales": (TensorProto.FLOAT, [outputs, blocks]),
            "_zeros": (TensorProto.UINT8, [outputs, -(-blocks * form.bits // 8)]),
        }
        operands = [self._part(f"{slot}{suffix}", group, *shapes[suffix]) for suffix in form.slots]
        return self.node(
            "MatMulNBits",
            [rows, *operands],
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=form.bits,
            block_size=form.block,
            accuracy_level=4,
        )[0]

    def _rounded(self, rows: str) -> tuple[str, str]:
        """Rows as uint8 around 128, and what an integer stands for: [..., 1]; once for equal rows."""
        if rows not in self._rounded_rows:
            largest = self.node("ReduceMax", [self.node("Abs", [rows])[0], self.shape([-1])], keepdims=1)[0]
            largest = self.node("Max", [largest, self.constant(TINY)])[0]
            levels = self.constant(ROW_LEVELS)
            raised = self.node("Mul", [rows, self.node("Div", [levels, largest])[0]])[0]
            integers = self.node("QuantizeLinear", [raised, self.constant(1.0), self._row_zero()])[0]
            self._rounded_rows[rows] = integers, self.node("Div", [largest, levels])[0]
        return self._rounded_rows[rows]

    def _integers(self, integers: str, scale: str, slot: str, group: int, *, outputs: int, inputs: int) -> str:
        """The product of rounded rows with the int8 matrix of `group` [inputs, outputs], in float32."""
        weight = self._part(slot, group, TensorProto.INT8, [inputs, outputs])
        scales = self._part(f"{slot}_scales", group, TensorProto.FLOAT, [outputs])
        product = self.node(
            "MatMulIntegerToFloat",
            [integers, weight, self.constant(1.0), scales, self._row_zero()],
            domain=MICROSOFT,
        )[0]
        return self.node("Mul", [product, scale])[0]

    def _part(self, slot: str, group: int, dtype: int, shape: list[int]) -> str:
        """The initializer of a slot from the bytes of `group` on."""
        offset = self.offsets[slot] + group * self.sizes[slot]
        return self.external(f"{slot}.{group}" if group else slot, dtype, shape, offset)

    def _row_zero(self) -> str:
        name = f"zero{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(ROW_ZERO), name))
        return name
