"""Sessions, shares, kept blocks and refusals of the torch executor; a worker told to use it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch_cuts import Cut, Run, tokens_of

from ganglion.agent.executor.choice import ExecutorChoice, kernels_of, parse_executor
from ganglion.agent.executor.prefix_blocks import Begin, Keep
from ganglion.agent.torch_executor.loader import settle
from ganglion.wire.errors import Exhausted, InvalidRequest, ProtocolViolation, Unsupported

TORCH = "torch:cpu:fp32"


def near(found: np.ndarray, true: np.ndarray) -> bool:
    return bool(np.abs(found - true).max() <= 1e-4 * np.abs(true).max())


def test_sessions_of_a_step_do_not_see_each_other(cuts):
    cut: Cut = cuts("gemma2-kv2-tied")
    run, one, two = cut.run(TORCH), tokens_of(cut, 30, 1), tokens_of(cut, 40, 2)
    true = [cut.run(TORCH).sequence(ids, (len(ids),)) for ids in (one, two)]
    first = run.step([(1, 0, 20), (2, 0, 30)], [*one[:20], *two[:30]])
    second = run.step([(2, 30, 10), (1, 20, 10)], [*two[30:], *one[20:]])
    assert near(np.concatenate((first[:20], second[10:])), true[0])
    assert near(np.concatenate((first[20:], second[:10])), true[1])


def test_a_longer_session_keeps_what_it_held(cuts):
    cut: Cut = cuts("llama-kv2")
    ids = tokens_of(cut, 250)
    run = cut.run(TORCH)
    found = [run.sequence(ids, (64, 64, 64, 58), session=1)]
    state = run.executors[0]._ledger.get(1)
    run.executors[0]._ledger.reserve(state, 600)
    found.append(run.step([(1, 240, 10)], ids[240:]))
    assert state.capacity == 1024
    assert near(found[1], found[0][240:])


def test_a_session_is_copied(cuts):
    cut: Cut = cuts("llama-kv2")
    ids = tokens_of(cut, 40)
    run = cut.run(TORCH)
    true = run.sequence(ids, (20, 20))
    (executor,) = run.executors
    executor.copy(1, 2, 0, 25)
    assert near(run.step([(2, 25, 15)], ids[25:]), true[25:])
    with pytest.raises(ProtocolViolation, match="of session 1, which holds 40 tokens"):
        executor.copy(1, 3, 5, 10)


@pytest.mark.parametrize("shape", ["llama-kv2", "olmo2-kv2", "cohere-kv2-tied"])
@pytest.mark.parametrize("fast", [False, True])
def test_shares_add_up(cuts, shape, fast):
    cut: Cut = cuts(shape, "fp32", fast)
    ids = tokens_of(cut, 41)
    true = cut.run("ort").sequence(ids, (16, 1, 24))
    assert near(cut.run(TORCH, (1, 1)).sequence(ids, (16, 1, 24)), true)
    # A share may be torch's and another ONNX Runtime's.
    both = Run(cut, [cut.run(TORCH, (1, 1)).executors[0], cut.run("ort", (1, 1)).executors[1]])
    assert near(both.sequence(ids, (16, 1, 24)), true)


@pytest.mark.parametrize("shape", ["llama-kv2", "olmo2-kv2"])
def test_halves_are_the_whole(cuts, shape):
    cut: Cut = cuts(shape, "fp32", True)
    ids = tokens_of(cut, 60)
    true = cut.run(TORCH).sequence(ids, (30, 30))
    assert near(cut.run(TORCH, (1, 1), overlap=True).sequence(ids, (30, 30), halves=True), true)


def test_stages_hand_on(cuts):
    cut: Cut = cuts("gemma2-kv2-tied")  # hands on both parts: a norm waits for the delta
    ids = tokens_of(cut, 20)
    run, true = cut.run(TORCH), cut.run("ort").sequence(ids, (20,))
    (executor,) = run.executors
    batch = executor.begin([(1, 0, 20)])
    cut.embedding.rows(ids, executor.residual(batch))
    for index in range(executor.segments):
        if index == 2:  # as a later stage would take them
            handed = executor.hand_on(batch)
            assert handed.shape == (20, executor.handed_width)
            executor.take(batch, handed)
        executor.run(batch, index)
    assert near(executor.logits(batch, range(20))[:, : true.shape[1]], true)


def test_kept_blocks_begin_a_session(cuts):
    cut: Cut = cuts("llama-kv2")
    ids = tokens_of(cut, 80)
    run = cut.run(TORCH, prefix_tokens=128)
    true = run.sequence(ids, (64, 16), session=1)
    (executor,) = run.executors
    executor.prepare([Keep(1, 0, (2, 0))], [1], [Begin(5, (2, 0), 80)])
    assert executor.sessions == 1
    assert near(run.step([(5, 64, 16)], ids[64:]), true[64:])
    with pytest.raises(ProtocolViolation, match="block 3 holds nothing"):
        executor.prepare([], [5], [Begin(6, (3,), 80)])
    executor.prepare([], [], [Begin(7, (2,), 80)])
    with pytest.raises(ProtocolViolation, match="block 4; the plan has 4"):
        executor.prepare([Keep(7, 0, (4,))], [], [])


def test_limits(cuts):
    cut: Cut = cuts("llama-kv2")
    run = cut.run(TORCH, sessions=2, kv_tokens=1024)
    (executor,) = run.executors
    with pytest.raises(ProtocolViolation, match="begins at token 3"):
        executor.begin([(1, 3, 1)])
    with pytest.raises(ProtocolViolation, match="at most 64 rows"):
        executor.begin([(1, 0, 65)])
    executor.begin([(1, 0, 4)])
    with pytest.raises(ProtocolViolation, match="on 4 held tokens"):
        executor.begin([(1, 5, 1)])
    executor.begin([(2, 0, 4)])
    assert executor.kv_bytes > 0
    with pytest.raises(Exhausted, match="the plan allows 2"):
        executor.begin([(3, 0, 1)])
    executor.close(1)
    executor.close(2)
    assert executor.kv_bytes == executor.sessions == 0


def test_a_class_of_its_own(cuts):
    assert cuts("llama-kv2").run("ort").executors[0].class_name == "fp32-exact"
    assert cuts("llama-kv2").run("torch:cpu:bf16").executors[0].class_name == "fp32-fast@torch-cpu-bf16"


def test_what_can_be_said():
    assert parse_executor("ort") == ExecutorChoice()
    assert parse_executor("torch") == ExecutorChoice("torch")
    assert parse_executor("torch:cuda") == ExecutorChoice("torch", "cuda")
    assert parse_executor("torch:fp16") == ExecutorChoice("torch", "", "fp16")
    assert parse_executor("torch:cpu:bf16").text == "torch:cpu:bf16"
    assert kernels_of(parse_executor("ort")) == ""
    assert kernels_of(parse_executor("torch:cpu:bf16")) == f"torch {importlib.metadata.version('torch')} cpu bf16"
    for wrong in ("", "jax", "ort:cpu", "torch:bf16:cpu", "torch:", "torch:cpu:bf16:x", "torch:tpu"):
        with pytest.raises(InvalidRequest, match="--executor"):
            parse_executor(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_no_such_device_is_said(cuts):
    with pytest.raises(Unsupported, match=r"finds no CUDA device here; use torch:cpu, or ort"):
        cuts("llama-kv2").run("torch:cuda")
    assert settle(parse_executor("torch"), 1).name == "torch-cpu-fp32"


def test_no_torch_is_said(cuts, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: importlib.metadata.distribution("no-such").version)
    with pytest.raises(Unsupported, match=r"torch is not installed here; install ganglion-ai\[torch\]"):
        cuts("llama-kv2").run(TORCH)


def test_a_worker_does_not_load_torch_unasked():
    said = "import sys, ganglion.agent.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], check=False, timeout=60).returncode == 0
