"""Readers of configurations: what a family refuses it names, what an old configuration leaves out it knows."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import transformers
from checkpoints import TINY
from family_shapes import REFUSED, ROPES, SHAPES
from watched import Watched

from ganglion.partitioner.config import Config
from ganglion.partitioner.families import FAMILIES, family_of
from ganglion.partitioner.families.model import Model, split_model
from ganglion.wire.errors import InvalidDocument, Unsupported
from ganglion.wire.nouns import NumericClass

NAMES = {family.name for family in FAMILIES}
CASES = [(family, *case) for family, cases in REFUSED.items() for case in cases]
# Of configurations by these classes a reader takes every default; sizes are what a config.json always has.
SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "intermediate_size": 172,
    "vocab_size": 283,
}
NUMBERS_DO_NOT_DEPEND_ON = {
    "attention_dropout", "bos_token_id", "embd_pdrop", "eos_token_id", "initializer_range", "pad_token_id",
    "pretraining_tp", "resid_pdrop", "use_cache",
}  # fmt: skip


def config_class(family: str) -> type[transformers.PreTrainedConfig]:
    return getattr(transformers, f"{family}ForCausalLM").config_class


def read(family: str, fields: dict[str, Any]) -> Model:
    config = Config(fields | {"architectures": [f"{family}ForCausalLM"]}, "config.json")
    return family_of(config).read(config)


@pytest.mark.parametrize(("family", "changes", "said"), CASES)
def test_what_is_not_supported_is_refused_by_name(family, changes, said):
    fields = config_class(family)(**TINY).to_dict()
    fields = {name: value for name, value in fields.items() if name != "layer_types"}
    read(family, fields)
    with pytest.raises((Unsupported, InvalidDocument), match=said):
        read(family, fields | changes)


@pytest.mark.parametrize("family", ROPES)
def test_defaults_of_an_old_configuration_are_transformers(family):
    """Older releases left out of config.json what equals the class's default."""
    whole = config_class(family)(**SIZES)
    complete = read(family, json.loads(json.dumps(whole.to_dict())))
    assert read(family, SIZES) == complete
    dropped = dict(whole.to_dict())
    for name in list(dropped):
        if name in SIZES:
            continue
        kept = {key: value for key, value in dropped.items() if key != name}
        assert read(family, kept) == complete, name


@pytest.mark.parametrize("family", ROPES)
def test_every_field_that_changes_numbers_is_read(family):
    """A reader looks up every field of transformers' own class, but for those of training and of tokens."""
    looked_up: set[str] = set()

    whole = config_class(family)(**SIZES)
    config = Config(Watched(whole.to_dict() | {"architectures": [f"{family}ForCausalLM"]}, looked_up), "config.json")
    family_of(config).read(config)
    fields = {name for name in vars(type(whole)).get("__annotations__", {}) if not name.startswith("_")}
    fields -= {"model_type", "attribute_map", "keys_to_ignore_at_inference", "default_theta"}
    if not whole.to_dict().get("use_sliding_window", True):
        fields -= {"sliding_window", "max_window_layers"}  # read where windows are used
    if "no_rope_layers" in fields:
        fields -= {"no_rope_layer_interval"}  # what the layers were made by
    assert fields - looked_up - NUMBERS_DO_NOT_DEPEND_ON == set()


def test_unknown_architectures_are_refused_with_the_list_of_the_others():
    with pytest.raises(Unsupported, match="GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, "):
        family_of(Config({"architectures": ["GPT2LMHeadModel"]}, "config.json"))


def test_every_dense_family_has_three_shapes_a_rope_and_a_refusal():
    for family in ROPES:
        shapes = [shape.config for shape in SHAPES.values() if shape.family == family]
        assert len(shapes) >= 3
        assert len({bool(shape.get("tie_word_embeddings")) for shape in shapes}) == 2
        assert REFUSED[family]
        if "attention_bias" in vars(config_class(family))["__annotations__"]:
            assert len({bool(shape.get("attention_bias")) for shape in shapes}) == 2


HOSTILE = [None, True, 0, -1, 1, 2**40, 1e308, float("inf"), "x", [], [[]], {}, {"rope_type": []}, ["x"] * 8, [0] * 8]


@pytest.mark.parametrize("family", ROPES)
def test_any_value_of_any_field_is_read_or_refused(family):
    fields = config_class(family)(**SIZES | {"num_key_value_heads": 8}).to_dict()
    for name in {*fields, "layer_types", "rope_scaling", "rope_theta", "head_dim", "sliding_window_pattern"}:
        read(family, fields)
        for value in HOSTILE:
            with contextlib.suppress(Unsupported, InvalidDocument):
                model = read(family, fields | {name: value})
                split_model(model, NumericClass(format="int4", block=32, exact=True))
                assert model.hidden > 0, (name, value)
