"""Head dimensions above 128 in exact classes: bits do not depend on chunks, around the sizes where kernels change."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import make
from reference_runner import Runner, cut_evenly

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.graphs import attention as graph
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import Unsupported
from ganglion.wire.nouns import to_json

TOKENS = 280
EDGES = [16, 32, 33, 63, 64, 65, 66, 127, 128, 129, 130, 255, 256, 257]
WIDE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 70,
}
CASES = {
    "144": ("Gemma3", {"head_dim": 144}),
    "192-softcap": ("Gemma2", {"head_dim": 192, "attn_logit_softcapping": 2.0}),
    "256": ("Gemma3", {"head_dim": 256}),
    "256-short-window": ("Gemma2", {"head_dim": 256, "attn_logit_softcapping": None, "sliding_window": 20}),
}
ON_TWO_THREADS = """
import hashlib, json, sys
from pathlib import Path
from reference_runner import Runner, cut_evenly
from ganglion.partitioner.graphs import attention as graph
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, from_json
given = json.load(sys.stdin)
manifest = from_json(Manifest, given["manifest"], limit_bytes=MANIFEST_BYTES)
pieces, shares = DirectorySink(Path(given["pieces"])), cut_evenly(manifest, (2, 1))
runner = Runner(manifest, pieces, Path(given["folder"]), shares, threads=2)
logits, hidden = runner.forward(given["ids"], given["chunks"])
print(hashlib.sha256(hidden.tobytes() + logits.tobytes()).hexdigest())
"""


def chunkings(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    found = [[edge, 1, TOKENS - edge - 1] for edge in rng.choice(EDGES, 4, replace=False).tolist()]
    for _ in range(2):
        chunks: list[int] = []
        while sum(chunks) < TOKENS:
            chunks.append(min(int(rng.choice([1, 2, 3, 7, 31, 64, 66, 100])), TOKENS - sum(chunks)))
        found.append(chunks)
    return [*found, [1] * 70 + [TOKENS - 70]]


@pytest.mark.parametrize("case", CASES)
def test_any_chunking_is_bit_equal_on_one_thread_and_on_two(case, tmp_path):
    family, config = CASES[case]
    path = make(tmp_path / "checkpoint", family, **(WIDE | config))
    sink = DirectorySink(tmp_path / "pieces")
    manifest = partition(path, sink, name="m", numeric_class=numeric_class(path, "fp32"))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 283, TOKENS)]
    runner = Runner(manifest, sink, tmp_path / "one", cut_evenly(manifest, (1,)))
    logits, hidden = runner.forward(ids)
    tried = chunkings(sorted(CASES).index(case))
    for chunks in tried:
        found = runner.forward(ids, chunks)
        assert np.array_equal(found[1], hidden), chunks
        assert np.array_equal(found[0], logits), chunks
    if not case.startswith("256"):
        return
    given = {"manifest": to_json(manifest).decode(), "pieces": str(sink.path), "folder": str(tmp_path / "two")}
    run = subprocess.run(
        [sys.executable, "-c", ON_TWO_THREADS],
        input=json.dumps(given | {"ids": ids, "chunks": tried[-1]}),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.strip() == hashlib.sha256(hidden.tobytes() + logits.tobytes()).hexdigest()


def test_a_context_too_short_for_the_padding_is_refused(tmp_path):
    path = make(tmp_path / "checkpoint", "Gemma3", **(WIDE | {"head_dim": 144, "max_position_embeddings": 60}))
    sink = DirectorySink(tmp_path / "pieces")
    with pytest.raises(Unsupported, match="a context of 60 tokens; at head dimension 144 exact classes need 66"):
        partition(path, sink, name="m", numeric_class=numeric_class(path, "fp32"))
    fast = numeric_class(path, "fp32", fast=True)
    assert partition(path, sink, name="m", numeric_class=fast).geometry.head_dim == 144


def test_without_the_padding_chunks_would_be_seen(tmp_path, monkeypatch):
    """The comparison above can fail: at the first 64 positions queries and keys are multiplied in other blocks."""
    monkeypatch.setattr(graph, "EXACT_POSITIONS", 1)
    path = make(tmp_path / "checkpoint", "Gemma2", **(WIDE | {"head_dim": 256}))
    sink = DirectorySink(tmp_path / "pieces")
    manifest = partition(path, sink, name="m", numeric_class=numeric_class(path, "fp32"))
    ids = [int(i) for i in np.random.default_rng(1).integers(0, 283, 100)]
    runner = Runner(manifest, sink, tmp_path / "one", cut_evenly(manifest, (1,)))
    assert not np.array_equal(runner.forward(ids)[1], runner.forward(ids, [30, 70])[1])
