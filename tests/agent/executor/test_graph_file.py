"""E2: a graph whose weights lie anywhere but in weights.bin is refused before ONNX Runtime sees it."""

# ruff: noqa: N802 - the ids of faults in names of tests are upper case

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ganglion.agent.executor.graph_file import check_file, check_graph
from ganglion.wire.errors import Corrupt

AGENT = Path(__file__).resolve().parents[3] / "agent" / "ganglion" / "agent"
WEIGHTS_BYTES = 128


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
    "nested": set_entry("location", "sub/../../weights.bin"),
    "below": set_entry("location", "sub/weights.bin"),
    "backslash": set_entry("location", "..\\weights.bin"),
    "nul": set_entry("location", "weights.bin\0/etc/passwd"),
    "slash": set_entry("location", "weights.bin/"),
    "upper-case": set_entry("location", "Weights.bin"),
    "url": set_entry("location", "file:///etc/passwd"),
    "device": set_entry("location", "/dev/zero"),
    "raw-address": set_entry("location", "*/_ORT_MEM_ADDR_/*"),
    "not-ascii": set_entry("location", "weights\u2024bin"),
    "empty": set_entry("location", ""),
    "beyond": set_entry("offset", "65"),
    "far-beyond": set_entry("length", "9" * 18),
    "negative": set_entry("offset", "-64"),
    "2^63": set_entry("offset", str(2**63)),
    "wraps-to-0": set_entry("offset", str(2**64)),
    "other-digits": set_entry("length", "\u0661"),
    "spaces": set_entry("length", " 64"),
    "exponent": set_entry("length", "1e1"),
    "no-digits": set_entry("length", ""),
    "hexadecimal": set_entry("length", "0x40"),
    "no-length": lambda model: model.graph.initializer[0].external_data.remove(entry(model, "length")),
    "twice": lambda model: model.graph.initializer[0].external_data.add(key="location", value="weights.bin"),
    "no-offset": lambda model: model.graph.initializer[0].external_data.remove(entry(model, "offset")),
    "no-entries": lambda model: model.graph.initializer[0].ClearField("external_data"),
    "base-path": lambda model: model.graph.initializer[0].external_data.add(key="basepath", value="/etc"),
    "unknown-key": lambda model: model.graph.initializer[0].external_data.add(key="checksum", value="0"),
    "not-marked": lambda model: setattr(model.graph.initializer[0], "data_location", TensorProto.DEFAULT),
    "attribute": add_attribute(value=external(TensorProto(data_type=1, dims=[1]))),
    "attribute-list": add_attribute(values=[external(TensorProto(data_type=1, dims=[1]))]),
    "sparse-attribute": add_attribute(sparse_value=onnx.SparseTensorProto()),
    "subgraphs": add_attribute(bodies=[helper.make_graph([], "inner", [], [])]),
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


def varint(value: int, pad: int = 0) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(pad):  # the same number in more bytes than it takes
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def field(number: int, body: bytes, *, tag_bits: int = 0, pad: int = 0) -> bytes:
    return varint((number << 3 | 2) + tag_bits, pad) + varint(len(body)) + body


STRANGER = field(13, field(1, b"location") + field(2, b"/etc/passwd")) + b"\x70\x01"  # data_location: EXTERNAL
WIRE = {
    "a tag of 33 bits that 32 bits read as an initializer": lambda whole: field(
        7, graph().graph.SerializeToString() + field(5, STRANGER, tag_bits=1 << 32)
    ),
    "a tag of 33 bits around the tensor": lambda whole: field(7, field(5, STRANGER), tag_bits=1 << 32) + whole,
    "an overlong tag": lambda whole: field(7, field(5, STRANGER, pad=3)),
    "field 0": lambda whole: whole + field(0, b""),
    "a second graph": lambda whole: whole + field(7, field(5, STRANGER)),
    "a group": lambda whole: whole + b"\x3b" + field(5, STRANGER) + b"\x3c",
    "a number where the graph should be": lambda whole: whole + b"\x38\x01",
    "an endless number": lambda whole: whole + b"\x80" * 11,
    "a length beyond the end": lambda whole: whole + varint(7 << 3 | 2) + varint(1 << 40),
    "a length of 64 bits": lambda whole: whole + varint(7 << 3 | 2) + varint(2**64 - 1),
}


@pytest.mark.parametrize("damage", WIRE)
def test_E2_tricks_of_the_wire_format_are_refused(damage):
    with pytest.raises(Corrupt):
        check_graph(WIRE[damage](graph().SerializeToString()), WEIGHTS_BYTES)


def test_E2_a_tensor_marked_external_twice_is_judged_by_what_a_parser_keeps():
    model = graph()
    merged = model.SerializeToString() + field(7, b"")
    with pytest.raises(Corrupt, match="2 graphs"):
        check_graph(merged, WEIGHTS_BYTES)
    tensor = model.graph.initializer[0].SerializeToString()
    for last in (b"\x70\x00", b"\x70\x81\x80\x80\x80\x10"):  # not external, and 1 in the low 32 bits
        whole = field(7, field(5, tensor + last))
        with pytest.raises(Corrupt, match="not marked external"):
            check_graph(whole, WEIGHTS_BYTES)


def messages(message: Message) -> Iterator[Message]:
    """A message and every message inside it."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for inner in [value] if isinstance(value, Message) else value:
                yield from messages(inner)


def is_safe(model: onnx.ModelProto) -> bool:
    """What `check_graph` promises, said over the parsed file."""
    for message in messages(model):
        if isinstance(message, onnx.FunctionProto | onnx.TrainingInfoProto | onnx.SparseTensorProto):
            return False
        if isinstance(message, onnx.AttributeProto) and (message.HasField("g") or len(message.graphs)):
            return False
        if isinstance(message, onnx.TensorProto):
            entries = {one.key: one.value for one in message.external_data}
            if message.data_location != TensorProto.EXTERNAL:
                if entries:
                    return False
                continue
            if set(entries) != {"location", "offset", "length"} or entries["location"] != "weights.bin":
                return False
            if not 0 <= int(entries["offset"]) <= int(entries["offset"]) + int(entries["length"]) <= WEIGHTS_BYTES:
                return False
    return True


def snippets() -> st.SearchStrategy[bytes]:
    """Fields of every number that matters, with bodies that could do harm, in plain and strange encodings."""
    bodies = st.sampled_from([b"", STRANGER, field(5, STRANGER), field(1, field(5, field(5, STRANGER))), b"\x08\x01"])
    numbers = st.sampled_from([0, 1, 2, 5, 6, 7, 10, 11, 13, 14, 15, 20, 22, 23, 25, 26, 1 << 28])
    return st.builds(
        lambda number, body, bits, pad: field(number, body, tag_bits=bits, pad=pad),
        numbers, bodies, st.sampled_from([0, 0, 0, 1 << 32, 1 << 35]), st.integers(0, 2),
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_E2_what_passes_is_safe_as_a_parser_reads_it(data: Any) -> None:
    changed = bytearray(graph().SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(changed)))
        if data.draw(st.booleans()):
            changed[at:at] = data.draw(snippets())
        elif changed:
            changed[min(at, len(changed) - 1)] = data.draw(st.integers(0, 255))
    del changed[data.draw(st.integers(len(changed) // 2, len(changed))) :]
    try:
        check_graph(bytes(changed), WEIGHTS_BYTES)
    except Corrupt:
        return
    model = onnx.ModelProto()
    try:
        model.ParseFromString(bytes(changed))
    except DecodeError:
        return  # ONNX Runtime does not read it either
    assert is_safe(model)


def test_the_judge_of_the_fuzz_test_knows_damage() -> None:
    assert is_safe(graph())
    for name in ("absolute", "attribute", "subgraph", "function", "sparse", "unknown-key", "beyond", "not-marked"):
        model = graph()
        DAMAGE[name](model)
        assert not is_safe(model), name


def test_E2_only_a_plain_file_of_one_name_is_given_to_the_runtime(tmp_path: Path) -> None:
    plain = tmp_path / "weights.bin"
    plain.write_bytes(bytes(10))
    check_file(plain, 10)
    with pytest.raises(Corrupt, match="10 bytes, expected 11"):
        check_file(plain, 11)
    (tmp_path / "link").symlink_to(plain)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "link", tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "absent"):
        with pytest.raises(Corrupt, match="not a plain file"):
            check_file(other, 10)
    (tmp_path / "second").hardlink_to(plain)
    with pytest.raises(Corrupt, match="2 names"):
        check_file(plain, 10)


def test_E2_no_graph_reaches_the_runtime_unscanned() -> None:
    """Sessions are made in two places: of graphs that the package brings (probe), and of what `_open` had scanned.

    `_open` hands its maker of sessions on with the function that scans; a prepacked part is this agent's own work.
    """
    makers, users = [], []
    for path in AGENT.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                named = {each.id for each in ast.walk(function) if isinstance(each, ast.Name)}
                called = {
                    each.func.attr if isinstance(each.func, ast.Attribute) else getattr(each.func, "id", "")
                    for each in ast.walk(function)
                    if isinstance(each, ast.Call)
                }
                name = f"{path.relative_to(AGENT)}:{function.name}"
                if "InferenceSession" in called:
                    makers.append(name)
                if "_session" in named and path.name == "loader.py":
                    users.append((name, "check_graph" in called))
    assert sorted(makers) == ["executor/loader.py:_session", "probe/measure.py:__init__"]
    assert users == [("executor/loader.py:_open", True)]
