"""A graph as a list of torch calls over numbered values, made once; weights are on the device in the compute dtype.

Residual, delta and partial sums are float32, as are norms inside; everything else is in the compute dtype. Nothing
waits for the device, so that a step's segments follow each other there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ganglion.agent.torch_executor.graph import Graph
from ganglion.agent.torch_executor.products import Product, Products
from ganglion.wire.errors import Unsupported

_Call = Callable[..., Any]
_LEFT_WIDE = ("res_out", "partial", "logits", "weights", "given")  # outputs in float32
_LEFT_AS_THEY_ARE = ("chosen",)  # the others are in the compute dtype


def _as(dtype: torch.dtype) -> _Call:
    def call(value: Tensor) -> Tensor:
        return value.to(dtype)

    return call


class Program:
    """What runs: values by number, the first ones given, then calls that fill the others."""

    def __init__(
        self, inputs: Mapping[str, int], outputs: Mapping[str, int], values: list[Any], calls: list[tuple[Any, ...]]
    ) -> None:
        self._inputs, self._outputs = dict(inputs), dict(outputs)
        self._values, self._calls = values, calls

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weights that it holds."""
        return sum(one.numel() * one.element_size() for one in self._values if isinstance(one, Tensor))

    def run(self, **given: Tensor) -> dict[str, Tensor]:
        """The graph's outputs by name."""
        values = self._values.copy()
        for name, place in self._inputs.items():
            values[place] = given[name]
        for call, taken, made in self._calls:
            found = call(*[values[place] for place in taken])
            if len(made) == 1:
                values[made[0]] = found
            else:
                for place, one in zip(made, found, strict=False):
                    values[place] = one
        return {name: values[place] for name, place in self._outputs.items()}


class Compiler:
    """Makes the program of one graph. `weights`: the share's `weights.bin`."""

    def __init__(self, graph: Graph, weights: memoryview, device: torch.device, dtype: torch.dtype) -> None:
        self.graph, self.device, self.dtype = graph, device, dtype
        self.products = Products(graph, weights)
        self._values: list[Any] = []
        self._calls: list[tuple[Any, ...]] = []
        self._places: dict[str, int] = {}

    def compile(self) -> Program:
        """The program; raises Unsupported naming an operator that is not known."""
        from ganglion.agent.torch_executor.operators import EMITTERS

        self._emitters = EMITTERS
        inputs = {name: self._new(name) for name in self.graph.inputs}
        outputs = {name: self.place(name) for name in self.graph.outputs}
        for name, place in outputs.items():
            if name not in _LEFT_AS_THEY_ARE:
                outputs[name] = self.emit(_as(torch.float32 if name in _LEFT_WIDE else self.dtype), [place])
        return Program(inputs, outputs, self._values, self._calls)

    # Values.

    def _new(self, name: str = "", value: Any = None) -> int:
        self._values.append(value)
        if name:
            self._places[name] = len(self._values) - 1
        return len(self._values) - 1

    def place(self, name: str) -> int:
        """The number of a value, whose node is emitted if it was not yet; constant scalars and sizes are Python's."""
        found = self._places.get(name)
        if found is not None:
            return found
        if name in self.graph.tensors:
            array = self.products.value(name)
            if array.dtype.kind == "i" and array.ndim == 1:  # sizes, indices
                return self._new(name, array.tolist())
            return self._new(name, array.item() if array.ndim == 0 else self.weight(name))
        node = self.graph.makers.get(name)
        if node is None:
            raise Unsupported(f"graph: nothing makes {name[:64]!r}")
        emitter = self._emitters.get(node.op)
        if emitter is None:
            raise Unsupported(f"the torch executor does not know the operator {node.op}; run this model with ort")
        emitter(self, node)
        return self._places[name]

    def static(self, name: str) -> list[int]:
        """The numbers of a small constant, flat."""
        if name not in self.graph.tensors:
            raise Unsupported(f"graph: {name[:64]!r} is no constant")
        return [int(one) for one in self.products.value(name).reshape(-1)]

    def weight(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """An initializer on the device; numbers with a point in the compute dtype, or `dtype`."""
        array = self.products.value(name)
        found = torch.from_numpy(np.ascontiguousarray(array).copy())
        if found.is_floating_point():
            found = found.to(dtype or self.dtype)
        return found.to(self.device)

    def kept(self, value: Any) -> int:
        """A constant made while compiling."""
        return self._new("", value)

    # Calls.

    def emit(self, call: _Call, taken: Sequence[int], names: Sequence[str] = ("",)) -> int:
        """Call with these values; what it returns gets the names; the number of the first."""
        made = [self._new(name) for name in names]
        self._calls.append((call, tuple(taken), tuple(made)))
        return made[0]

    def bind(self, name: str, place: int) -> None:
        """Another name of a value."""
        self._places[name] = place

    def product(self, name: str) -> int | None:
        """Emit the product with a weight that makes `name`; None when something else does."""
        found = self.products.find(name)
        return None if found is None else self.multiplied([self.products.alone(found)])

    def multiplied(self, parts: Sequence[Product]) -> int:
        """Emit a product, or the one that parts add up to."""
        matrix = self.products.matrix(parts).to(self.dtype).to(self.device).contiguous()
        dtype = self.dtype

        def call(rows: Tensor, matrix: Tensor) -> Tensor:
            return F.linear(rows.to(dtype), matrix)

        return self.emit(call, [self.place(parts[0].source), self.kept(matrix)])

    def sum_terms(self, name: str) -> list[str]:
        """What the chain of additions that makes `name` adds up, in order; casts are passed."""
        terms: list[str] = []
        waiting = [name]
        while waiting:
            one = waiting.pop()
            node = self.graph.makers.get(one)
            inner = one == name or (self.graph.uses.get(one, 0) == 1 and one not in self.graph.outputs)
            if node is not None and node.op == "Add" and inner:
                waiting += reversed(node.inputs)
            elif node is not None and node.op == "Cast" and inner:
                waiting.append(node.inputs[0])
            else:
                terms.append(one)
        return terms

    def folded(self, name: str) -> Tensor | None:
        """A vector that is known while compiling: a bias, or the sum of the groups' biases."""
        node = self.graph.makers.get(name)
        if name in self.graph.tensors:
            value = torch.from_numpy(self.products.value(name).copy()).float()
            return value if value.dim() == 1 else None
        if node is not None and node.op == "Cast":
            return self.folded(node.inputs[0])
        if node is not None and node.op == "ReduceSum":
            inner = self.graph.makers.get(node.inputs[0])
            source = inner.inputs[0] if inner is not None and inner.op == "Cast" else node.inputs[0]
            if source in self.graph.tensors and self.static(node.inputs[1]) == [0]:
                return torch.from_numpy(self.products.value(source).copy()).double().sum(0).float()
        return None
