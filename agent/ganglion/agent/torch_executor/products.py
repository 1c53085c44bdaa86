"""Finds the products of a graph: which rows are multiplied with which matrix, whatever its format.

A sum of products of neighboring columns (what exact classes and int8 make of a matrix cut along its inputs) is one
product with the matrices side by side. Rounded rows are followed back to the rows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ganglion.agent.torch_executor import weights as dequantized
from ganglion.agent.torch_executor.graph import Graph, Node
from ganglion.wire.errors import Corrupt, Unsupported

_PASSING: Final = ("Cast", "Identity")


@dataclass(frozen=True, slots=True)
class Product:
    """Rows `source` (columns `part` of `parts` equal ones) times the matrix of `node`.

    rounded: the columns are those of rounded rows, which have no value of their own here.
    """

    source: str
    node: Node
    part: int = 0
    parts: int = 1
    rounded: bool = False


class Products:
    """The products of one graph with the weights of one share."""

    def __init__(self, graph: Graph, weights: memoryview) -> None:
        self.graph = graph
        self._weights = weights

    def value(self, name: str) -> NDArray[Any]:
        """The numbers of an initializer."""
        return self.graph.tensors[name].read(self._weights)

    def find(self, name: str) -> Product | None:
        """The product that makes `name`, or None when something else does."""
        node = self.graph.makers.get(name)
        if node is None:
            return None
        if node.op == "MatMulNBits" or (node.op in ("Gemm", "MatMul") and node.inputs[1] in self.graph.tensors):
            return self._of_rows(node)
        if node.op in _PASSING:
            return self.find(node.inputs[0])
        if node.op == "Reshape":  # of a group's own product [S, 1, outputs]
            found = self.find(node.inputs[0])
            return found if found is not None and found.rounded else None
        if node.op == "Mul":  # by what an integer of rounded rows stands for
            inner = self.graph.makers.get(node.inputs[0])
            return self._of_rows(inner) if inner is not None and inner.op == "MatMulIntegerToFloat" else None
        return None

    def _of_rows(self, node: Node) -> Product:
        rows = node.inputs[0]
        maker = self.graph.makers.get(rows)
        if maker is None or maker.op != "Split":
            return Product(self._unrounded(rows, grouped=False), node)
        rounded = self.graph.makers.get(maker.inputs[0])
        grouped = rounded is not None and rounded.op == "QuantizeLinear"
        sizes = self.graph.tensors.get(maker.inputs[1]) if len(maker.inputs) > 1 else None
        if sizes is not None and sizes.value is not None and np.unique(sizes.value).size > 1:
            return Product(rows, node)  # columns of several widths, each a value of its own
        source = self._unrounded(maker.inputs[0], grouped=grouped)
        return Product(source, node, list(maker.outputs).index(rows), len(maker.outputs), grouped)

    def alone(self, product: Product) -> Product:
        """A product by itself, also where its rows are a part of others; raises Unsupported."""
        if product.parts == 1:
            return product
        if product.rounded:
            raise Unsupported("graph: a product of a group's rounded rows that is in no sum")
        return Product(product.node.inputs[0], product.node)

    def _unrounded(self, name: str, *, grouped: bool) -> str:
        """What was rounded to 8 bits to make `name`; grouped: it is [S, groups, width] of rows [S, groups * width]."""
        node = self.graph.makers.get(name)
        if node is None or node.op != "QuantizeLinear":
            return name
        raised = self.graph.makers.get(node.inputs[0])
        if raised is None or raised.op != "Mul":
            raise Unsupported("graph: rows are rounded in a way that the torch executor does not know")
        rows = raised.inputs[0]
        shaped = self.graph.makers.get(rows)
        if grouped and shaped is not None and shaped.op == "Reshape":
            return shaped.inputs[0]
        return rows

    def together(self, terms: Sequence[str]) -> tuple[list[Product], list[str]]:
        """The terms of a sum that are the parts of one product, in order; and the others."""
        found = [(term, self.find(term)) for term in terms]
        products = [product for _, product in found if product is not None]
        first = products[0] if products else None
        if first is None or [one.part for one in products] != list(range(first.parts)):
            return [], list(terms)
        if any((one.source, one.parts) != (first.source, first.parts) for one in products):
            return [], list(terms)
        return products, [term for term, product in found if product is None]

    def matrix(self, products: Sequence[Product]) -> Tensor:
        """The matrix of one product, or of parts that are one: [outputs, inputs] float32."""
        parts = [self._matrix(one.node) for one in products]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _matrix(self, node: Node) -> Tensor:
        if node.op == "MatMulIntegerToFloat":
            return dequantized.integers(self.value(node.inputs[1]), self.value(node.inputs[3]))
        if node.op == "MatMulNBits":
            bits, inputs = node.attributes["bits"], node.attributes["K"]
            zeros = self.value(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else None
            matrix = dequantized.blocks(
                self.value(node.inputs[1]),
                self.value(node.inputs[2]),
                zeros,
                bits,
            )
            return matrix[:, :inputs]
        stored = torch.from_numpy(self.value(node.inputs[1]).copy())
        if stored.dim() != 2:
            raise Corrupt(f"graph: a matrix of shape {list(stored.shape)}")
        return stored if node.attributes.get("transB") else stored.T
