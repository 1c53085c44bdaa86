"""What the graphs of all segments have: entry, norms, the partial sum that is left."""

from __future__ import annotations

from functools import reduce

from onnx import helper

from ganglion.partitioner.families.model import Model
from ganglion.partitioner.families.plans import Norm, SegmentPlan
from ganglion.partitioner.graphs.nodes import MICROSOFT, OPSET
from ganglion.partitioner.graphs.products import Products
from ganglion.partitioner.quantize.recipe import Recipe
from ganglion.wire.nouns import Segment
from ganglion.wire.shares import Groups

__all__ = ["MICROSOFT", "OPSET", "Builder"]


class Builder(Products):
    """Builds the graph of a share of a segment. A builder of a core calls `entry`, products, and `leave`."""

    def __init__(self, plan: SegmentPlan, segment: Segment, share: Groups, model: Model, recipe: Recipe) -> None:
        super().__init__(plan, segment, share, recipe)
        self.model = model
        self.width = plan.width or model.hidden

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
        # One after the other, in a Sum's order: a term is added while it is in the cache, and its memory is free again.
        self.rename(reduce(lambda total, term: self.node("Add", [total, term])[0], terms), "partial")
        self.output("partial", ["S", self.width], self.wide)

    def _normed(self, rows: str, norm: Norm | None) -> str:
        if norm is None:
            return rows
        scale = self.weight(norm.weight.slot, [norm.weight.length])
        if norm.kind == "layer":
            return self.node("LayerNormalization", [rows, scale], axis=-1, epsilon=self.model.epsilon)[0]
        return self.node("SimplifiedLayerNormalization", [rows, scale], axis=-1, epsilon=self.model.epsilon)[0]

    def summed(self, rows: str) -> None:
        """The product that leaves the partial sum: per group and added in float64, or one for the share."""
        if self.plan.summed is None:
            raise ValueError(f"segment {self.plan.kind} has no summed matrix")
        self.leave(self.summed_terms(rows, self.plan.summed))
