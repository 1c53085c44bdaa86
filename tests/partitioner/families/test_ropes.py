"""Every family's rope tables against its own rotary embedding in transformers, for every scaling it takes."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
import transformers
from checkpoints import LLAMA3_ROPE, TINY
from family_shapes import BY_LAYER_TYPE, DYNAMIC, FULL, LINEAR, ROPES, SLIDING, YARN, long_rope

from ganglion.partitioner.config import Config
from ganglion.partitioner.families import family_of
from ganglion.partitioner.families.model import Model
from ganglion.wire.errors import Unsupported

CONTEXT = 2048
HEAD_DIM = 32
DESCRIBED = {
    "default": {"rope_type": "default", "rope_theta": 20000.0},
    "linear": LINEAR,
    "dynamic": DYNAMIC,
    "llama3": LLAMA3_ROPE,
    "yarn": YARN | {"beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "longrope": long_rope(HEAD_DIM // 2),
}
ORIGINAL = 64  # context of the short factors
CASES = [(family, kind) for family, kinds in ROPES.items() for kind in kinds]


def configuration(family: str, kind: str) -> transformers.PreTrainedConfig:
    parameters = dict(DESCRIBED[kind])
    if kind == "longrope":
        parameters["original_max_position_embeddings"] = ORIGINAL
    config = TINY | {"hidden_size": 4 * HEAD_DIM, "max_position_embeddings": CONTEXT, "pad_token_id": None}
    if family == "Phi3":
        config["original_max_position_embeddings"] = ORIGINAL
    if family in BY_LAYER_TYPE:
        config["layer_types"] = [SLIDING, FULL]
        parameters = {FULL: parameters, SLIDING: {"rope_type": "default", "rope_theta": 9000.0}}
    kind_of = getattr(transformers, f"{family}ForCausalLM").config_class
    return kind_of(**config, head_dim=HEAD_DIM, rope_parameters=parameters)


def read(config: transformers.PreTrainedConfig, family: str) -> Model:
    fields = Config(config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}, "config.json")
    return family_of(fields).read(fields)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_tables_are_transformers(family, kind):
    config = configuration(family, kind)
    ropes = dict(read(config, family).ropes)
    modeling = importlib.import_module(getattr(transformers, f"{family}ForCausalLM").__module__)
    rotary = getattr(modeling, f"{family}RotaryEmbedding")
    by_type = {"default": FULL, "local": SLIDING} if family in BY_LAYER_TYPE else {"default": None}
    assert set(ropes) <= set(by_type)
    for rope, layer_type in by_type.items():
        variants = ropes[rope]
        assert len(variants) == (2 if kind == "longrope" and rope == "default" else 1)
        assert variants[-1].context == CONTEXT
        for variant in variants:
            positions = torch.arange(variant.context)[None]
            more = () if layer_type is None else (layer_type,)
            expected = [one[0].numpy() for one in rotary(config)(torch.zeros(1), positions, *more)]
            found = variant.rope.rows(0, variant.context)
            for mine, theirs in zip(found, expected, strict=True):
                # Interleaved ropes have every angle twice in a row, others the angles twice over.
                once = theirs[:, ::2] if family.startswith("Cohere") else theirs[:, : mine.shape[1]]
                # A frequency may differ in its last bit (6e-8), which position 2048 makes a phase of 1.2e-4 at most.
                assert np.abs(mine - once).max() < 1.3e-4
                assert np.median(np.abs(mine - once)) == 0


@pytest.mark.parametrize("family", ROPES)
def test_other_ropes_are_refused(family):
    config = configuration(family, "default")
    for kind in ("proportional", *({*DESCRIBED} - {*ROPES[family]})):
        fields = config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}
        changed = {"rope_type": kind, "rope_theta": 10000.0}
        if family == "Phi3" and kind == "yarn":  # its first checkpoints call longrope so
            continue
        fields["rope_parameters"] = {FULL: changed, SLIDING: changed} if family in BY_LAYER_TYPE else changed
        described = Config(fields, "config.json")
        with pytest.raises(Unsupported, match=kind):
            family_of(described).read(described)
