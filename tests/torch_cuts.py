"""Cut models, and both executors on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import make
from family_shapes import SHAPES
from mixture_shapes import SHAPES as MIXTURES
from mixture_shapes import make_mixture
from reference_runner import cut_evenly

from ganglion.agent.executor.choice import load_torch, parse_executor
from ganglion.agent.executor.embedding import EmbeddingTable
from ganglion.agent.executor.executor import Executor
from ganglion.agent.executor.loader import load_shard, start_runtime
from ganglion.agent.store import PieceStore
from ganglion.partitioner.classes import NO_RULES
from ganglion.partitioner.cut import numeric_class, partition
from ganglion.partitioner.families.model import Experts
from ganglion.partitioner.quantize import Rules
from ganglion.wire.nouns import Manifest, Plan, Range, Share, Stage, digest


@dataclass
class Cut:
    """A cut model; `executors` are those of a plan, one for each weight."""

    folder: Path
    manifest: Manifest
    store: PieceStore
    embedding: EmbeddingTable
    opened: int = 0

    def plan(self, weights: Sequence[float] = (1,), **options: Any) -> Plan:
        shares = tuple(
            Share(device=letter * 26, heads=cut.heads, columns=cut.columns, vocab=cut.vocab, experts=cut.experts)
            for letter, cut in zip("abcd", cut_evenly(self.manifest, weights), strict=False)
        )
        stage = Stage(layers=Range(0, self.manifest.geometry.layers), shares=shares, topology="mesh")
        settings = {"context": self.manifest.geometry.context, "sessions": 8, "kv_tokens": 8192, "chunk": 64}
        return Plan(
            manifest_digest=digest(self.manifest),
            numeric_class=self.manifest.numeric_class,
            stages=(stage,),
            threads={},
            **settings | options,
        )

    def run(self, executor: str, weights: Sequence[float] = (1,), **options: Any) -> Run:
        """Executors of `executor` (as it is said on a command line), their sums made by hand."""
        start_runtime(1)
        plan, choice = self.plan(weights, **options), parse_executor(executor)
        (stage,) = plan.stages
        made: list[Any] = []
        for share in stage.shares:
            self.opened += 1
            more: dict[str, Any] = {"open_piece": self.store.open, "progress": lambda done, total: None}
            if choice.kind == "torch":
                made.append(load_torch(self.manifest, plan, stage, share, choice, **more))
                continue
            shard = load_shard(self.manifest, stage, share, folder=self.folder / f"x{self.opened}", **more)
            made.append(Executor(self.manifest, plan, shard, self.store.open))
        return Run(self, made)


@dataclass
class Run:
    cut: Cut
    executors: list[Any]

    def step(self, entries: Sequence[tuple[int, int, int]], ids: Sequence[int], *, halves: bool = False) -> np.ndarray:
        """Logits of every row [rows, vocabulary] of a step, which draws from two rows at a time."""
        role = "prompt" if self.cut.manifest.prompt_layers else "any"
        batches = [one.begin(entries, role) for one in self.executors]
        for one, batch in zip(self.executors, batches, strict=True):
            self.cut.embedding.rows(ids, one.residual(batch))
        if halves:
            parts = [one.halves(batch) for one, batch in zip(self.executors, batches, strict=True)]
            for index in range(self.executors[0].segments):
                for number in range(2):
                    self._sum(
                        index, [one.run(part[number], index) for one, part in zip(self.executors, parts, strict=True)]
                    )
            for one, batch, part in zip(self.executors, batches, parts, strict=True):
                one.join(batch, part)
        else:
            for index in range(self.executors[0].segments):
                self._sum(index, [one.run(batch, index) for one, batch in zip(self.executors, batches, strict=True)])
        found = [
            np.concatenate([one.logits(batch, range(at, min(at + 2, batch.rows))) for at in range(0, batch.rows, 2)])
            for one, batch in zip(self.executors, batches, strict=True)
        ]
        return np.concatenate(found, axis=1)[:, : self.cut.manifest.geometry.vocab]

    def _sum(self, index: int, partials: list[np.ndarray]) -> None:
        segments = [segment for layer in self.cut.manifest.layers for segment in layer.segments]
        if len(partials) > 1 and segments[index].exchange:
            total = sum(partial.copy() for partial in partials)
            for partial in partials:
                partial[...] = total

    def sequence(self, ids: Sequence[int], chunks: Sequence[int], session: int = 1, **options: Any) -> np.ndarray:
        found, start = [], 0
        for count in chunks:
            found.append(self.step([(session, start, count)], ids[start : start + count], **options))
            start += count
        return np.concatenate(found)

    def greedy(self, prompt: Sequence[int], count: int, session: int = 1) -> tuple[list[int], np.ndarray]:
        """Tokens one after the other, and the logits that they were drawn from."""
        ids, rows = list(prompt), []
        for start, more in [(0, len(prompt)), *((at, 1) for at in range(len(prompt), len(prompt) + count - 1))]:
            rows.append(self.step([(session, start, more)], ids[start:])[-1])
            ids.append(int(rows[-1].argmax()))
        return ids[len(prompt) :], np.stack(rows)


def tokens_of(cut: Cut, count: int, seed: int = 0) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(0, cut.manifest.geometry.vocab, count)]


def cutter(folder_of: Callable[[str], Path]) -> Callable[..., Cut]:
    """Makes models by shape, format and class, each once; `folder_of` gives a new folder."""
    paths: dict[str, Path] = {}
    made: dict[Any, Cut] = {}

    def checkpoint(shape: str) -> Path:
        if shape not in paths:
            folder = folder_of(shape) / "checkpoint"
            if shape in MIXTURES:
                paths[shape] = make_mixture(folder, shape=MIXTURES[shape])
            else:
                paths[shape] = make(folder, SHAPES[shape].family, dtype=SHAPES[shape].dtype, **SHAPES[shape].config)
        return paths[shape]

    def get(
        shape: str, weights: str = "fp32", fast: bool = False, experts: Experts = "columns", rules: Rules = NO_RULES
    ) -> Cut:
        key = (shape, weights, fast, experts, rules)
        if key not in made:
            path, folder = checkpoint(shape), folder_of("cut")
            store = PieceStore(folder / "store")
            kind = numeric_class(path, weights, fast=fast, rules=rules, experts=experts)
            manifest = partition(path, store, name=shape, numeric_class=kind, rules=rules, experts=experts)
            made[key] = Cut(folder, manifest, store, EmbeddingTable(manifest, store.open))
        return made[key]

    return get
