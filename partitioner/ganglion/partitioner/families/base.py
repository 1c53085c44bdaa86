"""What a family declares: how its configuration reads, and the segments of a layer with their exchange points.

A segment ends where the devices of a stage must exchange. Each is a norm, one product with the matrices that are cut by
outputs (`joined`), something of its own kind in between, and the product with a matrix cut by inputs (`summed`), which
leaves the partial sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from ganglion.partitioner.config import Config
from ganglion.partitioner.rope import Rope, read_rope
from ganglion.wire.errors import InvalidDocument, Unsupported
from ganglion.wire.nouns import Geometry, NumericClass

GROUPS: Final = 16  # of the MLP's columns and of the vocabulary, where the sizes allow it
ROW_QUANTUM: Final = 16  # outputs per group of an int4 matrix: below 4, MatMulNBits takes other kernels at the edge
Block = Literal[16, 32, 64, 128]
EXACT_HEAD_DIM: Final = 128  # beyond it MLAS sums queries times keys in blocks that depend on the number of keys
BLOCKS: Final[tuple[Block, ...]] = (128, 64, 32, 16)
HEAD_QUANTUM: Final = 16  # ONNX Runtime's rotary embedding takes head dimensions that are multiples of 16


@dataclass(frozen=True)
class Model:
    """A configuration, read. Sizes in elements; `context` in tokens; `epsilon` of every norm."""

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
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    query_key_norm: bool


@dataclass(frozen=True)
class Split:
    """The geometry under a numeric class, and the columns of one MLP group (the last may be padded)."""

    geometry: Geometry
    column_width: int


@dataclass(frozen=True)
class Whole:
    """A vector that every share holds: slot name, tensor of the checkpoint, length."""

    slot: str
    tensor: str
    length: int


@dataclass(frozen=True)
class Linear:
    """A matrix [outputs, inputs] of the checkpoint (`tensor` without ".weight") and its width per group.

    outputs, inputs: the whole matrix's sizes. width: outputs per group when it is joined, inputs when it is summed; the
    last group is padded with zeros.
    """

    slot: str
    tensor: str
    outputs: int
    inputs: int
    width: int
    bias: bool = False


@dataclass(frozen=True)
class SegmentPlan:
    """One segment of a layer: what is cut from the checkpoint, and which graph it runs."""

    kind: Literal["attention", "mlp", "head"]
    axis: Literal["heads", "columns"]
    groups: int
    wholes: tuple[Whole, ...]  # the norm before the product first
    joined: tuple[Linear, ...]
    summed: Linear | None

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint that the segment is cut from."""
        found: dict[str, tuple[int, ...]] = {whole.tensor: (whole.length,) for whole in self.wholes}
        for matrix in (*self.joined, *((self.summed,) if self.summed else ())):
            found[f"{matrix.tensor}.weight"] = (matrix.outputs, matrix.inputs)
            if matrix.bias:
                found[f"{matrix.tensor}.bias"] = (matrix.outputs,)
        return found

    def at_layer(self, layer: int) -> SegmentPlan:
        """The same segment with the tensor names of one layer."""
        return replace(
            self,
            wholes=tuple(replace(w, tensor=w.tensor.format(layer=layer)) for w in self.wholes),
            joined=tuple(replace(m, tensor=m.tensor.format(layer=layer)) for m in self.joined),
            summed=self.summed and replace(self.summed, tensor=self.summed.tensor.format(layer=layer)),
        )


@dataclass(frozen=True)
class Family:
    """One family: its architectures as config.json names them, its reader, and the segments of a layer in order."""

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Config], Model]
    layer: Callable[[Model, Split], tuple[SegmentPlan, ...]]


def read_dense(
    config: Config, *, family: str, head_dim: int | None, attention_bias: bool, mlp_bias: bool, query_key_norm: bool
) -> Model:
    """Read the fields that dense decoders share; `head_dim` None means hidden / heads when config.json is silent."""
    if config.text("hidden_act", "silu") != "silu":
        raise Unsupported(f"{config.where}: hidden_act {config.text('hidden_act')!r}; supported is silu")
    if config.has("quantization_config"):
        raise Unsupported(f"{config.where}: an already quantized checkpoint; use the one in bfloat16 or float32")
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads", at_most=4096)
    kv_heads = config.whole("num_key_value_heads", heads, at_most=4096)
    if heads % kv_heads:
        raise InvalidDocument(f"{config.where}: {heads} heads do not divide into {kv_heads} key-value heads")
    if head_dim is None and not config.has("head_dim") and hidden % heads:
        raise InvalidDocument(f"{config.where}: hidden_size {hidden} does not divide into {heads} heads")
    head_dim = config.whole("head_dim", head_dim or hidden // heads, at_most=4096)
    if head_dim % HEAD_QUANTUM:
        raise Unsupported(f"{config.where}: head dimension {head_dim}; multiples of {HEAD_QUANTUM} are supported")
    context = config.whole("max_position_embeddings", at_most=2**24)
    return Model(
        family=family,
        hidden=hidden,
        layers=config.whole("num_hidden_layers", at_most=4096),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.whole("intermediate_size"),
        vocab=config.whole("vocab_size"),
        context=context,
        epsilon=config.number("rms_norm_eps", 1e-6),
        rope=read_rope(config, head_dim, context),
        tied=config.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        mlp_bias=mlp_bias,
        query_key_norm=query_key_norm,
    )


def split_model(model: Model, numeric_class: NumericClass) -> Split:
    """How the model is split in groups under a numeric class; raises Unsupported when its block does not fit."""
    if numeric_class.exact and model.head_dim > EXACT_HEAD_DIM:
        raise Unsupported(
            f"{numeric_class.name}: head dimension {model.head_dim}, exact classes go up to {EXACT_HEAD_DIM}; use a "
            "fast class"
        )
    queries = model.heads // model.kv_heads * model.head_dim
    if not numeric_class.exact and numeric_class.block and queries % numeric_class.block:
        raise Unsupported(
            f"{numeric_class.name}: block {numeric_class.block} does not divide the {queries} inputs of an attention "
            f"group; use block {largest_block(queries, numeric_class.block)} or an exact class"
        )
    width = _group_width(model.intermediate, numeric_class.block or 1)
    rows = _group_width(model.vocab, ROW_QUANTUM)
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
            column_groups=-(-model.intermediate // width),
            vocab_groups=-(-model.vocab // rows),
            vocab_group_rows=rows,
        ),
        width,
    )


def largest_block(inputs: int, at_most: int) -> Block:
    """The largest quantization block, at most `at_most`, that divides `inputs` (a multiple of 16)."""
    return next(block for block in BLOCKS if block <= at_most and inputs % block == 0)


def _group_width(size: int, quantum: int) -> int:
    """Width of a group: a multiple of `quantum` that splits `size` in at most `GROUPS` groups, none of it empty."""
    return -(-size // (GROUPS * quantum)) * quantum


def attention(model: Model, split: Split) -> SegmentPlan:
    """Attention of dense decoders: groups are key-value heads with the query heads that read them."""
    at = "model.layers.{layer}.self_attn."
    queries = model.heads // model.kv_heads * model.head_dim
    sizes = {"q": queries, "k": model.head_dim, "v": model.head_dim}
    norm = Whole("norm", "model.layers.{layer}.input_layernorm.weight", model.hidden)
    per_head = tuple(Whole(f"{n}_norm", f"{at}{n}_norm.weight", model.head_dim) for n in "qk" if model.query_key_norm)
    joined = tuple(
        Linear(name, f"{at}{name}_proj", size * model.kv_heads, model.hidden, size, model.attention_bias)
        for name, size in sizes.items()
    )
    summed = Linear("o", f"{at}o_proj", model.hidden, queries * model.kv_heads, queries, model.attention_bias)
    return SegmentPlan("attention", "heads", split.geometry.head_groups, (norm, *per_head), joined, summed)


def mlp(model: Model, split: Split) -> SegmentPlan:
    """Gated MLP: groups are runs of columns, padded with zero columns where the intermediate size does not divide."""
    at = "model.layers.{layer}."
    width = split.column_width
    norm = Whole("norm", f"{at}post_attention_layernorm.weight", model.hidden)
    joined = tuple(
        Linear(name, f"{at}mlp.{name}_proj", model.intermediate, model.hidden, width, model.mlp_bias)
        for name in ("gate", "up")
    )
    summed = Linear("down", f"{at}mlp.down_proj", model.hidden, model.intermediate, width, model.mlp_bias)
    return SegmentPlan("mlp", "columns", split.geometry.column_groups, (norm,), joined, summed)


def head(model: Model, split: Split) -> SegmentPlan:
    """The final norm and the output matrix (the embedding's own when they are tied), by runs of vocabulary rows."""
    tensor = "model.embed_tokens" if model.tied else "lm_head"
    matrix = Linear("output", tensor, model.vocab, model.hidden, split.geometry.vocab_group_rows)
    norm = Whole("norm", "model.norm.weight", model.hidden)
    return SegmentPlan("head", "columns", split.geometry.vocab_groups, (norm,), (matrix,), None)
