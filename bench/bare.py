"""The bare ONNX Runtime loop over a cut model's own graphs: no agent, no lane, no sampler but an argmax.

It is what `bench/spine.py` compares the whole stack with: same graphs, same weights, same rows, pre-bound buffers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is loaded

import numpy as np
import onnxruntime as ort

from ganglion.agent.store import PieceStore
from ganglion.wire.limits import MANIFEST_BYTES
from ganglion.wire.nouns import WEIGHTS_FILE, Manifest, PieceRef, Range, Segment, from_json
from ganglion.wire.shares import write_weights

PieceFile = Callable[[str], Path]


class Bare:
    """All segments of `manifest` on one device; `step(id, position)` gives the next greedy id.

    `context`: rows of the key-value buffers. Weights are put together under `folder`.
    """

    def __init__(self, manifest: Manifest, piece: PieceFile, folder: Path, *, context: int) -> None:
        self.manifest, self._piece_file = manifest, piece
        g, exact = manifest.geometry, manifest.numeric_class.exact
        wide: type[np.floating[Any]] = np.float64 if exact else np.float32
        self._residual = [self._value((1, g.hidden), np.float32) for _ in range(2)]
        self._delta = [self._value((1, g.hidden), wide) for _ in range(2)]
        self._seqlens = self._value((1,), np.int32)
        self._total = self._value((1,), np.int32)
        half = g.head_dim // 2
        self._cos = self._table(manifest.ropes["default"][0].cos, context + 2, half)
        self._sin = self._table(manifest.ropes["default"][0].sin, context + 2, half)
        self._logits = self._value((1, g.vocab_groups * g.vocab_group_rows), np.float32)
        self._runs: list[tuple[ort.InferenceSession, Any]] = []
        flip = 0
        for number, layer in enumerate(manifest.layers):
            for half_number, segment in enumerate(layer.segments):
                values = {
                    "res": self._residual[flip][1],
                    "delta": self._delta[flip][1],
                    "res_out": self._residual[1 - flip][1],
                    "partial": self._delta[1 - flip][1],
                }
                if segment.attends:
                    for name in ("key", "value"):
                        cache = self._value((1, g.head_groups, context + 2, g.head_dim), np.float32)[1]
                        values |= {f"past_{name}": cache, f"present_{name}": cache}
                    values |= {"seqlens_k": self._seqlens[1], "total": self._total[1]}
                    values |= {"cos": self._cos[1], "sin": self._sin[1]}
                self._bind(self._open(folder / f"{number}-{half_number}", segment), values)
                flip = 1 - flip
        values = {"res": self._residual[flip][1], "delta": self._delta[flip][1], "logits": self._logits[1]}
        self._bind(self._open(folder / "head", manifest.head), values)
        stored = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[manifest.embedding.dtype]
        self._embedding = [
            np.memmap(piece(ref.digest), stored, "r", shape=(g.vocab_group_rows, g.hidden))
            for ref in manifest.embedding.pieces
        ]

    def _bind(self, sessions: list[ort.InferenceSession], values: dict[str, Any]) -> None:
        """Bind a segment's graphs to `values` by name; rows between them get buffers of their own."""
        for session in sessions:
            binding = session.io_binding()
            for one in session.get_outputs():
                if one.name not in values:
                    values[one.name] = self._value((1, one.shape[-1]), np.float32)[1]
                binding.bind_ortvalue_output(one.name, values[one.name])
            for one in session.get_inputs():
                binding.bind_ortvalue_input(one.name, values[one.name])
            self._runs.append((session, binding))

    def step(self, token: int, position: int) -> int:
        """Run one token at `position`; returns the greedy next id."""
        g = self.manifest.geometry
        row = self._embedding[token // g.vocab_group_rows][token % g.vocab_group_rows]
        if row.dtype == np.uint16:
            row = (row.astype(np.uint32) << 16).view(np.float32)
        self._residual[0][0][:] = row
        self._delta[0][0][:] = 0
        self._total[0][0] = position + 1
        self._seqlens[0][0] = position
        for session, binding in self._runs:
            session.run_with_iobinding(binding)
        return int(self._logits[0][0, : g.vocab].argmax())

    def decode(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Prompt token by token, then `count` greedy tokens: (ids, seconds of each)."""
        token = 0
        for position, token_in in enumerate(prompt):
            token = self.step(token_in, position)
        ids, seconds = [token], []
        for position in range(len(prompt), len(prompt) + count - 1):
            started = time.perf_counter()
            ids.append(self.step(ids[-1], position))
            seconds.append(time.perf_counter() - started)
        return ids, seconds

    @staticmethod
    def _value(shape: tuple[int, ...], dtype: type[Any]) -> tuple[np.ndarray[Any, Any], ort.OrtValue]:
        array = np.zeros(shape, dtype)
        return array, ort.OrtValue.ortvalue_from_numpy(array)

    def _table(self, ref: PieceRef, rows: int, columns: int) -> tuple[np.ndarray[Any, Any], ort.OrtValue]:
        table = np.memmap(self._piece_file(ref.digest), np.float32, "r").reshape(-1, columns)[:rows]
        array = np.ascontiguousarray(table)
        return array, ort.OrtValue.ortvalue_from_numpy(array)

    def _open(self, folder: Path, segment: Segment) -> list[ort.InferenceSession]:
        folder.mkdir(parents=True, exist_ok=True)
        weights = folder / WEIGHTS_FILE
        with weights.open("wb") as file:
            write_weights(
                segment, Range(0, segment.groups), lambda digest: memoryview(np.memmap(self._piece_file(digest))), file
            )
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        found = []
        for number, piece in enumerate(self.manifest.graphs[f"{segment.kind}/{segment.groups}"]):
            graph = folder / f"{number}.onnx"
            graph.write_bytes(self._piece_file(piece.digest).read_bytes())
            found.append(ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]))
        return found


def main() -> None:
    """Print the mean ms per token of a greedy run over a cut model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("store", type=Path, help="the store folder of the agent that holds the pieces")
    parser.add_argument("folder", type=Path, help="where weights are put together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    chosen = parser.parse_args()
    ort.set_global_thread_pool_sizes(chosen.threads, 1)
    manifest = from_json(Manifest, chosen.manifest.read_bytes(), limit_bytes=MANIFEST_BYTES)
    bare = Bare(manifest, PieceStore(chosen.store).path_of, chosen.folder, context=512)
    bare.decode([1, 2, 3], 8)
    _, seconds = bare.decode([5, 17, 3, 200, 41, 99, 7, 12], chosen.tokens)
    print(statistics.fmean(seconds) * 1e3)


if __name__ == "__main__":
    main()
