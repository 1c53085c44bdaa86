"""Makes the graphs of the probe: `python -m ganglion.agent.probe.make_graphs [--check]`. Needs the onnx package.

One product a graph, its weights supplied at run time, so that a file is a few hundred bytes and devices need no onnx.
"""

from __future__ import annotations

import sys
from pathlib import Path

from onnx import TensorProto, helper

from ganglion.agent.probe.shapes import GRAPHS, SHAPES, Shape

_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}


def make_graph(shape: Shape) -> bytes:
    """`rows [S, inputs] float32 -> product [S, outputs]` with external initializers named as in `shape.weights`."""
    initializers = []
    for name, (kind, dims) in shape.weights.items():
        tensor = TensorProto(name=name, data_type=_TYPES[kind], dims=dims, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=name)
        initializers.append(tensor)
    if shape.block:
        node = helper.make_node(
            "MatMulNBits",
            ["rows", *shape.weights],
            ["product"],
            domain="com.microsoft",
            K=shape.inputs,
            N=shape.outputs,
            bits=4,
            block_size=shape.block,
            accuracy_level=4,
        )
    else:
        node = helper.make_node("MatMul", ["rows", *shape.weights], ["product"])
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["S", shape.inputs])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["S", shape.outputs])],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="ganglion")
    return model.SerializeToString(deterministic=True)


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
