"""A dumb in-process runner of a cut model: any list of shares, partial sums added in order of rank, no transport.

It is the reference that the agent's executor and exchange are compared with, and the partitioner's own proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ganglion.agent.executor.loader import start_runtime
from ganglion.partitioner.sink import DirectorySink
from ganglion.wire.nouns import EXACT_POSITIONS, WEIGHTS_FILE, Manifest, PieceRef, Range, Segment
from ganglion.wire.shares import Groups, every_expert, graph_name, group_count, held_groups, weights_size, write_weights

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Cut:
    """One share's ranges of groups along the three axes, and of a model cut by experts those of every layer."""

    heads: Range
    columns: Range
    vocab: Range
    experts: tuple[tuple[int, ...], ...] = ()


def cut_evenly(manifest: Manifest, weights: Sequence[float]) -> list[Cut]:
    """Shares in proportion to `weights`: contiguous ranges along every axis, some of them possibly empty."""
    edges = np.cumsum([0.0, *weights]) / sum(weights)

    def ranges(groups: int) -> list[Range]:
        at = [round(float(edge) * groups) for edge in edges]
        return [Range(a, b) for a, b in pairwise(at)]

    g = manifest.geometry
    axes = zip(ranges(g.head_groups), ranges(g.column_groups), ranges(g.vocab_groups), strict=True)
    every = every_expert(manifest.layers)
    held = [ranges(len(one)) for one in every]
    return [
        Cut(*axis, tuple(tuple(range(one[rank].start, one[rank].stop)) for one in held))
        for rank, axis in enumerate(axes)
    ]


def apart(manifest: Manifest, devices: int) -> list[Cut]:
    """Shares of which the first has all but experts, which lie in turn on all, the last expert of a layer on two."""
    lead, *_ = cut_evenly(manifest, (1, *[0] * (devices - 1)))
    every = every_expert(manifest.layers)
    empty = cut_evenly(manifest, (1, *[0] * (devices - 1)))[1:]
    held = [
        tuple(tuple(sorted({*one[rank::devices], *one[-1:]} if rank < 2 else one[rank::devices])) for one in every)
        for rank in range(devices)
    ]
    return [replace(one, experts=experts) for one, experts in zip([lead, *empty], held, strict=True)]


def chained(sessions: Sequence[ort.InferenceSession], feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of graphs that run one after the other, by name."""
    found: dict[str, Any] = {}
    for session in sessions:
        found |= run_rows(session, {one.name: (feeds | found)[one.name] for one in session.get_inputs()})
    return found


def run_rows(session: ort.InferenceSession, feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a graph by name; a lone row is run twice, for on AVX2 int4 gives it other bits alone."""
    lone = all(len(rows) == 1 and rows.ndim == 2 for rows in feeds.values())
    taken = {name: np.repeat(rows, 2, axis=0) for name, rows in feeds.items()} if lone else feeds
    names = [one.name for one in session.get_outputs()]
    outputs = session.run(None, taken)
    return dict(zip(names, (one[:1] for one in outputs) if lone else outputs, strict=True))


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
            for layer, entry in enumerate((*manifest.layers, *manifest.prompt_layers)):
                for half, segment in enumerate(entry.segments):
                    self._open((rank, layer, half), segment, held_groups(share, segment, layer))
            self._open((rank, -1, 0), manifest.head, share.vocab)
        self.ropes: dict[str, list[Floats]] = {}
        for name, tables in manifest.ropes.items():
            table = next((one for one in tables if context is not None and one.context >= context), tables[-1])
            self.ropes[name] = [
                np.frombuffer(self._piece(one), np.float32).reshape(table.context, -1) for one in (table.cos, table.sin)
            ]
        self.caches: dict[tuple[int, int], list[Floats]] = {}

    def forward(
        self, ids: Sequence[int], chunks: Sequence[int] | None = None, *, prompt: int | None = None
    ) -> tuple[Floats, Floats]:
        """Run `ids` from position 0 in chunks of the given sizes: (logits [T, vocab], hidden [T, hidden]).

        prompt: where formats mix, how many of `ids` are the prompt (None: all); no chunk may hold tokens of both roles.
        """
        prompt = len(ids) if prompt is None or not self.manifest.prompt_layers else prompt
        g = self.manifest.geometry
        capacity = max(len(ids) + 1, EXACT_POSITIONS)  # exact graphs pad rows
        for rank, share in enumerate(self.shares):
            for layer in range(g.layers):
                shape = (1, share.heads.count, capacity, g.head_dim)
                self.caches[rank, layer] = [np.zeros(shape, np.float32), np.zeros(shape, np.float32)]
        logits, hidden, start = [], [], 0
        for count in chunks or [one for one in (prompt, len(ids) - prompt) if one]:
            assert start >= prompt or start + count <= prompt
            rows = self._embed(ids[start : start + count])
            res, delta = self._layers(rows, start, prompt=start < prompt)
            hidden.append(res + delta.astype(np.float32))  # before the last layer's post norm, where it has one
            logits.append(self._head(res, delta))
            start += count
        return np.concatenate(logits), np.concatenate(hidden)

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """`count` greedy tokens after `ids`, each from a run of everything before it."""
        out: list[int] = []
        for _ in range(count):
            out.append(int(self.forward([*ids, *out], prompt=len(ids))[0][-1].argmax()))
        return out

    def _layers(self, res: Floats, start: int, *, prompt: bool) -> tuple[Floats, Any]:
        manifest = self.manifest
        first = len(manifest.layers) if prompt and manifest.prompt_layers else 0  # as `_open` has numbered them
        delta = np.zeros(res.shape, np.float64 if self.exact else np.float32)
        deltas = [delta] * len(self.shares)  # what each share holds: alike after an exchange
        carried: list[Any] = [None] * len(self.shares)
        number = 0
        for layer, entry in enumerate(manifest.prompt_layers if first else manifest.layers):
            for half, segment in enumerate(entry.segments):
                if segment.axis == "experts":
                    res, delta = self._mixture(layer, half, res, deltas[0], segment.experts)
                    deltas = [delta] * len(self.shares)
                    number += 1
                    continue
                left: list[Any] = []
                for rank, share in enumerate(self.shares):
                    sessions = self.sessions.get((rank, first + layer, half))
                    if sessions is None:
                        left.append(None)
                        continue
                    feeds: dict[str, Any] = {"delta": deltas[rank]}
                    feeds |= {"carry": carried[rank]} if segment.takes == "carry" else {"res": res}
                    if segment.attends and share.heads.count:
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

    def _mixture(self, layer: int, half: int, res: Floats, delta: Any, each: int) -> tuple[Floats, Any]:
        """Whole experts, a row of one expert at a time, on the last share that holds it."""
        first, *_ = self.sessions[0, layer, half]
        found = run_rows(first, {"res": res, "delta": delta})
        res, rows, chosen, weights = (found[name] for name in ("res_out", "rows", "chosen", "weights"))
        assert chosen.shape == weights.shape == (len(rows), each)
        total = np.zeros_like(delta)
        for row in range(len(rows)):
            for expert, weight in zip(chosen[row], weights[row], strict=True):
                rank = max(one for one, share in enumerate(self.shares) if expert in share.experts[layer])
                place = self.shares[rank].experts[layer].index(expert)
                feeds = {"rows": rows[row : row + 1], "index": np.array([place])}
                given = self.sessions[rank, layer, half][1].run(["given"], feeds)[0][0]
                total[row] += weight * given
        return res, total

    def _head(self, res: Floats, delta: Any) -> Floats:
        parts = [
            run_rows(self.sessions[rank, -1, 0][0], {"res": res, "delta": delta})["logits"]
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

    def _open(self, key: tuple[int, int, int], segment: Segment, share: Groups) -> None:
        count = group_count(share)
        if not count and (segment.takes == "carry" or segment is self.manifest.head):
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
        for number, piece in enumerate(self.manifest.graphs[graph_name(segment, share)]):
            graph = folder / f"{number}.onnx"
            graph.write_bytes(self._piece(piece))
            session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            self.sessions[key].append(session)

    def _piece(self, ref: PieceRef) -> bytes:
        data = self.pieces.file(ref.digest).read_bytes()
        assert len(data) == ref.size
        return data
