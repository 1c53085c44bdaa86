"""The text of a model that also sees: cut as if it had been saved alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import TINY, write_tokenizer
from reference_runner import Runner, cut_evenly
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

from ganglion.partitioner import cut
from ganglion.partitioner.config import Config
from ganglion.partitioner.families.text_part import text_part, text_tensors
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import InvalidDocument


def test_the_text_of_gemma3_equals_transformers(tmp_path):
    text = TINY | {"head_dim": 16, "sliding_window": 8, "pad_token_id": None, "tie_word_embeddings": True}
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=282)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.2 if "norm" in name else 1.5 / weight.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path / "checkpoint")
    write_tokenizer(tmp_path / "checkpoint")
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 256, 40)]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    sink = DirectorySink(tmp_path / "pieces")
    chosen = cut.numeric_class(tmp_path / "checkpoint", "fp32")
    manifest = cut.partition(tmp_path / "checkpoint", sink, name="m", numeric_class=chosen)
    logits, _ = Runner(manifest, sink, tmp_path / "run", cut_evenly(manifest, (2, 1))).forward(ids, [13, 27])
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert (logits.argmax(1) == expected.argmax(1)).all()


def test_other_configurations_stay_as_they_are():
    plain = Config({"architectures": ["LlamaForCausalLM"]}, "config.json")
    assert text_part(plain) is plain
    assert text_tensors(plain, {"language_model.x": None}) == {"language_model.x": None}
    with pytest.raises(InvalidDocument, match="without a text_config"):
        text_part(Config({"architectures": ["Gemma3ForConditionalGeneration"]}, "config.json"))
