"""Gemma 2: soft caps, every other layer sees a window, norms around both halves with weights stored less one.

The embedding is scaled by the root of the hidden size in float32, as transformers does it in float32 (a model that it
loads as bfloat16 has the root rounded to that).
"""

from __future__ import annotations

from typing import Any, Final

from ganglion.partitioner.config import Config
from ganglion.partitioner.families.base import attention, layer_norm_names, mlp, with_norm
from ganglion.partitioner.families.model import Family, Model, Split
from ganglion.partitioner.families.plans import SegmentPlan
from ganglion.partitioner.families.post_norms import post_normed, post_normed_head
from ganglion.partitioner.families.reading import filled, read_dense, read_layer_types, refuse, windows_of


def _read(config: Config) -> Model:
    config = gemma_filled(
        config, max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    )
    sliding = read_layer_types(config, lambda layer: layer % 2 == 0)
    softcap = config.number("attn_logit_softcapping") if config.has("attn_logit_softcapping") else 0.0
    windows = windows_of(config, sliding)
    return read_dense(config, family="gemma2", windows=windows, attention_softcap=softcap, **gemma_facts(config))


def gemma_filled(config: Config, **defaults: Any) -> Config:
    """The configuration with what Gemma 2 and 3 take where it is silent."""
    shared = {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    }  # fmt: skip
    return filled(config, **(shared | defaults))


def gemma_facts(config: Config) -> dict[str, Any]:
    """What Gemma 2 and 3 do alike, but for ropes, windows and the soft cap of attention."""
    refuse(config, "use_bidirectional_attention")
    biased = config.flag("attention_bias", False)
    return {
        "norm_add": 1.0,
        "query_bias": biased,
        "output_bias": biased,
        "attention_scale": config.number("query_pre_attn_scalar") ** -0.5,
        "embedding_scale": config.whole("hidden_size") ** 0.5,
        "logit_softcap": config.number("final_logit_softcapping") if config.has("final_logit_softcapping") else 0.0,
    }


def gemma_mlp(model: Model, split: Split) -> SegmentPlan:
    """The MLP: its norm has another name, as the usual one belongs to what attention leaves."""
    return with_norm(mlp(model, split), model, layer_norm_names("pre_feedforward_layernorm"))


def _layer(model: Model, split: Split, layer: int) -> tuple[SegmentPlan, ...]:
    return post_normed(model, layer, attention(model, split, layer), gemma_mlp(model, split))


GEMMA2: Final = Family(
    name="gemma2", architectures=("Gemma2ForCausalLM",), read=_read, layer=_layer, head=post_normed_head
)
