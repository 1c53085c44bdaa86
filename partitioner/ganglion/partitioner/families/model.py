"""The facts of a model as read from config.json, and its split in groups under a numeric class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.plans import (
    Activation,
    SegmentPlan,
)
from ganglion.partitioner.rope import Rope
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import EXACT_POSITIONS, Geometry, NumericClass

GROUPS: Final = 16  # of the MLP's columns and of the vocabulary, where the sizes allow it
ROW_QUANTUM: Final = 16  # outputs per group of an int4 matrix: below 4, MatMulNBits takes other kernels at the edge
Block = Literal[16, 32, 64, 128]
Experts = Literal["columns", "whole"]
"""How a layer of experts is cut: each by columns, or expert by expert."""
EXACT_HEAD_DIM: Final = 256  # as far as equality was measured
# Up to so many dimensions MLAS sums queries times keys in one block, whatever the number of keys; `graphs.attention`.
ONE_BLOCK_HEAD_DIM: Final = 128
BLOCKS: Final[tuple[Block, ...]] = (128, 64, 32, 16)


@dataclass(frozen=True)
class RopeVariant:
    """A rope for deployments of at most `context` tokens: longrope turns otherwise beyond its original context."""

    context: int
    rope: Rope


@dataclass(frozen=True, kw_only=True)
class Model:
    """A configuration, read. Sizes in elements; `context` in tokens; `epsilon` of every norm.

    ropes: (name, variants by rising context). layer_ropes, windows: of every layer, a rope's name ("" for none) and the
    tokens that a token sees (0 for all). norm_add: what a norm's weights are more than stored. attention_scale: of the
    scores, None for 1 / sqrt(head_dim).
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    context: int
    epsilon: float
    ropes: tuple[tuple[str, tuple[RopeVariant, ...]], ...]
    layer_ropes: tuple[str, ...]
    windows: tuple[int, ...]
    tied: bool
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_add: float = 0.0
    head_norms: bool = False  # Cohere's, where a configuration chooses
    rope_interleaved: bool = False
    activation: Activation = "silu"
    query_bias: bool = False  # of q, k and v
    output_bias: bool = False  # of o
    mlp_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def queries(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.kv_heads

    @property
    def block_inputs(self) -> int:
        """What a block of a fast class must divide: the inputs of an attention group's output matrix."""
        return self.queries * self.head_dim

    @property
    def per_row(self) -> bool:
        """Whether every matrix can be multiplied with rows rounded to 8 bits: int8 without a block."""
        return True

    def column_groups(self, numeric_class: NumericClass, quantum: int, experts: Experts) -> int:
        """Groups of the MLP's columns, each a multiple of `quantum` wide."""
        del numeric_class, experts
        return -(-self.intermediate // group_width(self.intermediate, quantum))

    def check_class(self, numeric_class: NumericClass) -> None:
        """Raise Unsupported for a class in which the model cannot be run."""


@dataclass(frozen=True)
class Split:
    """The geometry under a numeric class; columns of an MLP group are multiples of `quantum`."""

    geometry: Geometry
    quantum: int
    experts: Experts = "columns"

    @property
    def column_width(self) -> int:
        """Columns of one MLP group (the last may be padded)."""
        return self.width_of(self.geometry.intermediate)

    def width_of(self, columns: int) -> int:
        """Columns of one group of an MLP of another size."""
        return column_width(columns, self.geometry.column_groups, self.quantum)


@dataclass(frozen=True)
class Family:
    """One family: its architectures as config.json names them, its reader, and the segments of a layer in order."""

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Config], Any]  # a Model, or the family's own kind of it
    layer: Callable[[Any, Split, int], tuple[SegmentPlan, ...]]
    head: Callable[[Any, Split], SegmentPlan]


def split_model(model: Model, numeric_class: NumericClass, experts: Experts = "columns") -> Split:
    """How the model is split in groups under a numeric class; raises Unsupported when its block does not fit."""
    if numeric_class.exact and model.head_dim > EXACT_HEAD_DIM:
        raise Unsupported(
            f"{numeric_class.name}: head dimension {model.head_dim}, exact classes go up to {EXACT_HEAD_DIM}; use a "
            "fast class"
        )
    shortest = min((one.context for _, found in model.ropes for one in found), default=model.context)
    if numeric_class.exact and model.head_dim > ONE_BLOCK_HEAD_DIM and shortest < EXACT_POSITIONS:
        raise Unsupported(
            f"{numeric_class.name}: a context of {shortest} tokens; at head dimension {model.head_dim} exact classes "
            f"need {EXACT_POSITIONS}; use a fast class"
        )
    model.check_class(numeric_class)
    inputs = model.block_inputs
    if not numeric_class.exact and numeric_class.block and inputs % numeric_class.block:
        raise Unsupported(
            f"{numeric_class.name}: block {numeric_class.block} does not divide the {inputs} inputs of an attention "
            f"group; use block {largest_block(inputs, numeric_class.block)} or an exact class"
        )
    quantum = numeric_class.block or 1
    rows = group_width(model.vocab, ROW_QUANTUM)
    return Split(
        Geometry(
            hidden=model.hidden,
            layers=model.layers,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            intermediate=model.intermediate,
            vocab=model.vocab,
            context=model.context,
            head_groups=model.kv_heads,
            column_groups=model.column_groups(numeric_class, quantum, experts),
            vocab_groups=-(-model.vocab // rows),
            vocab_group_rows=rows,
        ),
        quantum,
        experts,
    )


def largest_block(inputs: int, at_most: int) -> Block:
    """The largest quantization block, at most `at_most`, that divides `inputs`; the smallest where none does."""
    for block in BLOCKS:
        if block <= at_most and inputs % block == 0:
            return block
    return BLOCKS[-1]


def column_width(columns: int, groups: int, quantum: int) -> int:
    """Width of one of `groups` groups: the least multiple of `quantum` with which they hold all columns."""
    return -(-columns // (groups * quantum)) * quantum


def group_width(size: int, quantum: int) -> int:
    """Width of a group: a multiple of `quantum` that splits `size` in at most `GROUPS` groups, none of it empty."""
    return -(-size // (GROUPS * quantum)) * quantum
