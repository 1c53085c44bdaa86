"""The bare ONNX Runtime loop over a cut model's own graphs: no agent, no lane, no sampler but an argmax.

It is what `bench/fast.py` compares the whole stack with: same graphs, same weights, same rows, pre-bound buffers. A
share of the model without any exchange is the ceiling of what splitting it can give; its tokens mean nothing. `rows`
tokens at a time are what a window of drafted tokens costs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
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
from ganglion.wire.shares import weights_size, write_weights

PieceFile = Callable[[str], Path]
PROMPT = "5,17,3,200,41,99,7,12"


class Bare:
    """The segments of `manifest`, or part `share` = (index, of) of each; `step(ids, position)` gives the next id.

    `context`: positions of the key-value buffers. `rows`: ids of a step. Weights are put together under `folder`.
    """

    def __init__(
        self,
        manifest: Manifest,
        piece: PieceFile,
        folder: Path,
        *,
        context: int,
        share: tuple[int, int] = (0, 1),
        rows: int = 1,
    ) -> None:
        self.manifest, self._piece_file, self.rows = manifest, piece, rows
        self._share = share
        g, exact = manifest.geometry, manifest.numeric_class.exact
        heads, vocab = self._range(g.head_groups), self._range(g.vocab_groups)
        self._first_id = vocab.start * g.vocab_group_rows
        wide: type[np.floating[Any]] = np.float64 if exact else np.float32
        self._residual = [self._value((rows, g.hidden), np.float32) for _ in range(2)]
        self._delta = [self._value((rows, g.hidden), wide) for _ in range(2)]
        self._seqlens = self._value((1,), np.int32)
        self._total = self._value((1,), np.int32)
        half = g.head_dim // 2
        self._cos = self._table(manifest.ropes["default"][0].cos, context + 2, half)
        self._sin = self._table(manifest.ropes["default"][0].sin, context + 2, half)
        self._logits = self._value((rows, vocab.count * g.vocab_group_rows), np.float32)
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
                        cache = self._value((1, heads.count, context + 2, g.head_dim), np.float32)[1]
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
                    values[one.name] = self._value((self.rows, one.shape[-1]), np.float32)[1]
                binding.bind_ortvalue_output(one.name, values[one.name])
            for one in session.get_inputs():
                binding.bind_ortvalue_input(one.name, values[one.name])
            self._runs.append((session, binding))

    def step(self, tokens: list[int], position: int) -> int:
        """Run `rows` tokens from `position` on; returns the greedy id after the last, of this share's own ids."""
        g = self.manifest.geometry
        for at, token in enumerate(tokens):
            row = self._embedding[token // g.vocab_group_rows][token % g.vocab_group_rows]
            if row.dtype == np.uint16:
                row = (row.astype(np.uint32) << 16).view(np.float32)
            self._residual[0][0][at] = row
        self._delta[0][0][:] = 0
        self._total[0][0] = position + self.rows
        self._seqlens[0][0] = position + self.rows - 1
        for session, binding in self._runs:
            session.run_with_iobinding(binding)
        return self._first_id + int(self._logits[0][-1, : g.vocab - self._first_id].argmax())

    def decode(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Prompt step by step, then `count` greedy ids, each the window that follows: (ids, seconds of a step)."""
        token, position = 0, 0
        for token_in in prompt:
            token = self.step([token_in] * self.rows, position)
            position += self.rows
        ids, seconds = [token], []
        for _ in range(count - 1):
            started = time.perf_counter()
            ids.append(self.step([ids[-1]] * self.rows, position))
            seconds.append(time.perf_counter() - started)
            position += self.rows
        return ids, seconds

    def _range(self, groups: int) -> Range:
        index, of = self._share
        return Range(groups * index // of, groups * (index + 1) // of)

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
        weights, part = folder / WEIGHTS_FILE, self._range(segment.groups)
        if not weights.exists() or weights.stat().st_size != weights_size(segment, part):
            with weights.open("wb") as file:
                write_weights(segment, part, lambda digest: memoryview(np.memmap(self._piece_file(digest))), file)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        found = []
        for number, piece in enumerate(self.manifest.graphs[f"{segment.kind}/{part.count}"]):
            graph = folder / f"{number}.onnx"
            graph.write_bytes(self._piece_file(piece.digest).read_bytes())
            found.append(ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]))
        return found


def main() -> None:
    """Print the mean ms per step of a greedy run over a cut model and its ids, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("store", type=Path, help="the store folder of the agent that holds the pieces")
    parser.add_argument("folder", type=Path, help="where weights are put together, and found again")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--share", default="0/1", help="which part of the model, as in 0/2")
    parser.add_argument("--prompt", default=PROMPT, help="token ids, with commas")
    parser.add_argument("--rows", type=int, default=1, help="tokens of a step")
    parser.add_argument("--wait", action="store_true", help="say when it is loaded, and go on at a line")
    chosen = parser.parse_args()
    ort.set_global_thread_pool_sizes(chosen.threads, 1)
    manifest = from_json(Manifest, chosen.manifest.read_bytes(), limit_bytes=MANIFEST_BYTES)
    index, of = map(int, chosen.share.split("/"))
    piece = PieceStore(chosen.store).path_of
    prompt = [int(token) for token in chosen.prompt.split(",")]
    context = (len(prompt) + chosen.tokens + 1) * chosen.rows
    bare = Bare(manifest, piece, chosen.folder, context=context, share=(index, of), rows=chosen.rows)
    bare.decode([1, 2, 3], 8)
    if chosen.wait:
        print("loaded", flush=True)
        sys.stdin.readline()
    ids, seconds = bare.decode(prompt, chosen.tokens)
    print(json.dumps({"ms": statistics.fmean(seconds) * 1e3, "ids": ids}))


if __name__ == "__main__":
    main()
