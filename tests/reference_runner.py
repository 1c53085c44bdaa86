"""A dumb in-process runner of a cut model: any list of shares, partial sums added in order of rank, no transport.

It is the reference that the agent's executor and exchange are compared with, and the partitioner's own proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ganglion.agent.executor.loader import start_runtime
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import EXACT_POSITIONS, WEIGHTS_FILE, Manifest, PieceRef, Range, Segment
from ganglion.wire.shares import weights_size, write_weights

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Cut:
    """One share's ranges of groups along the three axes."""

    heads: Range
    columns: Range
    vocab: Range


def cut_evenly(manifest: Manifest, weights: Sequence[float]) -> list[Cut]:
    """Shares in proportion to `weights`: contiguous ranges along every axis, some of them possibly empty."""
    edges = np.cumsum([0.0, *weights]) / sum(weights)

    def ranges(groups: int) -> list[Range]:
        at = [round(float(edge) * groups) for edge in edges]
        return [Range(a, b) for a, b in pairwise(at)]

    g = manifest.geometry
    axes = zip(ranges(g.head_groups), ranges(g.column_groups), ranges(g.vocab_groups), strict=True)
    return [Cut(*axis) for axis in axes]


def chained(sessions: Sequence[ort.InferenceSession], feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of graphs that run one after the other, by name."""
    found: dict[str, Any] = {}
    for session in sessions:
        taken = {one.name: (feeds | found)[one.name] for one in session.get_inputs()}
        found |= zip([one.name for one in session.get_outputs()], session.run(None, taken), strict=True)
    return found


class Runner:
    """Runs `manifest` (pieces in `pieces`) over `shares`, all in this process; `folder` takes the assembled weights.

    context: that of the deployment, which a rope may depend on; by default as long as the model's.
    """

    def __init__(
        self,
        manifest: Manifest,
        pieces: DirectorySink,
        folder: Path,
        shares: Sequence[Cut],
        *,
        threads: int = 1,
        context: int | None = None,
        spoil: Callable[[int, int, Any], Any] | None = None,
    ) -> None:
        self.manifest, self.pieces, self.shares, self.folder = manifest, pieces, list(shares), folder
        self.exact = manifest.numeric_class.exact
        self.spoil = spoil  # mutants: (segment number, rank, partial) -> partial
        self.threads = threads
        self.sessions: dict[tuple[int, int, int], list[ort.InferenceSession]] = {}
        for rank, share in enumerate(self.shares):
            for layer, entry in enumerate(manifest.layers):
                for half, segment in enumerate(entry.segments):
                    self._open((rank, layer, half), segment, self._range(share, segment))
            self._open((rank, -1, 0), manifest.head, share.vocab)
        self.ropes: dict[str, list[Floats]] = {}
        for name, tables in manifest.ropes.items():
            table = next((one for one in tables if context is not None and one.context >= context), tables[-1])
            self.ropes[name] = [
                np.frombuffer(self._piece(one), np.float32).reshape(table.context, -1) for one in (table.cos, table.sin)
            ]
        self.caches: dict[tuple[int, int], list[Floats]] = {}

    def forward(self, ids: Sequence[int], chunks: Sequence[int] | None = None) -> tuple[Floats, Floats]:
        """Run `ids` from position 0 in chunks of the given sizes: (logits [T, vocab], hidden [T, hidden])."""
        g = self.manifest.geometry
        capacity = max(len(ids) + 1, EXACT_POSITIONS)  # exact graphs pad rows
        for rank, share in enumerate(self.shares):
            for layer in range(g.layers):
                shape = (1, share.heads.count, capacity, g.head_dim)
                self.caches[rank, layer] = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
        logits, hidden, start = [], [], 0
        for count in chunks or [len(ids)]:
            rows = self._embed(ids[start : start + count])
            res, delta = self._layers(rows, start)
            hidden.append(res + delta.astype(np.float32))  # before the last layer's post norm, where it has one
            logits.append(self._head(res, delta))
            start += count
        return np.concatenate(logits), np.concatenate(hidden)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` greedy tokens after `ids`, each from a run of everything before it."""
        out: list[int] = []
        for _ in range(count):
            out.append(int(self.forward([*ids, *out])[0][-1].argmax()))
        return out

    def _layers(self, res: Floats, start: int) -> tuple[Floats, Any]:
        delta = np.zeros(res.shape, np.float64 if self.exact else np.float32)
        deltas = [delta] * len(self.shares)  # what each share holds: alike after an exchange
        carried: list[Any] = [None] * len(self.shares)
        number = 0
        for layer, entry in enumerate(self.manifest.layers):
            for half, segment in enumerate(entry.segments):
                left: list[Any] = []
                for rank, share in enumerate(self.shares):
                    sessions = self.sessions.get((rank, layer, half))
                    if sessions is None:
                        left.append(None)
                        continue
                    feeds: dict[str, Any] = {"delta": deltas[rank]}
                    feeds |= {"carry": carried[rank]} if segment.takes == "carry" else {"res": res}
                    if segment.attends and self._range(share, segment).count:
                        feeds |= self._attention_feeds(rank, layer, start, len(res), segment.rope)
                    found = chained(sessions, feeds)
                    if "present_key" in found:
                        self.caches[rank, layer] = [found["present_key"], found["present_value"]]
                    carried[rank] = found.get("carry")
                    out = found.get("res_out", res)
                    partial = found["partial"]
                    if self.spoil is not None:
                        partial = self.spoil(number, rank, partial)
                    left.append(partial)
                if segment.exchange:
                    given = [partial for partial in left if partial is not None]
                    total = given[0]
                    for partial in given[1:]:
                        total = total + partial
                    left = [total] * len(self.shares)
                deltas, res = left, out
                number += 1
        return res, deltas[0]

    def _head(self, res: Floats, delta: Any) -> Floats:
        parts = [
            self.sessions[rank, -1, 0][0].run(None, {"res": res, "delta": delta})[0]
            for rank, share in enumerate(self.shares)
            if share.vocab.count
        ]
        return np.concatenate(parts, axis=1)[:, : self.manifest.geometry.vocab]

    def _attention_feeds(self, rank: int, layer: int, start: int, rows: int, rope: str) -> dict[str, Any]:
        key, value = self.caches[rank, layer]
        total = np.array([start + rows], np.int32)
        feeds = {"past_key": key, "past_value": value, "seqlens_k": total - 1, "total": total}
        return feeds | (dict(zip(("cos", "sin"), self.ropes[rope], strict=True)) if rope else {})

    def _embed(self, ids: Sequence[int]) -> Floats:
        g, embedding = self.manifest.geometry, self.manifest.embedding
        rows = []
        for token in ids:
            piece = self._piece(embedding.pieces[token // g.vocab_group_rows])
            stored = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[embedding.dtype]
            row = np.frombuffer(piece, stored).reshape(g.vocab_group_rows, g.hidden)[token % g.vocab_group_rows]
            if embedding.dtype == "bfloat16":
                row = (row.astype(np.uint32) << 16).view(np.float32)
            rows.append(row.astype(np.float32))
        return np.stack(rows) * np.float32(embedding.scale)

    def _open(self, key: tuple[int, int, int], segment: Segment, share: Range) -> None:
        if not share.count and (segment.takes == "carry" or segment is self.manifest.head):
            return
        folder = self.folder / "-".join(map(str, (*key, segment.kind)))
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / WEIGHTS_FILE).open("wb") as file:
            write_weights(segment, share, lambda digest: memoryview(self.pieces.file(digest).read_bytes()), file)
        assert (folder / WEIGHTS_FILE).stat().st_size == weights_size(segment, share)
        options = ort.SessionOptions()
        # One pool for the process: in one that has it (an agent's tests), sessions with pools of their own are refused.
        start_runtime(self.threads)
        options.use_per_session_threads = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        self.sessions[key] = []
        for number, piece in enumerate(self.manifest.graphs[f"{segment.kind}/{share.count}"]):
            graph = folder / f"{number}.onnx"
            graph.write_bytes(self._piece(piece))
            session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            self.sessions[key].append(session)

    def _piece(self, ref: PieceRef) -> bytes:
        data = self.pieces.file(ref.digest).read_bytes()
        assert len(data) == ref.size
        return data

    @staticmethod
    def _range(share: Cut, segment: Segment) -> Range:
        return share.heads if segment.axis == "heads" else share.columns
