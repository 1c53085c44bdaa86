"""A graph under construction: nodes, initializers, and what all segments have: entry, products, partial sum."""

from __future__ import annotations

from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from ganglion.partitioner.families.base import Model
from ganglion.partitioner.families.plans import Linear, Norm, SegmentPlan
from ganglion.wire.nouns import WEIGHTS_FILE, NumericClass, Range, Segment
from ganglion.wire.shares import slot_offsets

OPSET: Final = 21
IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"


class Builder:
    """Builds the graph of `count` groups of a segment. A builder of a core calls `entry`, products, and `leave`."""

    def __init__(
        self, plan: SegmentPlan, segment: Segment, count: int, model: Model, numeric_class: NumericClass
    ) -> None:
        self.plan, self.count, self.model, self.numeric_class = plan, count, model, numeric_class
        self.exact = numeric_class.exact
        self.offsets = slot_offsets(segment, Range(0, count))
        self.sizes = {slot.name: slot.pieces[0].size for slot in segment.slots}
        self.quantized = numeric_class.format == "int4"
        self.wide = TensorProto.DOUBLE if numeric_class.exact else TensorProto.FLOAT
        self.width = plan.width or model.hidden
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    # What segments share.

    def entry(self, *, residual: bool = True) -> str:
        """Take residual and delta as the plan's entry says; the rows for the product. residual: whether it goes out."""
        entry, hidden = self.plan.entry, self.model.hidden
        self.input("res", ["S", hidden])
        self.input("delta", ["S", hidden], self.wide)
        if entry.mode == "keep":
            if residual:
                self.output("res_out", ["S", hidden])
                self.node_to(["res_out"], "Identity", ["res"])
            return self._normed("res", entry.norm)
        delta = self.narrow("delta")
        if entry.post is not None:
            delta = self._normed(delta, entry.post)
        if entry.scale != 1.0:
            delta = self.node("Mul", [delta, self.constant(entry.scale)])[0]
        if residual:
            self.output("res_out", ["S", hidden])
        if entry.norm is None or entry.norm.kind != "rms":
            summed = self.node("Add", ["res", delta])[0] if not residual else "res_out"
            if residual:
                self.node_to(["res_out"], "Add", ["res", delta])
            return self._normed(summed, entry.norm)
        scale = self.weight(entry.norm.weight.slot, [hidden])
        self.node_to(
            ["normed", "", "", "res_out"] if residual else ["normed"],
            "SkipSimplifiedLayerNormalization",
            ["res", delta, scale],
            domain=MICROSOFT,
            epsilon=self.model.epsilon,
        )
        return "normed"

    def carried(self, per_group: int) -> str:
        """The rows that the segment before carried on this device: [S, count * per_group]."""
        self.input("carry", ["S", self.count * per_group])
        return "carry"

    def empty(self) -> None:
        """A device without a group: the residual as everyone has it, and nothing (or what it kept) as partial sum."""
        if self.plan.entry.mode == "keep":
            hidden = self.model.hidden
            self.input("res", ["S", hidden])
            self.input("delta", ["S", hidden], self.wide)
            self.output("res_out", ["S", hidden])
            self.node_to(["res_out"], "Identity", ["res"])
            self.node_to(["partial"], "Identity", ["delta"])
        else:
            self.entry()
            rows = self.node("Shape", ["res"], start=0, end=1)[0]
            shape = self.node("Concat", [rows, self.shape([self.width])], axis=0)[0]
            zero = helper.make_tensor("zero", self.wide, [1], [0.0])
            self.node_to(["partial"], "ConstantOfShape", [shape], value=zero)
        self.output("partial", ["S", self.width], self.wide)

    def leave(self, terms: list[str]) -> None:
        """The partial sum of `terms`, in the width of sums; in mode keep with what was not yet exchanged."""
        if self.plan.entry.mode == "keep":
            terms = [*terms, "delta"]
        self.rename(self.node("Sum", terms)[0] if len(terms) > 1 else terms[0], "partial")
        self.output("partial", ["S", self.width], self.wide)

    def _normed(self, rows: str, norm: Norm | None) -> str:
        if norm is None:
            return rows
        scale = self.weight(norm.weight.slot, [norm.weight.length])
        if norm.kind == "layer":
            return self.node("LayerNormalization", [rows, scale], axis=-1, epsilon=self.model.epsilon)[0]
        return self.node("SimplifiedLayerNormalization", [rows, scale], axis=-1, epsilon=self.model.epsilon)[0]

    # Products.

    def joined(self, rows: str) -> str:
        """One product with every matrix that is cut by outputs: [S, sum of widths]."""
        matrices = self.plan.joined
        width = self.count * sum(matrix.width for matrix in matrices)
        return self._product_with(rows, matrices[0], width)

    def replicated(self, rows: str, matrix: Linear) -> str:
        """The product with a matrix that every share holds: [S, outputs]."""
        return self._product_with(rows, matrix, matrix.outputs)

    def _product_with(self, rows: str, first: Linear, width: int) -> str:
        slot, inputs = first.slot, first.inputs
        if self.quantized:
            offsets = (self.offsets[slot], self.offsets[f"{slot}_scales"])
            product = self._product_int4(rows, slot, offsets, outputs=width, inputs=inputs)
        else:
            weight = self.external(slot, TensorProto.FLOAT, [width, inputs], self.offsets[slot])
            product = self.node("Gemm", [rows, weight], transB=1)[0]
        if first.bias:
            bias = self.external(f"{slot}_bias", TensorProto.FLOAT, [width], self.offsets[f"{slot}_bias"])
            product = self.node("Add", [product, bias])[0]
        return product

    def summed(self, rows: str) -> None:
        """The product that leaves the partial sum: per group and added in float64, or one for the share."""
        matrix = self.plan.summed
        if matrix is None:
            raise ValueError(f"segment {self.plan.kind} has no summed matrix")
        if self.exact:
            products = [self._summed_product(part, matrix, group, 1) for group, part in enumerate(self.by_group(rows))]
            terms = [self.widen(product) for product in products]
        else:
            terms = [self._summed_product(rows, matrix, 0, self.count)]
        if matrix.bias:
            terms.append(self._summed_bias(matrix))
        self.leave(terms)

    def by_group(self, rows: str) -> list[str]:
        """The columns of each group."""
        if self.count == 1:
            return [rows]
        return self.node("Split", [rows], outputs=self.count, axis=-1, num_outputs=self.count)

    def _summed_product(self, rows: str, matrix: Linear, group: int, groups: int) -> str:
        """The product of `groups` groups from `group` on with their columns of the matrix."""
        inputs = groups * matrix.width
        name = f"{matrix.slot}.{group}"
        offset = self.offsets[matrix.slot] + group * self.sizes[matrix.slot]
        if not self.quantized:
            weight = self.external(name, TensorProto.FLOAT, [inputs, matrix.outputs], offset)
            return self.node("MatMul", [rows, weight])[0]
        scales = f"{matrix.slot}_scales"
        offsets = (offset, self.offsets[scales] + group * self.sizes[scales])
        return self._product_int4(rows, name, offsets, outputs=matrix.outputs, inputs=inputs)

    def _summed_bias(self, matrix: Linear) -> str:
        """The share's biases (only group 0 has one that is not zero), in the width of the sum: [outputs]."""
        slot = f"{matrix.slot}_bias"
        biases = self.external(slot, TensorProto.FLOAT, [self.count, matrix.outputs], self.offsets[slot])
        return self.node("ReduceSum", [self.widen(biases), self.shape([0])], keepdims=0)[0]

    def _product_int4(self, rows: str, name: str, offsets: tuple[int, int], *, outputs: int, inputs: int) -> str:
        """The product with an int4 matrix whose values and scales lie at `offsets`."""
        block = self.numeric_class.block
        blocks = -(-inputs // block)
        weight = self.external(name, TensorProto.UINT8, [outputs, blocks, block // 2], offsets[0])
        scales = self.external(f"{name}_scales", TensorProto.FLOAT, [outputs, blocks], offsets[1])
        return self.node(
            "MatMulNBits",
            [rows, weight, scales],
            domain=MICROSOFT,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=block,
            accuracy_level=4,
        )[0]

    # Nodes, values, initializers.

    def node(self, op: str, inputs: list[str], *, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node; the names of its outputs."""
        names = [f"v{len(self.nodes)}.{i}" for i in range(outputs)]
        return self.node_to(names, op, inputs, domain=domain, **attributes)

    def node_to(
        self, outputs: list[str], op: str, inputs: list[str], *, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node whose outputs have these names."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs

    def rename(self, value: str, name: str) -> None:
        """Give a node's output another name, wherever it is used: outputs of the graph cost no copy."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for i, one in enumerate(names):
                    if one == value:
                        names[i] = name

    def split(self, rows: str, widths: list[int]) -> list[str]:
        """Columns of the given widths."""
        if len(widths) == 1:
            return [rows]
        return self.node("Split", [rows, self.shape(widths)], outputs=len(widths), axis=-1)

    def reshape(self, value: str, shape: list[int]) -> str:
        """The value in another shape (0 and -1 as ONNX reads them)."""
        return self.node("Reshape", [value, self.shape(shape)])[0]

    def widen(self, value: str) -> str:
        """In the width of sums: float64 in exact classes."""
        return self.node("Cast", [value], to=TensorProto.DOUBLE)[0] if self.exact else value

    def narrow(self, value: str) -> str:
        """A sum in float32."""
        return self.node("Cast", [value], to=TensorProto.FLOAT)[0] if self.exact else value

    def shape(self, values: list[int]) -> str:
        """An int64 vector inside the graph."""
        name = f"shape{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def constant(self, value: float) -> str:
        """A float32 scalar inside the graph."""
        name = f"constant{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def ones(self, length: int) -> str:
        """A float32 vector of ones inside the graph."""
        name = f"ones{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT, [length], [1.0] * length))
        return name

    def weight(self, slot: str, shape: list[int]) -> str:
        """A float32 initializer: the whole of a slot of this share."""
        return self.external(slot, TensorProto.FLOAT, shape, self.offsets[slot])

    def external(self, name: str, dtype: int, shape: list[int], offset: int) -> str:
        """An initializer in the share's weights file."""
        length = 1 if dtype in (TensorProto.UINT8, TensorProto.INT8) else 4
        for size in shape:
            length *= size
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        return name

    def input(self, name: str, shape: list[Any], dtype: int = TensorProto.FLOAT) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: list[Any], dtype: int = TensorProto.FLOAT) -> str:
        """Declare an output."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def finish(self) -> bytes:
        """Serialize, deterministically."""
        graph = helper.make_graph(self.nodes, self.plan.kind, self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ganglion")
        data: bytes = model.SerializeToString(deterministic=True)
        return data
