"""A target's first layers as a drafter: against transformers' model of so many layers, and against the dumb runner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.speculation.early import early_layers, early_shard
from ganglion.agent.speculation.engine import Ask, DraftEngine, draft_plan
from ganglion.agent.store import needed_pieces
from ganglion.agent.store.needs import all_pieces
from ganglion.wire.errors import InvalidDocument, Unsupported
from ganglion.wire.nouns import Manifest, from_json, to_json
from ganglion.wire.sampling.parameters import Sampling

IDS = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33]
GREEDY = Sampling()


@pytest.mark.parametrize(
    ("shape", "layers"), [("llama", 1), ("llama", 2), ("cohere-kv2-tied", 2), ("granite-kv2", 1), ("gpt-oss", 1)]
)
def test_early_layers_are_the_model_of_so_many_layers(model, shape, layers):
    cut = model(shape)
    early = early_layers(cut.manifest, layers)
    reference = AutoModelForCausalLM.from_pretrained(cut.path, dtype=torch.float32).eval()
    reference.model.layers = reference.model.layers[:layers]
    with torch.no_grad():
        expected = reference(torch.tensor([IDS]), use_cache=False).logits[0, -1].numpy()
    found = cut.logits(IDS, early)
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-4
    assert np.abs(found - cut.logits(IDS)).max() / np.abs(expected).max() > 1e-2


def test_the_manifest_names_the_same_pieces_and_no_others(model):
    cut = model("llama", "mixed")
    early = early_layers(cut.manifest, 2)
    assert from_json(Manifest, to_json(early), limit_bytes=1 << 24) == early
    assert (early.name, len(early.layers), len(early.prompt_layers)) == ("llama-early-2", 2, 2)
    assert early.geometry.layers == 2
    assert set(all_pieces(early)) < set(all_pieces(cut.manifest))
    plan = draft_plan(early, slots=1, context=64)
    assert set(needed_pieces(early, plan, plan.lead)) <= set(all_pieces(early))
    one, two = (early_layers(cut.manifest, layers).parameters for layers in (1, 2))
    assert 0 < one < two < cut.manifest.parameters
    assert two - one == pytest.approx(cut.manifest.parameters - two, abs=2)


def test_they_run_on_the_shard_that_is_loaded_already(model, tmp_path):
    cut = model("llama", "int4")
    start_runtime(1)
    plan = draft_plan(cut.manifest, slots=2, context=128)
    (stage,) = plan.stages
    shard = load_shard(
        cut.manifest,
        stage,
        stage.shares[0],
        open_piece=cut.store.open,
        folder=tmp_path / "run",
        progress=lambda done, total: None,
    )
    embedding = EmbeddingTable(cut.manifest, cut.store.open)
    whole = DraftEngine(cut.manifest, shard, cut.store.open, embedding, slots=2, context=128)
    early = early_layers(cut.manifest, 2)
    part = DraftEngine(early, early_shard(shard, early), cut.store.open, embedding, slots=2, context=128)
    text = list(IDS)
    for _ in range(6):  # one after the other, on the same graphs
        (own,), (guess,) = (one.step([Ask(1, text, GREEDY)]) for one in (whole, part))
        assert own.tokens == (cut.draw(text, GREEDY),)
        assert guess.tokens == (cut.draw(text, GREEDY, manifest=early),)
        text += own.tokens
    with pytest.raises(InvalidDocument, match="a part of it"):
        DraftEngine(cut.manifest, early_shard(shard, early), cut.store.open, embedding, slots=2, context=128)


@pytest.mark.parametrize("shape", ["gemma2-kv2-tied", "olmo2-kv2"])
def test_families_whose_head_belongs_to_the_last_layer_are_refused(model, shape):
    manifest = model(shape).manifest
    with pytest.raises(Unsupported, match=f"family {manifest.family} the head begins with the norm") as refused:
        early_layers(manifest, 1)
    assert refused.value.param == "layers"


def test_none_and_all_of_the_layers_are_refused(model):
    for layers in (-1, 0, 3, 4):
        with pytest.raises(Unsupported, match=f"{layers} of 3; use 1 to 2"):
            early_layers(model("llama").manifest, layers)
