"""Checkpoints of the table's shapes, cut and run by transformers once per session."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from checkpoints import make
from cut_models import ShapedModels
from family_shapes import SHAPES
from transformers import GenerationConfig


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> ShapedModels:
    models = ShapedModels.in_table(
        SHAPES,
        tmp_path_factory.mktemp("families"),
        lambda name, path: make(path, SHAPES[name].family, dtype=SHAPES[name].dtype, **SHAPES[name].config),
        attn_implementation="eager",  # others leave out soft caps
    )

    @cache
    def reference(name: str) -> torch.nn.Module:
        model = models.reference(name)
        model.generation_config = GenerationConfig()  # with no token that ends a text
        return model

    return replace(models, reference=reference)
