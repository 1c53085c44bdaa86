"""Graphs under construction: nodes, inputs and outputs, and initializers, inside or in `weights.bin`.

A segment is one graph, or several that run one after the other: `seam` ends one and begins the next.
"""

from __future__ import annotations

from typing import Any, Final

import onnx
from onnx import TensorProto, helper

from ganglion.wire.nouns import WEIGHTS_FILE

OPSET: Final = 21
IR_VERSION: Final = 10
MICROSOFT: Final = "com.microsoft"
ITEM_BYTES: Final[dict[int, int]] = {TensorProto.FLOAT: 4, TensorProto.UINT8: 1, TensorProto.INT8: 1}


class Nodes:
    """The nodes and values of the graph that is being built, and the bytes of those before it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._finished: list[bytes] = []
        self._begin()

    def _begin(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

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

    def constants(self, values: list[float]) -> str:
        """A float32 vector inside the graph."""
        name = f"constants{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.FLOAT, [len(values)], values))
        return name

    def external(self, name: str, dtype: int, shape: list[int], offset: int) -> str:
        """An initializer in the share's weights file."""
        length = ITEM_BYTES[dtype]
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

    def seam(self, value: str, name: str, width: int) -> str:
        """End this graph with rows `value`, called `name`, and begin the next with them: [S, width] float32."""
        self.rename(value, name)
        self.output(name, ["S", width])
        self.end()
        self.name = name  # graphs without weights are equal, whatever the formats of their segments
        return self.input(name, ["S", width])

    def end(self) -> None:
        """End this graph, and begin the next."""
        self._finished.append(self._serialized())
        self._begin()

    def finish(self) -> tuple[bytes, ...]:
        """The graphs in the order in which they run, serialized deterministically."""
        return (*self._finished, self._serialized())

    def _serialized(self) -> bytes:
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ganglion")
        data: bytes = model.SerializeToString(deterministic=True)
        return data
