"""E2: a graph whose weights lie anywhere but in weights.bin is refused before ONNX Runtime sees it."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ganglion.agent.executor.graph_file import check_graph
from ganglion.wire.errors import Corrupt


def graph() -> onnx.ModelProto:
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", "64"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    inside = helper.make_tensor("shape", TensorProto.INT64, [2], [1, 4])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Reshape", ["m", "shape"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight, inside]))


def entry(model: onnx.ModelProto, key: str):
    return next(one for one in model.graph.initializer[0].external_data if one.key == key)


def set_entry(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    return lambda model: setattr(entry(model, key), "value", value)


def external(tensor: TensorProto) -> TensorProto:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def add_attribute(**attributes: object) -> Callable[[onnx.ModelProto], None]:
    return lambda model: model.graph.node.append(helper.make_node("Constant", [], ["c"], **attributes))


DAMAGE = {
    "absolute": set_entry("location", "/etc/passwd"),
    "parent": set_entry("location", "../weights.bin"),
    "other": set_entry("location", "weights.bin.old"),
    "folder": set_entry("location", "./weights.bin"),
    "empty": set_entry("location", ""),
    "beyond": set_entry("offset", "65"),
    "far-beyond": set_entry("length", "9" * 18),
    "negative": set_entry("offset", "-64"),
    "hexadecimal": set_entry("length", "0x40"),
    "no-length": lambda model: model.graph.initializer[0].external_data.remove(entry(model, "length")),
    "twice": lambda model: model.graph.initializer[0].external_data.add(key="location", value="weights.bin"),
    "unknown-key": lambda model: model.graph.initializer[0].external_data.add(key="checksum", value="0"),
    "not-marked": lambda model: setattr(model.graph.initializer[0], "data_location", TensorProto.DEFAULT),
    "attribute": add_attribute(value=external(TensorProto(data_type=1, dims=[1]))),
    "subgraph": add_attribute(body=helper.make_graph([], "inner", [], [])),
    "function": lambda model: model.functions.add(name="f"),
    "training": lambda model: model.training_info.add(),
    "sparse": lambda model: model.graph.sparse_initializer.add(),
    "no-graph": lambda model: model.ClearField("graph"),
}


def test_a_plain_graph_passes():
    check_graph(graph().SerializeToString(), 128)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(damage):
    model = graph()
    DAMAGE[damage](model)
    with pytest.raises(Corrupt):
        check_graph(model.SerializeToString(), 128)


@given(st.data())
def test_truncated_and_changed_files_never_escape_the_error_tree(data):
    whole = graph().SerializeToString()
    cut = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if cut:
            cut[data.draw(st.integers(0, len(cut) - 1))] = data.draw(st.integers(0, 255))
    try:
        check_graph(bytes(cut), 128)
    except Corrupt:
        return
