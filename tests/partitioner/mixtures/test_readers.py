"""Configurations: every field is read, transformers' defaults are ours, and any value is read or refused."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import transformers
from mixture_shapes import REFUSED, SHAPES
from watched import Watched

from ganglion.partitioner.config import Config
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.experts import MixtureModel
from ganglion.partitioner.families.model import split_model
from ganglion.wire.errors import InvalidDocument, Unsupported
from ganglion.wire.nouns import NumericClass

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "intermediate_size": 172,
    "vocab_size": 283,
    "num_experts_per_tok": 3,
}
NUMBERS_DO_NOT_DEPEND_ON = {
    "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "output_router_logits", "pad_token_id",
    "pretraining_tp", "router_aux_loss_coef", "router_jitter_noise", "use_cache",
}  # fmt: skip
HOSTILE = [None, True, 0, -1, 1, 2**40, 1e308, float("inf"), "x", [], [[]], {}, {"rope_type": []}, ["x"] * 8, [0] * 8]


def config_class(family: str) -> type[transformers.PreTrainedConfig]:
    return getattr(transformers, f"{family}ForCausalLM").config_class


def read(family: str, fields: dict[str, Any]) -> MixtureModel:
    config = Config(fields | {"architectures": [f"{family}ForCausalLM"]}, "config.json")
    return family_of(config).read(config)


@pytest.mark.parametrize("family", REFUSED)
def test_defaults_are_transformers(family):
    whole = json.loads(json.dumps(config_class(family)(**SIZES).to_dict()))
    complete = read(family, whole)
    for name in set(whole) - set(SIZES):
        if name != "q_lora_rank":  # where it is null it says something
            assert read(family, {key: value for key, value in whole.items() if key != name}) == complete, name
    assert read(family, SIZES) == complete


@pytest.mark.parametrize("family", REFUSED)
def test_every_field_that_changes_numbers_is_read(family):
    looked_up: set[str] = set()

    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2} if family == "DeepseekV2" else {}
    whole = config_class(family)(**SIZES | groups | ({"use_sliding_window": True} if family == "Qwen3Moe" else {}))
    config = Config(Watched(whole.to_dict() | {"architectures": [f"{family}ForCausalLM"]}, looked_up), "config.json")
    family_of(config).read(config)
    fields = {name for name in vars(type(whole)).get("__annotations__", {}) if not name.startswith("_")}
    fields -= {"model_type", "attribute_map", "keys_to_ignore_at_inference", "default_theta"}
    if family == "DeepseekV2":
        fields -= {"head_dim"}  # transformers overwrites it
    assert fields - looked_up - NUMBERS_DO_NOT_DEPEND_ON == set()


def test_every_mixture_has_three_shapes_and_both_kinds_of_heads():
    for family in REFUSED:
        shapes = [shape.config for shape in SHAPES.values() if shape.family == family]
        assert len(shapes) >= 3
        assert len({bool(shape.get("tie_word_embeddings")) for shape in shapes}) == 2
        if "attention_bias" in vars(config_class(family))["__annotations__"]:
            default = vars(config_class(family))["attention_bias"]
            assert len({bool(shape.get("attention_bias", default)) for shape in shapes}) == 2


@pytest.mark.parametrize("family", REFUSED)
def test_any_value_of_any_field_is_read_or_refused(family):
    fields = config_class(family)(**SIZES | {"num_key_value_heads": 32}).to_dict()
    for name in {*fields, "layer_types", "rope_scaling", "rope_theta", "num_experts", "norm_topk_prob", "clip_qkv"}:
        for value in HOSTILE:
            with contextlib.suppress(Unsupported, InvalidDocument):
                model = read(family, fields | {name: value})
                split_model(model, NumericClass(format="int4", block=32, exact=True))
                assert model.hidden > 0, (name, value)
