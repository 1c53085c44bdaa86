"""A worker whose experts are on disk answers the tokens of one that holds them all."""

from __future__ import annotations

import functools

import msgspec
import pytest
from checkpoints import make

from ganglion.agent.store import PieceStore
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.wire.errors import GanglionError
from ganglion.wire.nouns import Plan, Stage
from ganglion.wire.shares import every_expert

PROMPT = [72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100, 33, 10, 84, 104, 101, 32, 99, 97, 116]
CONFIG = {
    "hidden_size": 128,
    "head_dim": 32,
    "moe_intermediate_size": 96,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "norm_topk_prob": True,
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, model_class) -> object:
    folder = tmp_path_factory.mktemp("mixture")
    path = make(folder / "checkpoint", "Qwen3Moe", **CONFIG)
    (folder / "store").mkdir(mode=0o700)
    kind = numeric_class(path, "int8")
    manifest = partition(path, PieceStore(folder / "store"), name="mixture", numeric_class=kind, experts="whole")
    return model_class(path, manifest, folder / "store", folder)


def with_experts(plan: Plan, manifest, cache_bytes: int) -> Plan:
    """Whole experts, all on the only device, with so much memory for them."""
    (stage,) = plan.stages
    experts = every_expert(manifest.layers)
    share = msgspec.structs.replace(stage.shares[0], experts=experts, expert_cache_bytes=cache_bytes)
    return msgspec.structs.replace(plan, stages=(Stage(layers=stage.layers, shares=(share,), topology="mesh"),))


async def test_the_same_tokens_as_with_all_in_memory(cluster, mixture):
    expected = mixture.runner.greedy(PROMPT, 24)
    assert len(set(expected)) > 1
    for cache_bytes in (0, 700_000, 380_000):
        change = functools.partial(with_experts, manifest=mixture.manifest, cache_bytes=cache_bytes)
        running = await cluster(mixture, [[1]], change=change)
        assert await running.tokens(PROMPT, 24) == expected
        sampled = await running.tokens(PROMPT, 12, temperature=1.0, seed=5)
        pager = running.workers[0]._loaded.pager
        if not cache_bytes:
            without = sampled
            assert pager is None
            continue
        assert sampled == without
        assert pager.slots < 4 * 8
        assert pager.counts.misses > 20


async def test_a_part_that_rots_ends_the_request_and_is_named(cluster, mixture):
    change = functools.partial(with_experts, manifest=mixture.manifest, cache_bytes=380_000)
    running = await cluster(mixture, [[1]], change=change)
    pager = running.workers[0]._loaded.pager
    await running.tokens(PROMPT, 2)
    for layer in pager._layers:
        sums = tuple(one ^ 1 for one in layer.index.sums)
        layer.index = msgspec.structs.replace(layer.index, sums=sums)
    with pytest.raises(GanglionError, match=r"expert \d+ in experts.bin is not what was written"):
        await running.tokens(PROMPT[::-1], 8)
