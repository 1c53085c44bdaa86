"""Models of the families' shapes, cut once for all tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch_cuts import Cut, cutter


@pytest.fixture(scope="session")
def cuts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cut]:
    return cutter(tmp_path_factory.mktemp)
