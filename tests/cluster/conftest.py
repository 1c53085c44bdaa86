"""Small random checkpoints and clusters for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make_llama
from cluster.harness import Cluster, until

# Nothing ends an answer but its length: a request can be made as long as a test needs.
SHAPE = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "max_position_embeddings": 4096,
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights, four key-value heads."""
    return make_llama(tmp_path_factory.mktemp("checkpoint") / "tiny", seed=3, **SHAPE)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """An empty cluster; its processes are killed whatever the test does."""
    with Cluster(tmp_path / "cluster") as made:
        yield made


def start_three(made: Cluster, *coordinator_options: str) -> None:
    """Coordinator, agents one, two and three, and a gateway."""
    made.coordinator(*coordinator_options)
    made.join("one", "two", "three")
    made.gateway()
    until("three devices alive", lambda: made.alive() == ["one", "three", "two"])
