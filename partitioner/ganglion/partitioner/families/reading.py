"""Reading config.json: the fields that dense decoders share, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.model import (
    Model,
    RopeVariant,
)
from ganglion.partitioner.families.plans import (
    Activation,
)
from ganglion.partitioner.rope import Rope, read_ropes
from ganglion.wire.errors import InvalidDocument, Unsupported

HEAD_QUANTUM: Final = 16  # ONNX Runtime's rotary embedding takes head dimensions that are multiples of 16


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
        read["ropes"] = (("default", variants(read_ropes(config, head_dim, context))),)
    return Model(**read | facts)


def filled(config: Config, **defaults: Any) -> Config:
    """The configuration with what transformers takes where config.json is silent (a null in it stays a null)."""
    return Config(defaults | config.fields, config.where)


def refuse(config: Config, *names: str) -> None:
    """Refuse fields that are set to anything but null or false: they change numbers, and the family has none of it."""
    for name in names:
        if config.fields.get(name) not in (None, False):
            raise Unsupported(f"{config.where}: {name} is not supported", param=name)


def variants(ropes: Iterable[tuple[int, Rope]]) -> tuple[RopeVariant, ...]:
    """The variants of one rope."""
    return tuple(RopeVariant(context, rope) for context, rope in ropes)


def read_layer_types(config: Config, default: Callable[[int], bool]) -> tuple[bool, ...]:
    """Of every layer, whether its attention slides: by `layer_types`, or where that is absent as `default` says."""
    layers = config.whole("num_hidden_layers", at_most=4096)
    if not config.has("layer_types"):
        return tuple(default(layer) for layer in range(layers))
    named = config.names("layer_types")
    unknown = set(named) - {"full_attention", "sliding_attention"}
    if unknown:
        raise Unsupported(f"{config.where}: layer type {min(unknown)!r} is not supported", param="layer_types")
    if len(named) != layers:
        raise InvalidDocument(f"{config.where}: layer_types has {len(named)} entries for {layers} layers")
    return tuple(name == "sliding_attention" for name in named)


def windows_of(config: Config, sliding: Iterable[bool]) -> tuple[int, ...]:
    """Of every layer, the tokens that a token sees, itself among them; 0 for all of the context."""
    layers = tuple(sliding)
    if not any(layers):
        return (0,) * len(layers)
    window = config.whole("sliding_window")
    if window >= config.whole("max_position_embeddings", at_most=2**24):
        window = 0
    return tuple(window if slides else 0 for slides in layers)


def _activation(config: Config) -> Activation:
    name = config.text("hidden_activation", config.text("hidden_act", "silu"))
    known: dict[str, Activation] = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    }  # fmt: skip
    if name not in known:
        raise Unsupported(f"{config.where}: activation {name!r}; supported are {', '.join(known)}", param="hidden_act")
    return known[name]
