"""ONNX graphs of segments: pure functions of geometry, numeric class and count of groups. Weights lie outside.

Built fused, so the optimizer has nothing to add (`SkipSimplifiedLayerNormalization`, `GroupQueryAttention`,
`MatMulNBits`). Inputs and outputs are those of `Manifest`'s docstring.

Bit-equality of the exact classes, measured on ONNX Runtime 1.31.1 (tests/partitioner/test_exact.py holds it): a product
whose outputs are joined equals the groups' own products, for fp32 at any width, for MatMulNBits at widths that are
multiples of 4; both give a row the same bits alone and in any batch. Only sums over inputs depend on the split, so
there each group is its own product, and products are added in float64. GroupQueryAttention works through the rows in
blocks of an even size (twice the head dimension, less where the second-level cache is small); a row that is alone in
its block gets other bits, so exact graphs give attention an even number of rows.
"""

from __future__ import annotations

from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from ganglion.partitioner.families.base import Linear, Model, SegmentPlan
from ganglion.wire.nouns import WEIGHTS_FILE, NumericClass, Range, Segment
from ganglion.wire.shares import slot_offsets

OPSET: Final = 21
IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"


def build_graph(plan: SegmentPlan, segment: Segment, count: int, model: Model, numeric_class: NumericClass) -> bytes:
    """The graph of a share of `count` groups, as ONNX bytes; equal arguments give equal bytes."""
    builder = _Builder(plan, segment, count, model, numeric_class)
    if plan.kind == "head":
        builder.head()
    elif plan.kind == "mlp":
        builder.mlp()
    else:
        builder.attention()
    return builder.finish()


class _Builder:
    def __init__(
        self, plan: SegmentPlan, segment: Segment, count: int, model: Model, numeric_class: NumericClass
    ) -> None:
        self.plan, self.count, self.model, self.numeric_class = plan, count, model, numeric_class
        self.offsets = slot_offsets(segment, Range(0, count))
        self.sizes = {slot.name: slot.pieces[0].size for slot in segment.slots}
        self.quantized = numeric_class.format == "int4"
        self.wide = TensorProto.DOUBLE if numeric_class.exact else TensorProto.FLOAT
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs = [
            self._value("res", ["S", model.hidden]),
            self._value("delta", ["S", model.hidden], self.wide),
        ]
        self.outputs: list[onnx.ValueInfoProto] = []

    # Segments.

    def head(self) -> None:
        """Final norm and the share's rows of the output matrix."""
        normed = self._norm(residual=False)
        width = self.count * self.plan.joined[0].width
        self._rename(self._joined(normed), "logits")
        self.outputs.append(self._value("logits", ["S", width]))

    def mlp(self) -> None:
        """down(silu(gate x) * up x)."""
        normed = self._norm(residual=True)
        gate, up = self._node("Split", [self._joined(normed)], outputs=2, axis=-1, num_outputs=2)
        # x * sigmoid(x) in one pass
        activated = self._node("QuickGelu", [gate], domain=MICROSOFT, alpha=1.0)[0]
        self._summed(self._node("Mul", [activated, up])[0])

    def attention(self) -> None:
        """Rotary attention over the key-value cache of the share's heads."""
        model = self.model
        heads = self.count * model.heads // model.kv_heads
        widths = [heads * model.head_dim, self.count * model.head_dim, self.count * model.head_dim]
        cache = [1, self.count, "capacity", model.head_dim]
        self.inputs += [
            self._value("past_key", cache),
            self._value("past_value", cache),
            self._value("seqlens_k", [1], TensorProto.INT32),
            self._value("total", [1], TensorProto.INT32),
            self._value("cos", ["positions", model.head_dim // 2]),
            self._value("sin", ["positions", model.head_dim // 2]),
        ]
        projected, total, seqlens = self._joined(self._norm(residual=True)), "total", "seqlens_k"
        rows = ""
        if self.numeric_class.exact:
            projected, total, seqlens, rows = self._even(projected)
        if model.query_key_norm:
            query, key, value = self._node("Split", [projected, self._shape(widths)], outputs=3, axis=-1)
            query = self._head_norm(query, "q_norm", heads)
            key = self._head_norm(key, "k_norm", self.count)
            operands = [query, key, self._reshape(value, [1, -1, widths[2]])]
        else:
            operands = [self._reshape(projected, [1, -1, sum(widths)]), "", ""]
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*operands, "past_key", "past_value", seqlens, total, "cos", "sin"],
                ["attended", "present_key", "present_value"],
                domain=MICROSOFT,
                num_heads=heads,
                kv_num_heads=self.count,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        attended = self._reshape("attended", [-1, widths[0]])
        if rows:
            zero = self._shape([0])
            attended = self._node("Slice", [attended, zero, rows, zero])[0]
        self._summed(attended)
        self.outputs += [self._value("present_key", cache), self._value("present_value", cache)]

    # Parts of segments.

    def _norm(self, *, residual: bool) -> str:
        delta = "delta"
        if self.numeric_class.exact:
            delta = self._node("Cast", ["delta"], to=TensorProto.FLOAT)[0]
        scale = self._weight("norm", TensorProto.FLOAT, [self.model.hidden])
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                ["res", delta, scale],
                ["normed", "", "", "res_out"] if residual else ["normed"],
                domain=MICROSOFT,
                epsilon=self.model.epsilon,
            )
        )
        if residual:
            self.outputs.append(self._value("res_out", ["S", self.model.hidden]))
        return "normed"

    def _even(self, projected: str) -> tuple[str, str, str, str]:
        """Pad an odd number of rows with a zero row: (padded rows, its total and seqlens_k, the number before).

        The row's key and value go one position beyond the others, where the session's next row overwrites them.
        """
        rows = self._node("Shape", [projected], start=0, end=1)[0]
        odd = self._node("Mod", [rows, self._shape([2])])[0]
        pads = self._node("Concat", [self._shape([0, 0]), odd, self._shape([0])], axis=0)[0]
        padded = self._node("Pad", [projected, pads])[0]
        added = self._node("Cast", [odd], to=TensorProto.INT32)[0]
        return padded, self._node("Add", ["total", added])[0], self._node("Add", ["seqlens_k", added])[0], rows

    def _head_norm(self, rows: str, slot: str, heads: int) -> str:
        dim = self.model.head_dim
        scale = self._weight(slot, TensorProto.FLOAT, [dim])
        by_head = self._reshape(rows, [-1, heads, dim])
        normed = self._node("SimplifiedLayerNormalization", [by_head, scale], axis=-1, epsilon=self.model.epsilon)[0]
        return self._reshape(normed, [1, -1, heads * dim])

    def _joined(self, rows: str) -> str:
        """One product with every matrix that is cut by outputs: [S, sum of widths]."""
        matrices = self.plan.joined
        width = self.count * sum(matrix.width for matrix in matrices)
        first, inputs = matrices[0].slot, matrices[0].inputs
        if self.quantized:
            offsets = (self.offsets[first], self.offsets[f"{first}_scales"])
            product = self._product_int4(rows, first, offsets, outputs=width, inputs=inputs)
        else:
            weight = self._external(first, TensorProto.FLOAT, [width, inputs], self.offsets[first])
            product = self._node("Gemm", [rows, weight], transB=1)[0]
        if matrices[0].bias:
            bias = self._external("joined_bias", TensorProto.FLOAT, [width], self.offsets[f"{first}_bias"])
            product = self._node("Add", [product, bias])[0]
        return product

    def _summed(self, rows: str) -> None:
        """The product that leaves the partial sum: per group and added in float64, or one for the share."""
        matrix = self.plan.summed
        if matrix is None:
            raise ValueError(f"segment {self.plan.kind} has no summed matrix")
        if self.numeric_class.exact:
            parts = [rows]
            if self.count > 1:
                parts = self._node("Split", [rows], outputs=self.count, axis=-1, num_outputs=self.count)
            products = [self._summed_product(part, matrix, group, 1) for group, part in enumerate(parts)]
            terms = [self._node("Cast", [product], to=TensorProto.DOUBLE)[0] for product in products]
        else:
            terms = [self._summed_product(rows, matrix, 0, self.count)]
        if matrix.bias:
            terms.append(self._summed_bias(matrix))
        partial = self._node("Sum", terms)[0] if len(terms) > 1 else terms[0]
        self._rename(partial, "partial")
        self.outputs.insert(1, self._value("partial", ["S", matrix.outputs], self.wide))

    def _summed_product(self, rows: str, matrix: Linear, group: int, groups: int) -> str:
        """The product of `groups` groups from `group` on with their columns of the matrix."""
        inputs = groups * matrix.width
        name = f"{matrix.slot}.{group}"
        offset = self.offsets[matrix.slot] + group * self.sizes[matrix.slot]
        if not self.quantized:
            weight = self._external(name, TensorProto.FLOAT, [inputs, matrix.outputs], offset)
            return self._node("MatMul", [rows, weight])[0]
        scales = f"{matrix.slot}_scales"
        offsets = (offset, self.offsets[scales] + group * self.sizes[scales])
        return self._product_int4(rows, name, offsets, outputs=matrix.outputs, inputs=inputs)

    def _summed_bias(self, matrix: Linear) -> str:
        """The share's biases (only group 0 has one that is not zero), in the width of the sum: [outputs]."""
        offset = self.offsets[f"{matrix.slot}_bias"]
        biases = self._external("summed_bias", TensorProto.FLOAT, [self.count, matrix.outputs], offset)
        cast = self._node("Cast", [biases], to=self.wide)[0]
        return self._node("ReduceSum", [cast, self._shape([0])], keepdims=0)[0]

    def _product_int4(self, rows: str, name: str, offsets: tuple[int, int], *, outputs: int, inputs: int) -> str:
        """The product with an int4 matrix whose values and scales lie at `offsets`."""
        block = self.numeric_class.block
        blocks = -(-inputs // block)
        weight = self._external(name, TensorProto.UINT8, [outputs, blocks, block // 2], offsets[0])
        scales = self._external(f"{name}_scales", TensorProto.FLOAT, [outputs, blocks], offsets[1])
        return self._node(
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

    def _node(self, op: str, inputs: list[str], *, outputs: int = 1, domain: str = "", **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
        return names

    def _reshape(self, value: str, shape: list[int]) -> str:
        return self._node("Reshape", [value, self._shape(shape)])[0]

    def _rename(self, value: str, name: str) -> None:
        """Give the output `value` of the last node that made it the name `name`."""
        for node in self.nodes:
            for i, output in enumerate(node.output):
                if output == value:
                    node.output[i] = name

    def _shape(self, values: list[int]) -> str:
        name = f"shape{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def _weight(self, slot: str, dtype: int, shape: list[int]) -> str:
        return self._external(slot, dtype, shape, self.offsets[slot])

    def _external(self, name: str, dtype: int, shape: list[int], offset: int) -> str:
        length = 1 if dtype == TensorProto.UINT8 else 4
        for size in shape:
            length *= size
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", WEIGHTS_FILE), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        return name

    @staticmethod
    def _value(name: str, shape: list[Any], dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, shape)

    def finish(self) -> bytes:
        """Serialize, deterministically."""
        graph = helper.make_graph(self.nodes, self.plan.kind, self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ganglion")
        data: bytes = model.SerializeToString(deterministic=True)
        return data
