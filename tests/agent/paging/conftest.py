"""Layers of experts on disk, in each format."""

from __future__ import annotations

from typing import Any

import pytest
from paging_graphs import Layers, Shape, make_layers


@pytest.fixture(scope="session", params=[0, 4, 8], ids=["fp32", "int4", "int8"])
def layers(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Layers:
    return make_layers(Shape(request.param), tmp_path_factory.mktemp("experts"), 4)
