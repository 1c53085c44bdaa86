"""Cutting: deterministic, a group at a time, pieces as the store keeps them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import onnx
import pytest
from checkpoints import make_llama

from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.families.model import largest_block
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.errors import InvalidRequest, Unsupported
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import Manifest, NumericClass, PieceRef, Range, from_json, to_json
from ganglion.wire.shares import weights_size

CUT = """
import sys
from pathlib import Path
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import to_json
source = Path(sys.argv[1])
manifest = partition(source, DirectorySink(Path(sys.argv[2])), name="m", numeric_class=numeric_class(source, "int4"))
sys.stdout.buffer.write(to_json(manifest))
"""


def all_pieces(manifest: Manifest) -> set[str]:
    segments = [segment for layer in manifest.layers for segment in layer.segments] + [manifest.head]
    refs = [piece for segment in segments for slot in segment.slots for piece in slot.pieces]
    refs += manifest.embedding.pieces
    refs += [one for tables in manifest.ropes.values() for table in tables for one in (table.cos, table.sin)]
    refs += [*(one for graphs in manifest.graphs.values() for one in graphs), *manifest.tokenizer.values()]
    return {ref.digest for ref in refs}


def test_equal_inputs_give_equal_digests_in_any_process(models, tmp_path):
    source = models.checkpoint("llama-kv3-llama31")
    manifests, stored = [], []
    for seed in ("1", "2"):
        pieces = tmp_path / seed
        run = subprocess.run(
            [sys.executable, "-c", CUT, str(source), str(pieces)],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            timeout=120,
            check=True,
        )
        manifests.append(run.stdout)
        stored.append(sorted(str(p.relative_to(pieces)) for p in pieces.rglob("*") if p.is_file()))
    assert manifests[0] == manifests[1]
    assert stored[0] == stored[1]
    manifest = from_json(Manifest, manifests[0], limit_bytes=MANIFEST_BYTES)
    assert to_json(manifest) == manifests[0]
    assert {path.split("/")[1] for path in stored[0]} == all_pieces(manifest)
    for path in stored[0]:
        assert hashlib.sha256((tmp_path / "1" / path).read_bytes()).hexdigest() == path.split("/")[1]


def test_another_weight_or_class_gives_other_digests(tmp_path):
    sink = DirectorySink(tmp_path / "pieces")
    digests = set()
    for seed in (1, 2):
        path = make_llama(tmp_path / str(seed), seed=seed)
        for fast in (False, True):
            manifest = partition(path, sink, name="m", numeric_class=numeric_class(path, "fp32", fast=fast))
            digests.add(hashlib.sha256(to_json(manifest)).hexdigest())
    assert len(digests) == 4


def test_what_the_manifest_says_of_the_model(models):
    manifest = models.cut("llama-kv2", "fp32").manifest
    g = manifest.geometry
    assert (g.hidden, g.heads, g.kv_heads, g.head_dim, g.vocab, g.context) == (64, 4, 2, 16, 283, 256)
    assert (g.head_groups, g.column_groups, g.vocab_groups, g.vocab_group_rows) == (2, 16, 9, 32)
    assert manifest.bos_id == 256
    assert manifest.eos_ids == (257,)
    assert set(manifest.tokenizer) >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert manifest.parameters == sum(p.numel() for p in models.reference("llama-kv2").parameters())
    tied = models.cut("llama-kv1-tied", "fp32").manifest
    assert tied.parameters == sum(p.numel() for p in models.reference("llama-kv1-tied").parameters())
    # A tied float32 embedding is stored once: the head is cut from the same rows.
    assert tied.embedding.pieces == tied.head.slots[1].pieces


@pytest.mark.parametrize("shape", ["llama-kv4-biases", "qwen3-kv2"])
@pytest.mark.parametrize("weight_format", ["fp32", "int4"])
@pytest.mark.parametrize("fast", [False, True], ids=["exact", "fast"])
def test_every_graph_is_valid_and_its_weights_lie_inside_the_file(shape, weight_format, fast, models):
    cut = models.cut(shape, weight_format, fast)
    segments = {segment.kind: segment for segment in (*cut.manifest.layers[0].segments, cut.manifest.head)}
    counts = {kind: range(kind == "head", segment.groups + 1) for kind, segment in segments.items()}
    assert set(cut.manifest.graphs) == {f"{kind}/{count}" for kind, some in counts.items() for count in some}
    for name, refs in cut.manifest.graphs.items():
        kind, count = name.split("/")
        assert len(refs) == (3 if segments[kind].attends and count != "0" else 1)
        covered = 0
        for ref in refs:
            model = onnx.load_from_string(cut.pieces.file(ref.digest).read_bytes())
            assert model.opset_import[0].version == cut.manifest.opset
            for tensor in model.graph.initializer:
                if tensor.data_location == onnx.TensorProto.EXTERNAL:
                    where = {entry.key: entry.value for entry in tensor.external_data}
                    assert where["location"] == "weights.bin"
                    assert int(where["offset"]) % 4 == 0
                    covered += int(where["length"])
        size = weights_size(segments[kind], Range(0, int(count)))
        assert covered == size or (count == "0" and 0 < covered <= size), name


def test_progress_is_bytes_and_reaches_the_end(models, tmp_path):
    seen: list[tuple[int, int]] = []
    path = models.checkpoint("qwen3-kv3-tied")
    chosen = numeric_class(path, "fp32")
    partition(
        path,
        DirectorySink(tmp_path),
        name="m",
        numeric_class=chosen,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > 0


def test_memory_is_bounded_by_a_group(tmp_path):
    path = make_llama(tmp_path / "m", hidden_size=256, intermediate_size=16384, num_hidden_layers=1, vocab_size=8192)

    class Nowhere:
        def put(self, buffer: bytes | memoryview, /) -> PieceRef:
            return PieceRef(hashlib.sha256(buffer).hexdigest(), memoryview(buffer).nbytes)

    chosen = numeric_class(path, "int4")
    partition(path, Nowhere(), name="m", numeric_class=chosen)
    tracemalloc.start()
    partition(path, Nowhere(), name="m", numeric_class=chosen)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    matrix_bytes = 256 * 16384 * 4
    assert peak < matrix_bytes / 2


def test_classes(models, tmp_path):
    path = models.checkpoint("qwen3-kv2")
    assert numeric_class(path, "fp32").name == "fp32-exact"
    assert numeric_class(path, "int4").name == "int4-32-exact"
    assert numeric_class(path, "int4", fast=True).name == "int4-64-fast"  # 2 heads of 32 a group
    assert [largest_block(n, 128) for n in (16, 48, 96, 64, 640)] == [16, 16, 32, 64, 128]
    with pytest.raises(Unsupported, match="fp8"):
        numeric_class(path, "fp8")  # type: ignore[arg-type]
    sink = DirectorySink(tmp_path)
    with pytest.raises(Unsupported, match=r"block 128 does not divide the 64 inputs .* use block 64"):
        partition(path, sink, name="m", numeric_class=NumericClass(format="int4", block=128, exact=False))
    with pytest.raises(InvalidRequest, match="fp32 has none"):
        partition(path, sink, name="m", numeric_class=NumericClass(format="fp32", block=32, exact=True))


def test_the_directory_sink_stores_once_and_leaves_nothing_behind(tmp_path):
    sink = DirectorySink(tmp_path)
    first = sink.put(b"abc")
    assert first == sink.put(memoryview(np.frombuffer(b"abc", np.uint8)))
    assert first.digest == hashlib.sha256(b"abc").hexdigest()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files == [tmp_path / first.digest[:2] / first.digest]
