"""A shard whose experts are on disk computes the bits of one that holds them all."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch_cuts
from mixture_shapes import Shape
from torch_cuts import Cut, Run, cutter, tokens_of

from ganglion.agent.executor.executor import Executor
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.executor.prepacked import Prepacked
from ganglion.wire.errors import DoesNotFit, Unsupported
from ganglion.wire.nouns import Stage

SHAPES = {
    "qwen": Shape(
        "Qwen3Moe",
        {
            "hidden_size": 128,
            "head_dim": 32,
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 4,
            "mlp_only_layers": [1],
        },
    ),
    "deepseek": Shape(
        "DeepseekV2",
        {
            "hidden_size": 128,
            "num_key_value_heads": 4,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 96,
            "kv_lora_rank": 24,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "num_hidden_layers": 3,
        },
    ),
    "gpt-oss": Shape(
        "GptOss",
        {
            "hidden_size": 128,
            "head_dim": 16,
            "intermediate_size": 96,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
        },
    ),
}


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_cuts, "MIXTURES", SHAPES)
        yield cutter(tmp_path_factory.mktemp)


def paged(cut: Cut, memory_bytes: int, *, keep: bool = False) -> Run:
    """An executor with so much memory for experts; `keep`: its parts stay in the store."""
    start_runtime(1)
    plan = cut.plan()
    (stage,) = plan.stages
    share = msgspec.structs.replace(stage.shares[0], expert_cache_bytes=memory_bytes)
    stage = Stage(layers=stage.layers, shares=(share,), topology=stage.topology)
    prepacked = Prepacked(cut.store, least_bytes=0) if keep else None
    cut.opened += 1
    shard = load_shard(
        cut.manifest,
        stage,
        share,
        open_piece=cut.store.open,
        folder=cut.folder / f"x{cut.opened}",
        progress=lambda done, total: None,
        prepacked=prepacked,
    )
    assert not list((cut.folder / f"x{cut.opened}").iterdir())
    if prepacked is not None:
        prepacked.keep()
        prepacked.close()
    return Run(cut, [Executor(cut.manifest, plan, shard, cut.store.open)])


def pager_of(run: Run):
    return run.executors[0]._pager


def needed(cut: Cut, share: float) -> int:
    """Bytes with which so great a share of the experts are in memory."""
    pager = pager_of(run := paged(cut, 1 << 40))
    layers = pager._layers
    every = sum(one.layout.experts for one in layers) * max(one.index.record_bytes for one in layers)
    pager.close()
    del run
    return sum(one.resident_bytes for one in layers) + int(share * every)


@pytest.mark.parametrize(
    ("shape", "weights", "fast"),
    [
        ("qwen", "fp32", False),
        ("qwen", "int8", False),
        ("qwen", "int4", True),
        ("deepseek", "int8", False),
        ("gpt-oss", "int8", True),
    ],
)
def test_the_same_logits_as_with_all_in_memory(cuts, shape: str, weights: str, fast: bool) -> None:
    cut = cuts(shape, weights, fast, "whole")
    ids = tokens_of(cut, 30)
    chunks = [13, 1, 1, 5, 1, 1, 1, 7]
    expected = cut.run("ort").sequence(ids, chunks)
    run = paged(cut, needed(cut, 0.4))
    try:
        assert np.array_equal(run.sequence(ids, chunks), expected)
        counts = pager_of(run).counts
        assert counts.misses > 10
        assert counts.read_bytes > 10 * pager_of(run)._layers[0].index.record_bytes // 2
    finally:
        pager_of(run).close()


def test_the_next_layers_router_is_asked_and_judged(cuts) -> None:
    cut = cuts("qwen", "int8", False, "whole")
    run = paged(cut, needed(cut, 0.6))
    try:
        run.sequence(tokens_of(cut, 40), [1] * 40)
        precision = dict(zip(("recent", "frequent", "path", "router"), pager_of(run).precision, strict=True))
        assert precision["router"] > 0.35  # by chance 0.25: 2 of 8
    finally:
        pager_of(run).close()


def test_parts_are_kept_and_found_again(cuts) -> None:
    cut = cuts("qwen", "int8", False, "whole")
    ids = tokens_of(cut, 12)
    memory = needed(cut, 0.5)
    found, opened = [], []
    for _ in range(2):
        run = paged(cut, memory, keep=True)
        parts = sorted(path for path in (cut.store.path / "prepacked").glob("*/experts.bin"))
        opened.append([(path, path.stat().st_ino) for path in parts])
        found.append(run.sequence(ids, [12]))
        pager_of(run).close()
    assert len(opened[0]) == 3  # of four layers one is dense
    assert opened[0] == opened[1]
    assert np.array_equal(*found)
    # One that was cut short is made again.
    with opened[0][0][0].open("r+b") as file:
        file.truncate(4096)
    run = paged(cut, memory, keep=True)
    assert np.array_equal(run.sequence(ids, [12]), found[0])
    pager_of(run).close()


def test_too_little_memory_is_refused_with_what_would_do(cuts) -> None:
    cut = cuts("qwen", "int8", False, "whole")
    with pytest.raises(DoesNotFit, match=r"--expert-memory must be at least \d+ bytes"):
        paged(cut, 4096)


def test_experts_smaller_than_pages_are_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"hidden_size": 32, "head_dim": 16, "moe_intermediate_size": 8, "num_experts": 4}
        tiny = Shape("Qwen3Moe", sizes | {"num_experts_per_tok": 2})
        patch.setattr(torch_cuts, "MIXTURES", {"tiny": tiny})
        cut = cutter(tmp_path_factory.mktemp)("tiny", "fp32", False, "whole")
    with pytest.raises(Unsupported, match="too small to be paged"):
        paged(cut, 1 << 20)
