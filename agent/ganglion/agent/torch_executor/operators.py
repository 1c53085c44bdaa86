"""The operators of our graphs, each as the torch calls that a program makes of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ganglion.agent.torch_executor.graph import Node
from ganglion.agent.torch_executor.mixture import emit_experts
from ganglion.agent.torch_executor.program import Compiler
from ganglion.wire.errors import Unsupported

_INTEGERS: Final = {6: torch.int32, 7: torch.int64}  # of Cast; other types are the program's own choice


def _norm(c: Compiler, node: Node) -> None:
    rows, scale = c.place(node.inputs[0]), c.kept(c.weight(node.inputs[1], torch.float32))
    epsilon, dtype, rms = node.attributes["epsilon"], c.dtype, node.op != "LayerNormalization"

    def call(rows: Tensor, scale: Tensor) -> Tensor:
        wide = rows.float()
        if rms:
            return F.rms_norm(wide, scale.shape, scale, epsilon).to(dtype)
        return F.layer_norm(wide, scale.shape, scale, None, epsilon).to(dtype)

    c.emit(call, [rows, scale], node.outputs[:1])


def _skip_norm(c: Compiler, node: Node) -> None:
    taken = [c.place(node.inputs[0]), c.place(node.inputs[1]), c.kept(c.weight(node.inputs[2], torch.float32))]
    epsilon, dtype = node.attributes["epsilon"], c.dtype

    def call(residual: Tensor, delta: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        summed = residual + delta
        return F.rms_norm(summed, scale.shape, scale, epsilon).to(dtype), summed

    c.emit(call, taken, [node.outputs[0], node.outputs[3] if len(node.outputs) > 3 else ""])


def _add(c: Compiler, node: Node) -> None:
    terms = c.sum_terms(node.outputs[0])
    biases = [found for found in map(c.folded, terms) if found is not None]
    terms = [term for term in terms if c.folded(term) is None]
    parts, others = c.products.together(terms)
    if parts:
        summed = c.multiplied(parts)
    else:
        summed, others = c.place(terms[0]), terms[1:]
    for term in others:
        summed = c.emit(operator.add, [summed, c.place(term)])
    if biases:
        bias = torch.stack(biases).sum(0).to(c.dtype).to(c.device)
        summed = c.emit(operator.add, [summed, c.kept(bias)])
    c.bind(node.outputs[0], summed)


def _product(c: Compiler, node: Node) -> None:
    place = c.product(node.outputs[0])
    c.bind(node.outputs[0], c.emit(_matmul, [c.place(one) for one in node.inputs]) if place is None else place)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return left @ right if left.dtype == right.dtype else left.float() @ right.float()


def _mul(c: Compiler, node: Node) -> None:
    place = c.product(node.outputs[0])
    if place is None:
        place = c.emit(operator.mul, [c.place(one) for one in node.inputs])
    c.bind(node.outputs[0], place)


def _reshape(c: Compiler, node: Node) -> None:
    if (place := c.product(node.outputs[0])) is not None:
        c.bind(node.outputs[0], place)
        return
    wanted = c.static(node.inputs[1])

    def call(value: Tensor) -> Tensor:
        return value.reshape([value.shape[at] if size == 0 else size for at, size in enumerate(wanted)])

    c.emit(call, [c.place(node.inputs[0])], node.outputs)


def _split(c: Compiler, node: Node) -> None:
    axis, count = node.attributes["axis"], len(node.outputs)
    sizes = c.static(node.inputs[1]) if len(node.inputs) > 1 else None

    def call(value: Tensor) -> tuple[Tensor, ...]:
        return value.tensor_split(count, axis) if sizes is None else torch.split_with_sizes(value, sizes, axis)

    taken = [c.place(node.inputs[0])]
    if count == 1:
        c.bind(node.outputs[0], taken[0])
    else:
        c.emit(call, taken, node.outputs)


def _concat(c: Compiler, node: Node) -> None:
    axis = node.attributes["axis"]

    def call(*values: Any) -> Any:
        if isinstance(values[0], list):  # sizes
            return [size for one in values for size in one]
        return torch.cat(values, axis)

    c.emit(call, [c.place(one) for one in node.inputs], node.outputs)


def _shape(c: Compiler, node: Node) -> None:
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    c.emit(lambda value: list(value.shape[start:end]), [c.place(node.inputs[0])], node.outputs)


def _expand(c: Compiler, node: Node) -> None:
    device = c.device

    def call(value: Any, shape: list[int]) -> Tensor:
        found = torch.as_tensor(value, device=device)
        sizes = [1] * (len(shape) - found.dim()) + list(found.shape)
        return found.expand([max(pair) for pair in zip(sizes, shape, strict=True)])

    c.emit(call, [c.place(one) for one in node.inputs], node.outputs)


def _fill(c: Compiler, node: Node) -> None:
    device = c.device
    c.emit(lambda shape: torch.zeros(shape, device=device), [c.place(node.inputs[0])], node.outputs)


def _cast(c: Compiler, node: Node) -> None:
    place, wanted = c.place(node.inputs[0]), _INTEGERS.get(node.attributes["to"])
    c.bind(node.outputs[0], place if wanted is None else c.emit(lambda value: value.to(wanted), [place]))


def _pad(c: Compiler, node: Node) -> None:
    pads = c.static(node.inputs[1])
    half = len(pads) // 2
    wanted = [one for at in reversed(range(half)) for one in (pads[at], pads[half + at])]
    c.emit(lambda value: F.pad(value, wanted), [c.place(node.inputs[0])], node.outputs)


def _slice(c: Compiler, node: Node) -> None:
    def call(value: Tensor, starts: list[int], ends: list[int], axes: list[int]) -> Tensor:
        for start, end, axis in zip(starts, ends, axes, strict=True):
            value = value.narrow(axis, start, min(end, value.shape[axis]) - start)
        return value

    c.emit(call, [c.place(one) for one in node.inputs[:4]], node.outputs)


def _reduce(c: Compiler, node: Node) -> None:
    axes, keep = c.static(node.inputs[1]), bool(node.attributes.get("keepdims", 1))

    def call(value: Tensor) -> Tensor:
        if node.op == "ReduceMax":
            return value.amax(axes, keepdim=keep)
        wide = value.float()
        return (wide.square() if node.op == "ReduceSumSquare" else wide).sum(axes, keepdim=keep)

    c.emit(call, [c.place(node.inputs[0])], node.outputs)


def _top(c: Compiler, node: Node) -> None:
    (count,), axis = c.static(node.inputs[1]), node.attributes["axis"]
    c.emit(lambda value: torch.topk(value, count, axis), [c.place(node.inputs[0])], node.outputs)


def _one_hot(c: Compiler, node: Node) -> None:
    (depth,) = c.static(node.inputs[1])
    off, on = (float(one) for one in c.products.value(node.inputs[2]).reshape(-1))
    dtype = c.dtype

    def call(index: Tensor) -> Tensor:
        return F.one_hot(index, depth).to(dtype) * (on - off) + off

    c.emit(call, [c.place(node.inputs[0])], node.outputs)


def _unsqueeze(c: Compiler, node: Node) -> None:
    (axis,) = c.static(node.inputs[1])
    c.emit(lambda value: value.unsqueeze(axis), [c.place(node.inputs[0])], node.outputs)


def _compress(c: Compiler, node: Node) -> None:
    c.emit(lambda value, chosen: value[chosen], [c.place(one) for one in node.inputs], node.outputs)


def _gather(c: Compiler, node: Node) -> None:
    c.emit(lambda value, index: value[index], [c.place(one) for one in node.inputs], node.outputs)


def _count_up(c: Compiler, node: Node) -> None:
    (axis,) = c.static(node.inputs[1])
    if not node.attributes.get("exclusive"):
        raise Unsupported("CumSum: the torch executor adds up what lies before")

    def call(value: Tensor) -> Tensor:
        wide = value.float()  # in 16 bits it would not count far
        return wide.cumsum(axis) - wide

    c.emit(call, [c.place(node.inputs[0])], node.outputs)


def _scatter(c: Compiler, node: Node) -> None:
    def call(rows: Tensor, at: Tensor, given: Tensor) -> Tensor:
        found = torch.empty(rows.shape, dtype=given.dtype, device=rows.device)
        found[at[:, 0]] = given  # of our graphs: every row once
        return found

    c.emit(call, [c.place(one) for one in node.inputs], node.outputs)


def _max(c: Compiler, node: Node) -> None:
    (floor,) = [float(c.products.value(one)) for one in node.inputs if one in c.graph.tensors]
    c.emit(lambda value: value.clamp(min=floor), [c.place(node.inputs[0])], node.outputs)


def _gelu(c: Compiler, node: Node) -> None:
    how = node.attributes.get("approximate", "none")
    c.emit(lambda value: F.gelu(value, approximate=how), [c.place(node.inputs[0])], node.outputs)


def _quick_gelu(c: Compiler, node: Node) -> None:
    alpha = node.attributes.get("alpha", 1.702)
    call = F.silu if alpha == 1.0 else lambda value: value * torch.sigmoid(alpha * value)
    c.emit(call, [c.place(node.inputs[0])], node.outputs)


def _softmax(c: Compiler, node: Node) -> None:
    axis = node.attributes["axis"]
    c.emit(lambda value: torch.softmax(value.float(), axis), [c.place(node.inputs[0])], node.outputs)


def _same(c: Compiler, node: Node) -> None:
    c.bind(node.outputs[0], c.place(node.inputs[0]))


def _simple(call: Callable[..., Any]) -> Callable[[Compiler, Node], None]:
    def emit(c: Compiler, node: Node) -> None:
        c.emit(call, [c.place(one) for one in node.inputs], node.outputs)

    return emit


EMITTERS: Final[dict[str, Callable[[Compiler, Node], None]]] = {
    "Abs": _simple(torch.abs),
    "Add": _add,
    "Cast": _cast,
    "Compress": _compress,
    "Concat": _concat,
    "ConstantOfShape": _fill,
    "CumSum": _count_up,
    "Div": _simple(operator.truediv),
    "Equal": _simple(torch.eq),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _product,
    "Identity": _same,
    "LayerNormalization": _norm,
    "MatMul": _product,
    "MatMulNBits": _product,
    "Max": _max,
    "MoE": emit_experts,
    "Mul": _mul,
    "NonZero": _simple(lambda value: value.nonzero().T),
    "OneHot": _one_hot,
    "Pad": _pad,
    "QMoE": emit_experts,
    "QuickGelu": _quick_gelu,
    "ReduceMax": _reduce,
    "ReduceSum": _reduce,
    "ReduceSumSquare": _reduce,
    "Reshape": _reshape,
    "ScatterND": _scatter,
    "Shape": _shape,
    "SimplifiedLayerNormalization": _norm,
    "SkipSimplifiedLayerNormalization": _skip_norm,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Sqrt": _simple(torch.sqrt),
    "Sub": _simple(operator.sub),
    "Tanh": _simple(torch.tanh),
    "TopK": _top,
    "Unsqueeze": _unsqueeze,
}
