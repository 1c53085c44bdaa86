"""Random mixtures, cut and run by transformers once per session."""

from __future__ import annotations

import pytest
from cut_models import ShapedModels
from mixture_shapes import SHAPES, make_mixture


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> ShapedModels:
    return ShapedModels.in_table(
        SHAPES,
        tmp_path_factory.mktemp("mixtures"),
        lambda name, path: make_mixture(path, SHAPES[name]),
        attn_implementation="eager",  # others have no sinks
        experts_implementation="eager",  # others want sizes in multiples of 4
    )
