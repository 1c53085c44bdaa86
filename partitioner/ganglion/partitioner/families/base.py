"""What families share: the facts of a model as read from config.json, its split in groups, and the usual segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.plans import (
    Activation,
    Attention,
    Entry,
    GatedMlp,
    Head,
    Linear,
    Norm,
    SegmentPlan,
    Vector,
)
from ganglion.partitioner.rope import Rope, read_rope
from ganglion.wire.errors import InvalidDocument, Unsupported
from ganglion.wire.nouns import Geometry, NumericClass

GROUPS: Final = 16  # of the MLP's columns and of the vocabulary, where the sizes allow it
ROW_QUANTUM: Final = 16  # outputs per group of an int4 matrix: below 4, MatMulNBits takes other kernels at the edge
Block = Literal[16, 32, 64, 128]
EXACT_HEAD_DIM: Final = 128  # beyond it MLAS sums queries times keys in blocks that depend on the number of keys
BLOCKS: Final[tuple[Block, ...]] = (128, 64, 32, 16)
HEAD_QUANTUM: Final = 16  # ONNX Runtime's rotary embedding takes head dimensions that are multiples of 16
ATTENTION: Final = "model.layers.{layer}.self_attn."
MLP: Final = "model.layers.{layer}.mlp."


@dataclass(frozen=True)
class RopeVariant:
    """A rope for deployments of at most `context` tokens: longrope turns otherwise beyond its original context."""

    context: int
    rope: Rope


@dataclass(frozen=True, kw_only=True)
class Model:
    """A configuration, read. Sizes in elements; `context` in tokens; `epsilon` of every norm.

    ropes: (name, variants by rising context). layer_ropes, windows: of every layer, a rope's name ("" for none) and the
    tokens that a token sees (0 for all). attention_scale: of the scores, None for 1 / sqrt(head_dim).
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


@dataclass(frozen=True)
class Split:
    """The geometry under a numeric class, and the columns of one MLP group (the last may be padded)."""

    geometry: Geometry
    column_width: int


@dataclass(frozen=True)
class Family:
    """One family: its architectures as config.json names them, its reader, and the segments of a layer in order.

    final_norm: the checkpoint's norm before the output matrix. few_groups: what happens where more devices are planned
    than there are key-value heads.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Config], Any]  # a Model, or the family's own kind of it
    layer: Callable[[Any, Split, int], tuple[SegmentPlan, ...]]
    head: Callable[[Any, Split], SegmentPlan]


def read_dense(config: Config, *, family: str, head_dim: int | None = None, **facts: Any) -> Model:
    """Read the fields that dense decoders share; `facts` are the family's own and win.

    head_dim: where config.json is silent, None for hidden / heads.
    """
    activation = _activation(config)
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
    layers = config.whole("num_hidden_layers", at_most=4096)
    read: dict[str, Any] = {
        "family": family,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": config.whole("intermediate_size"),
        "vocab": config.whole("vocab_size"),
        "context": context,
        "epsilon": config.number("rms_norm_eps", 1e-6),
        "layer_ropes": ("default",) * layers,
        "windows": (0,) * layers,
        "tied": config.flag("tie_word_embeddings", False),
        "activation": activation,
    }
    if "ropes" not in facts:
        read["ropes"] = (("default", (RopeVariant(context, read_rope(config, head_dim, context)),)),)
    return Model(**read | facts)


def _activation(config: Config) -> Activation:
    name = config.text("hidden_activation", config.text("hidden_act", "silu"))
    known: dict[str, Activation] = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    }  # fmt: skip
    if name not in known:
        raise Unsupported(f"{config.where}: activation {name!r}; supported are {', '.join(known)}", param="hidden_act")
    return known[name]


def split_model(model: Model, numeric_class: NumericClass) -> Split:
    """How the model is split in groups under a numeric class; raises Unsupported when its block does not fit."""
    if numeric_class.exact and model.head_dim > EXACT_HEAD_DIM:
        raise Unsupported(
            f"{numeric_class.name}: head dimension {model.head_dim}, exact classes go up to {EXACT_HEAD_DIM}; use a "
            "fast class"
        )
    queries = model.queries * model.head_dim
    if not numeric_class.exact and numeric_class.block and queries % numeric_class.block:
        raise Unsupported(
            f"{numeric_class.name}: block {numeric_class.block} does not divide the {queries} inputs of an attention "
            f"group; use block {largest_block(queries, numeric_class.block)} or an exact class"
        )
    width = group_width(model.intermediate, numeric_class.block or 1)
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
            column_groups=-(-model.intermediate // width),
            vocab_groups=-(-model.vocab // rows),
            vocab_group_rows=rows,
        ),
        width,
    )


def largest_block(inputs: int, at_most: int) -> Block:
    """The largest quantization block, at most `at_most`, that divides `inputs` (a multiple of 16)."""
    return next(block for block in BLOCKS if block <= at_most and inputs % block == 0)


def group_width(size: int, quantum: int) -> int:
    """Width of a group: a multiple of `quantum` that splits `size` in at most `GROUPS` groups, none of it empty."""
    return -(-size // (GROUPS * quantum)) * quantum


# The usual segments. A family's file changes what it does differently with `dataclasses.replace`.


def norm(name: str, length: int, *, slot: str = "norm", add: float = 0.0) -> Norm:
    """A root-mean-square norm of the tensor `name` (without ".weight")."""
    return Norm(Vector(slot, f"{name}.weight", length, add))


def layer_norm_names(name: str) -> str:
    """The tensor of a layer's norm."""
    return "model.layers.{layer}." + name


def attention(model: Model, split: Split, layer: int) -> SegmentPlan:
    """Attention of dense decoders: groups are key-value heads with the query heads that read them."""
    queries = model.queries * model.head_dim
    sizes = {"q": queries, "k": model.head_dim, "v": model.head_dim}
    window, rope = model.windows[layer], model.layer_ropes[layer]
    turned = "" if rope == "default" else f"-{rope or 'norope'}"
    return SegmentPlan(
        kind="attention" + (f"-window{window}" if window else "") + turned,
        axis="heads",
        groups=split.geometry.head_groups,
        entry=Entry(norm=norm(layer_norm_names("input_layernorm"), model.hidden), scale=model.residual_scale),
        core=Attention(
            queries=model.queries,
            head_dim=model.head_dim,
            rope=rope,
            window=window,
            scale=model.attention_scale,
            softcap=model.attention_softcap,
        ),
        joined=tuple(
            Linear(name, f"{ATTENTION}{name}_proj", size * model.kv_heads, model.hidden, size, model.query_bias)
            for name, size in sizes.items()
        ),
        summed=Linear("o", f"{ATTENTION}o_proj", model.hidden, queries * model.kv_heads, queries, model.output_bias),
    )


def mlp(model: Model, split: Split) -> SegmentPlan:
    """Gated MLP: groups are runs of columns, padded with zero columns where the intermediate size does not divide."""
    width = split.column_width
    return SegmentPlan(
        kind="mlp",
        axis="columns",
        groups=split.geometry.column_groups,
        entry=Entry(norm=norm(layer_norm_names("post_attention_layernorm"), model.hidden), scale=model.residual_scale),
        core=GatedMlp(model.activation),
        joined=tuple(
            Linear(name, f"{MLP}{name}_proj", model.intermediate, model.hidden, width, model.mlp_bias)
            for name in ("gate", "up")
        ),
        summed=Linear("down", f"{MLP}down_proj", model.hidden, model.intermediate, width, model.mlp_bias),
    )


def head(model: Model, split: Split) -> SegmentPlan:
    """The final norm and the output matrix (the embedding's own when they are tied), by runs of vocabulary rows."""
    tensor = "model.embed_tokens" if model.tied else "lm_head"
    return SegmentPlan(
        kind="head",
        axis="columns",
        groups=split.geometry.vocab_groups,
        entry=Entry(norm=norm("model.norm", model.hidden), scale=model.residual_scale),
        core=Head(model.logit_scale, model.logit_softcap),
        joined=(Linear("output", tensor, model.vocab, model.hidden, split.geometry.vocab_group_rows),),
    )
