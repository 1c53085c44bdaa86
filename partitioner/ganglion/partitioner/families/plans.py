"""What a family declares of a layer: its segments, what each is cut from, and which graph it runs.

A segment is one graph's worth of work between two exchanges: it takes the residual and what the exchange before it
summed (`Entry`), multiplies with matrices cut by outputs (`joined`), does something of its own in between (`core`), and
multiplies with a matrix cut by inputs (`summed`), which leaves the partial sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh"]
HeadNorm = Literal["none", "rms", "layer", "all"]


@dataclass(frozen=True)
class Vector:
    """A vector that every share holds: slot name, tensor of the checkpoint, length, what is added when it is cut."""

    slot: str
    tensor: str
    length: int
    add: float = 0.0


@dataclass(frozen=True)
class GroupVector:
    """A tensor that is cut by groups as it is: `width` numbers of each group, in order."""

    slot: str
    tensor: str
    shape: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class Norm:
    """A norm over all of a row: root mean square, or mean and variance."""

    weight: Vector
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True)
class Entry:
    """How a segment takes the residual `res` and the sum `delta` that the exchange before it left.

    add: the residual becomes res + scale * post(delta); the product's rows are norm(that).
    keep: the residual stays, the rows are norm(res), and delta (not yet exchanged) is added to what the segment leaves:
    the second half of a parallel layer.
    carry: no residual; the rows are what the segment before it carried on this device, delta the sums that it asked
    for.
    """

    mode: Literal["add", "keep", "carry"] = "add"
    norm: Norm | None = None
    post: Norm | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Linear:
    """A matrix [outputs, inputs] of the checkpoint (`tensor` without ".weight") and its width per group.

    width: outputs per group when it is joined, inputs when it is summed, all outputs when it is replicated; the last
    group is padded with zeros. first, stored: where a checkpoint stores several matrices as one of `stored` outputs,
    this one's begin at row `first` (stored 0: it is all of it).
    """

    slot: str
    tensor: str
    outputs: int
    inputs: int
    width: int
    bias: bool = False
    first: int = 0
    stored: int = 0

    @property
    def stored_outputs(self) -> int:
        """Rows of the checkpoint's tensor."""
        return self.stored or self.outputs


@dataclass(frozen=True)
class Attention:
    """GroupQueryAttention over the share's key-value heads; joined are q, k and v in this order.

    queries: query heads of a group (one key-value head). rope: a name of `Model.ropes`, "" for none. window: tokens
    that a token sees, itself among them, 0 for all. scale: of the scores, None for 1 / sqrt(head_dim). softcap: of the
    scores, 0 for none. head_norm: "rms" over each query and key head with the vectors q_norm and k_norm; "layer" with
    the group vectors q_norm and k_norm, a mean-and-variance norm with weights of each head's own; "all": rows come from
    a `Projection` whose sums normalize over all heads. sinks: the group vector `sinks`, a logit per query head.
    """

    queries: int
    head_dim: int
    rope: str = "default"
    interleaved: bool = False
    window: int = 0
    scale: float | None = None
    softcap: float = 0.0
    head_norm: HeadNorm = "none"
    sinks: bool = False


@dataclass(frozen=True)
class Projection:
    """The first half of an attention that normalizes over all heads: carries q, k and v, sums the squares of q and k.

    The partial sum is [rows, 2] (q's, k's), of each group its own sum of squares.
    """


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate x) * up x); joined are gate and up."""

    activation: Activation = "silu"


@dataclass(frozen=True)
class Head:
    """The output matrix; logits are multiplied by `scale`, then softcap * tanh(logits / softcap) where it is not 0."""

    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Core:
    """The base of cores that live in rooms of their own; `build_graphs` finds their builder by type."""

    @property
    def attention(self) -> Attention | None:
        """The attention inside it, None where it has no key-value state."""
        return None

    @property
    def active(self) -> tuple[int, int]:
        """Experts that a row runs through, and how many there are; (0, 0) for no mixture."""
        return 0, 0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the tensors that it is cut from beyond those of the plan."""
        return {}

    def at_layer(self, layer: int) -> Core:
        """The same with the tensor names of one layer."""
        del layer
        return self


AnyCore = Attention | Projection | GatedMlp | Head | Core


@dataclass(frozen=True)
class SegmentPlan:
    """One segment of a layer: what is cut from the checkpoint, and which graph it runs.

    kind names its graphs: plans of one kind have equal sizes and cores. exchange: whether devices sum what it leaves
    (the first half of a parallel layer keeps it). width: of the partial sum, 0 for the hidden size. carry: numbers of
    each group and row that the next segment gets on the same device.
    """

    kind: str
    axis: Literal["heads", "columns", "experts"]
    groups: int
    entry: Entry
    core: AnyCore
    vectors: tuple[Vector, ...] = ()
    replicated: tuple[Linear, ...] = ()
    grouped: tuple[GroupVector, ...] = ()
    joined: tuple[Linear, ...] = ()
    summed: Linear | None = None
    exchange: bool = True
    width: int = 0
    carry: int = 0

    @property
    def attends(self) -> bool:
        """Whether it has key-value state."""
        return self.attention is not None

    @property
    def attention(self) -> Attention | None:
        """Its core where that is attention, or the attention inside it."""
        if isinstance(self.core, Core):
            return self.core.attention
        return self.core if isinstance(self.core, Attention) else None

    @property
    def rope(self) -> str:
        """The rope that its graph takes, "" for none."""
        return self.attention.rope if self.attention is not None else ""

    @property
    def wholes(self) -> tuple[Vector, ...]:
        """The vectors of every share, in order: post norm, norm, the others."""
        norms = (norm.weight for norm in (self.entry.post, self.entry.norm) if norm is not None)
        return (*norms, *self.vectors)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every matrix."""
        return (*self.replicated, *self.joined, *((self.summed,) if self.summed else ()))

    @property
    def experts(self) -> int:
        """Experts that each row runs through, 0 where there are none."""
        return self.core.active[0] if isinstance(self.core, Core) else 0

    @property
    def active(self) -> float:
        """The part of its groups' weights that a row runs through."""
        chosen, of = self.core.active if isinstance(self.core, Core) else (0, 0)
        return chosen / of if of else 1.0

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint that the segment is cut from."""
        found: dict[str, tuple[int, ...]] = {vector.tensor: (vector.length,) for vector in self.wholes}
        found |= {vector.tensor: vector.shape for vector in self.grouped}
        for matrix in self.linears:
            found[f"{matrix.tensor}.weight"] = (matrix.stored_outputs, matrix.inputs)
            if matrix.bias:
                found[f"{matrix.tensor}.bias"] = (matrix.stored_outputs,)
        return found | (self.core.tensors() if isinstance(self.core, Core) else {})

    def at_layer(self, layer: int) -> SegmentPlan:
        """The same segment with the tensor names of one layer."""

        def vector(one: Vector) -> Vector:
            return replace(one, tensor=one.tensor.format(layer=layer))

        def norm(one: Norm | None) -> Norm | None:
            return one and replace(one, weight=vector(one.weight))

        def linear(one: Linear) -> Linear:
            return replace(one, tensor=one.tensor.format(layer=layer))

        return replace(
            self,
            entry=replace(self.entry, norm=norm(self.entry.norm), post=norm(self.entry.post)),
            vectors=tuple(map(vector, self.vectors)),
            replicated=tuple(map(linear, self.replicated)),
            grouped=tuple(replace(one, tensor=one.tensor.format(layer=layer)) for one in self.grouped),
            joined=tuple(map(linear, self.joined)),
            summed=self.summed and linear(self.summed),
            core=self.core.at_layer(layer) if isinstance(self.core, Core) else self.core,
        )
