"""Makes the graphs of the probe: `python -m ganglion.agent.probe.make_graphs [--check]`. Needs the onnx package.

One format's product a graph, its weights supplied at run time: a file is a few hundred bytes, devices need no onnx.
"""

from __future__ import annotations

import sys
from pathlib import Path

from onnx import NodeProto, TensorProto, helper

from ganglion.agent.probe.shapes import GRAPHS, SHAPES, Shape

_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8}
MICROSOFT = "com.microsoft"


def make_graph(shape: Shape) -> bytes:
    """`rows [S, inputs] float32 -> product [S, outputs]` with external initializers named as in `shape.weights`."""
    initializers = []
    for name, (kind, dims) in shape.weights.items():
        tensor = TensorProto(name=name, data_type=_TYPES[kind], dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=name)
        initializers.append(tensor)
    if shape.block:
        nodes = [
            helper.make_node(
                "MatMulNBits",
                ["rows", *shape.weights],
                ["product"],
                domain=MICROSOFT,
                K=shape.inputs,
                N=shape.outputs,
                bits=shape.bits,
                block_size=shape.block,
                accuracy_level=4,
            )
        ]
    elif shape.bits:
        nodes, constants = _rounded_rows()
        initializers += constants
    else:
        nodes = [helper.make_node("MatMul", ["rows", *shape.weights], ["product"])]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["S", shape.inputs])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["S", shape.outputs])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="ganglion")
    return model.SerializeToString(deterministic=True)


def _rounded_rows() -> tuple[list[NodeProto], list[TensorProto]]:
    """The product of integers as the partitioner builds it: rows rounded to 8 bits with a scale of each row's own."""
    nodes = [
        helper.make_node("Abs", ["rows"], ["magnitudes"]),
        helper.make_node("ReduceMax", ["magnitudes", "last"], ["highest"], keepdims=1),
        helper.make_node("Max", ["highest", "tiny"], ["largest"]),
        helper.make_node("Div", ["levels", "largest"], ["factor"]),
        helper.make_node("Mul", ["rows", "factor"], ["raised"]),
        helper.make_node("QuantizeLinear", ["raised", "one", "zero"], ["integers"]),
        helper.make_node(
            "MatMulIntegerToFloat", ["integers", "weights", "one", "scales", "zero"], ["sums"], domain=MICROSOFT
        ),
        helper.make_node("Div", ["largest", "levels"], ["step"]),
        helper.make_node("Mul", ["sums", "step"], ["product"]),
    ]
    constants = [
        helper.make_tensor("last", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("tiny", TensorProto.FLOAT, [], [1e-8]),
        helper.make_tensor("levels", TensorProto.FLOAT, [], [127.0]),
        helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("zero", TensorProto.UINT8, [], [128]),
    ]
    return nodes, constants


def main(arguments: list[str]) -> int:
    """Write the graphs, or with --check say which are not what this script makes."""
    stale = []
    for shape in SHAPES:
        path, content = GRAPHS / shape.file, make_graph(shape)
        if not path.exists() or path.read_bytes() != content:
            stale.append(path)
            if "--check" not in arguments:
                path.write_bytes(content)
    for path in stale:
        print(f"{'stale' if '--check' in arguments else 'wrote'}: {Path(path).name}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
